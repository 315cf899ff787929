"""LARS as an ordinary optimiser."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class LARS(Optimizer):
    """SGD in which each tensor has a rate of its own, in proportion to its norm (LARS).

    With w a parameter, g its gradient and λ the weight decay, the direction of SGD is
    r · (g + λ w) with r = eta · ‖w‖ / (‖g‖ + λ ‖w‖ + eps); momentum comes after that. Where ‖w‖ or
    ‖g‖ is 0, the direction is g. You, Gitman and Ginsburg, arXiv 1708.03888, equation 6.

    Args:
        params: parameters or groups of them, as for every optimiser.
        lr: learning rate, at least 0.
        momentum, dampening, nesterov, weight_decay: as for ``torch.optim.SGD``.
        eta: the trust coefficient, above 0.
        eps: keeps the denominator above 0.
        clip_lr: caps r / lr at 1, and takes this for r.
        exclude_bias_n_norm: parameters of one dimension take plain steps, without weight decay.

    Raises:
        ValueError: a value is out of its range.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        eta: float = 1e-3,
        eps: float = 1e-8,
        clip_lr: bool = False,
        exclude_bias_n_norm: bool = False,
    ):
        for name, value in {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}.items():
            if value < 0:
                raise ValueError(f"{name}={value}: must be at least 0")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("nesterov needs a momentum above 0 and no dampening")
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
                "eta": eta,
                "eps": eps,
                "clip_lr": clip_lr,
                "exclude_bias_n_norm": exclude_bias_n_norm,
            },
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; the closure computes the gradients, so it runs before they are read."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(self._direction(p, p.grad, group), alpha=-group["lr"])
        return loss

    def _direction(self, p: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> Any:
        direction = grad
        if p.ndim != 1 or not group["exclude_bias_n_norm"]:
            p_norm, g_norm, decay = p.norm(), grad.norm(), group["weight_decay"]
            if p_norm != 0 and g_norm != 0:
                rate = group["eta"] * p_norm / (g_norm + p_norm * decay + group["eps"])
                if group["clip_lr"]:
                    rate = (rate / group["lr"]).clamp(max=1)
                direction = rate * grad.add(p, alpha=decay)
        if group["momentum"] == 0:
            return direction
        state = self.state[p]
        if "momentum_buffer" not in state:
            buffer = state["momentum_buffer"] = direction.clone()
        else:
            buffer = state["momentum_buffer"]
            buffer.mul_(group["momentum"]).add_(direction, alpha=1 - group["dampening"])
        return direction.add(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer


def lars_from_sgd(
    optimizer: torch.optim.SGD,
    eta: float = 1e-3,
    clip: bool = False,
    eps: float = 1e-8,
    exclude_bias_n_norm: bool = False,
) -> LARS:
    """LARS is a wrapper of SGD that scales the gradients of the step before: an optimiser here.

    It has the groups of the SGD, which has not stepped yet.
    """
    names = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "params", "name")
    groups = [{k: group[k] for k in names if k in group} for group in optimizer.param_groups]
    return LARS(
        groups,
        lr=optimizer.defaults["lr"],
        eta=eta,
        eps=eps,
        clip_lr=clip,
        exclude_bias_n_norm=exclude_bias_n_norm,
    )
