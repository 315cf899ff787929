"""What the meta-update needs around the hypergradient: a quiet network, a trial step, an optimiser.

Torch only. The method itself is in metamask.py, the mathematics in hypergradient.py.
"""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from metamask_solo.method.hypergradient import TrialStep


@contextmanager
def own_batch_statistics(*modules: nn.Module) -> Iterator[None]:
    """Lets BatchNorm use batch statistics of this process, and leave its running ones alone.

    SyncBatchNorm has no forward-mode derivative and would wait for the other processes; inside
    the block it is an ordinary BatchNorm. BatchNorm in evaluation mode is untouched.
    """
    norms = [
        m
        for module in modules
        for m in module.modules()
        if isinstance(m, _BatchNorm) and m.training
    ]
    tracked = [norm.track_running_stats for norm in norms]
    try:
        for norm in norms:
            norm.track_running_stats = False
            if isinstance(norm, nn.SyncBatchNorm):
                norm.forward = functools.partial(_BatchNorm.forward, norm)  # type: ignore[method-assign]
        yield
    finally:
        for norm, track in zip(norms, tracked, strict=True):
            norm.track_running_stats = track
            norm.__dict__.pop("forward", None)


def trial_step(
    optimizer: torch.optim.Optimizer,
    params: Mapping[str, Tensor],
    lr: float | None,
    momentum: bool,
    weight_decay: bool,
) -> TrialStep:
    """The optimiser's next step as a trial step; its state is read in place.

    Args:
        optimizer: the optimiser of the regular step.
        params: the parameters of the trial step by name; each is in one group of the optimiser.
        lr: learning rate, or None for the one that ``optimizer`` has now (SGD only: another
            optimiser's rate means something else).
        momentum: whether SGD's momentum takes part. Other optimisers' buffers hold other things
            than gradients, so they never do.
        weight_decay: whether the optimiser's weight decay takes part.
    """
    sgd = isinstance(optimizer, torch.optim.SGD)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    own = {name: groups[id(p)] for name, p in params.items()}
    buffers: dict[str, Tensor] = {}
    factor = 0.0
    if sgd and momentum:
        factor = max(group["momentum"] for group in own.values())
        for name, p in params.items():
            buffer = optimizer.state[p].get("momentum_buffer") if p in optimizer.state else None
            if buffer is not None and own[name]["momentum"] == factor:
                buffers[name] = buffer
    return TrialStep(
        lr=_one_or_each({n: lr if lr is not None else g["lr"] for n, g in own.items()}),
        momentum=factor,
        weight_decay=_one_or_each(
            {n: g["weight_decay"] if weight_decay else 0.0 for n, g in own.items()}
        ),
        momentum_buffers=buffers,
    )


def _one_or_each(values: dict[str, Any]) -> float | dict[str, float]:
    values = {name: float(value) for name, value in values.items()}
    distinct = set(values.values())
    return distinct.pop() if len(distinct) == 1 else values


def mean_over_processes(gradient: Tensor) -> Tensor:
    """The mean of ``gradient`` over the processes of a distributed run; itself otherwise."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return gradient
    total = gradient.clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()


class MaskOptimizer:
    """The mask's own optimiser and schedule, and what they did so far.

    Args:
        logits: the mask logits, moved in place.
        optimizer: ``sgd`` or ``adam``.
        lr, momentum, weight_decay: as in torch; for Adam ``momentum`` is the first beta.
        schedule: ``fixed``, or ``cosine`` from ``lr`` to 0 over ``total_updates``.
        clip_grad: largest norm of a gradient, or None.
        total_updates: number of updates in the whole run, for the cosine schedule.
    """

    def __init__(
        self,
        logits: nn.Parameter,
        *,
        optimizer: str,
        lr: float,
        momentum: float,
        weight_decay: float,
        schedule: str,
        clip_grad: float | None,
        total_updates: int,
    ):
        self.logits = logits
        self.clip_grad = clip_grad
        self.skipped = 0
        if optimizer == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
                [logits], lr=lr, momentum=momentum, weight_decay=weight_decay
            )
        else:
            self.optimizer = torch.optim.Adam(
                [logits], lr=lr, betas=(momentum, 0.999), weight_decay=weight_decay
            )
        self.scheduler = (
            torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, max(1, total_updates))
            if schedule == "cosine"
            else None
        )

    def step(self, gradient: Tensor) -> bool:
        """Moves the logits along ``gradient``; a gradient that is not finite is skipped, counted.

        Returns:
            Whether the logits moved.
        """
        finite = bool(gradient.isfinite().all())
        if finite:
            self.logits.grad = gradient.to(self.logits.dtype)
            if self.clip_grad is not None:
                nn.utils.clip_grad_norm_([self.logits], self.clip_grad)
            self.optimizer.step()
            self.logits.grad = None
        else:
            self.skipped += 1
        if self.scheduler is not None and self.scheduler.last_epoch < self.scheduler.T_max:
            self.scheduler.step()  # past its end a cosine would rise again
        return finite

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None and state["scheduler"] is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.skipped = state["skipped"]
