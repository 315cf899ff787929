"""The dimensional mask (MetaMask, section 4.2): one learned weight for each feature dimension."""

import math
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor, nn

from metamask_solo.errors import UserError
from metamask_solo.method.names import Kind

KINDS: tuple[Kind, ...] = get_args(Kind)
DEFAULT_INITIAL_LOGIT = {"sigmoid": 0.0, "linear": 1.0}


def mask_from_logits(logits: Tensor, kind: Kind | str) -> Tensor:
    """Maps mask logits a to the mask m.

    Args:
        logits: shape (D,), any real numbers.
        kind: ``sigmoid`` for m = σ(a), within 0 and 1, or ``linear`` for m = a.

    Returns:
        The mask, shape (D,).
    """
    if kind == "sigmoid":
        return torch.sigmoid(logits)
    if kind == "linear":
        return logits
    raise UserError(f"kind={kind!r}: allowed are {', '.join(KINDS)}")


def mask_statistics(mask: Tensor) -> dict[str, Tensor]:
    """Mean, standard deviation, extremes and effective number of dimensions of a mask.

    The effective number of dimensions is exp(H), with H the entropy of |m| / Σ|m|: D for a
    constant mask, 1 when a single dimension is left, 0 when every entry is zero.

    Args:
        mask: shape (D,).

    Returns:
        Scalars ``mean``, ``std`` (population), ``min``, ``max``, ``effective_dims``.
    """
    mask = mask.detach().to(torch.float64)
    largest = mask.abs().max()
    # divided by the largest entry first: the sum of very small masks must not underflow
    weight = mask.abs() / largest if largest > 0 else mask.abs()
    share = weight / weight.sum() if largest > 0 else weight
    entropy = -torch.special.xlogy(share, share).sum()
    effective = torch.exp(entropy) if largest > 0 else torch.zeros_like(entropy)
    return {
        "mean": mask.mean(),
        "std": mask.std(correction=0),
        "min": mask.min(),
        "max": mask.max(),
        "effective_dims": effective,
    }


class DimensionalMask(nn.Module):
    """Multiplies features by a mask that the meta-update learns (MetaMask, section 4.2).

    The logits are a parameter without ``requires_grad``: the regular training step must neither
    differentiate nor average them (DistributedDataParallel skips them); only the meta-update,
    which has their gradient in hand, moves them. They stay in single precision when the model goes
    to a lower one, where the steps of a mask would round away, and so does the product with the
    features; its result has the features' type, outside of autocast.

    The state holds the logits and the kind; a mask of another kind does not load it.

    Args:
        dims: number of feature dimensions D, at least 1.
        kind: ``sigmoid`` or ``linear``.
        initial_logit: the starting value of every logit; None for 0 (sigmoid, so that m = 0.5)
            or 1 (linear, so that m = 1).
        dim: which dimension of the features is masked; -1 the last one, 1 the channels of
            N × D × H × W.
        device: where the logits are.
        dtype: their type: ``torch.float32`` or ``torch.float64``; None: torch's default, but never
            less than the former.

    Raises:
        UserError: an argument is out of range.

    Example:
        >>> mask = DimensionalMask(3, kind="linear", initial_logit=2.0, dim=1)
        >>> mask(torch.ones(8, 3, 4, 4)).mean()
        tensor(2.)
    """

    def __init__(
        self,
        dims: int,
        kind: Kind = "sigmoid",
        initial_logit: float | None = None,
        *,
        dim: int = -1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not isinstance(dims, int) or dims < 1:
            raise UserError(f"dims={dims!r}: must be an integer of at least 1")
        if kind not in KINDS:
            raise UserError(f"kind={kind!r}: allowed are {', '.join(KINDS)}")
        if initial_logit is None:
            initial_logit = DEFAULT_INITIAL_LOGIT[kind]
        if not math.isfinite(initial_logit):
            raise UserError(f"initial_logit={initial_logit}: must be finite")
        if not isinstance(dim, int):
            raise UserError(f"dim={dim!r}: must be an integer")
        if dtype is None:
            dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        if dtype not in (torch.float32, torch.float64):
            raise UserError(f"dtype={dtype}: allowed are torch.float32 and torch.float64")
        self.kind: Kind = kind
        self.dim = dim
        self.logits = nn.Parameter(
            torch.full((dims,), float(initial_logit), device=device, dtype=dtype),
            requires_grad=False,
        )

    def mask(self) -> Tensor:
        """The current mask m, shape (D,)."""
        return mask_from_logits(self.logits, self.kind)

    def forward(self, features: Tensor) -> Tensor:
        """Masks features, N × D or any shape with D in the dimension ``dim``.

        Returns:
            The masked features u = h ⊙ m, of the shape of ``features``.

        Raises:
            UserError: the masked dimension is not of size D, or the features are no floating-point
                tensor.
        """
        dims, dim = self.logits.numel(), self.dim
        if not features.is_floating_point():
            raise UserError(f"features of type {features.dtype}: must be floating-point")
        if not -features.dim() <= dim < features.dim() or features.shape[dim] != dims:
            raise UserError(
                f"features of shape {tuple(features.shape)}: dimension {dim} must have size "
                f"{dims}; another one can be given to the mask as dim="
            )
        mask = self.mask().view([-1] + [1] * (features.dim() - 1 - dim % features.dim()))
        product = features * mask
        if torch.is_autocast_enabled(features.device.type):
            return product
        return product.to(features.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DimensionalMask":
        before = self.logits.data
        super()._apply(fn, recurse)
        if self.logits.dtype not in (torch.float32, torch.float64):
            self.logits.data = before.to(self.logits.device)
        return self

    def get_extra_state(self) -> Tensor:
        return torch.tensor(KINDS.index(self.kind))

    def set_extra_state(self, state: Tensor) -> None:
        if KINDS[int(state)] != self.kind:
            raise UserError(f"kind={self.kind}: the state is that of a {KINDS[int(state)]} mask")

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # states of version 0.1.0 have logits only
        state_dict.setdefault(f"{prefix}_extra_state", self.get_extra_state())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"dims={self.logits.numel()}, kind={self.kind}, dim={self.dim}"
