"""The dimensional mask (MetaMask, section 4.2): one learned weight for each feature dimension."""

from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor, nn

from metamask_solo.errors import UserError
from metamask_solo.method import Kind

KINDS: tuple[Kind, ...] = get_args(Kind)
DEFAULT_INITIAL_LOGIT = {"sigmoid": 0.0, "linear": 1.0}


def mask_from_logits(logits: Tensor, kind: Kind | str) -> Tensor:
    """The mask m, shape (D,), of logits a: σ(a) for ``sigmoid``, a itself for ``linear``.

    It has single precision at least, of logits that were saved in a lower one, too.
    """
    if kind not in KINDS:
        raise UserError(f"kind={kind!r}: allowed are {', '.join(KINDS)}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.sigmoid(logits) if kind == "sigmoid" else logits


def nearly_alike(low: float, high: float) -> bool:
    """Whether a mask weighs all dimensions nearly alike.

    Its smallest and its largest weight then differ by less than a tenth of the larger size.
    """
    return not high - low >= 0.1 * max(abs(low), abs(high)) > 0


def mask_statistics(mask: Tensor) -> dict[str, Tensor]:
    """Mean, standard deviation, extremes and effective number of dimensions of a mask.

    The effective number of dimensions is exp(H), with H the entropy of |m| / Σ|m|: D for a
    constant mask, 1 when a single dimension is left, 0 when every entry is zero.

    Args:
        mask: shape (D,).

    Returns:
        Scalars ``mean``, ``std`` (population), ``min``, ``max``, ``effective_dims``.
    """
    mask = mask.detach().cpu().double()  # Apple's GPUs have no double precision
    total = mask.abs().sum()
    effective = torch.special.entr(mask.abs() / total).sum().exp()
    return {
        "mean": mask.mean(),
        "std": mask.std(correction=0),
        "min": mask.min(),
        "max": mask.max(),
        "effective_dims": torch.where(total > 0, effective, 0.0),
    }


class DimensionalMask(nn.Module):
    """Multiplies features by a mask that the meta-update learns (MetaMask, section 4.2).

    The logits are a parameter without ``requires_grad``: only the meta-update, which has their
    gradient in hand, moves them, and DistributedDataParallel skips them. They stay in single
    precision when the model goes to a lower one, in which the steps of a mask would round away.
    The product is computed in the logits' precision and has the features' type, outside of
    autocast. The state holds the kind, too; a mask of another kind does not load it.

    Args:
        dims: number of feature dimensions D.
        kind: ``sigmoid`` or ``linear``.
        initial_logit: where every logit starts; None for 0 (sigmoid, so that m = 0.5) or 1
            (linear, so that m = 1).
        dim: which dimension of the features is masked; -1 the last one, 1 the channels of
            N × D × H × W.
        device: where the logits are.
        dtype: of the logits; None: torch's default. They have single precision at least.

    Raises:
        UserError: another kind.

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
        if kind not in KINDS:
            raise UserError(f"kind={kind!r}: allowed are {', '.join(KINDS)}")
        start = DEFAULT_INITIAL_LOGIT[kind] if initial_logit is None else initial_logit
        dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.kind: Kind = kind
        self.dim = dim
        logits = torch.full((dims,), start, device=device, dtype=dtype)
        self.logits = nn.Parameter(logits, requires_grad=False)

    def mask(self) -> Tensor:
        """The current mask m, shape (D,)."""
        return mask_from_logits(self.logits, self.kind)

    def forward(self, features: Tensor) -> Tensor:
        """Masks features, N × D or any shape with D in the dimension ``dim``.

        Returns:
            The masked features u = h ⊙ m, of the shape of ``features``.

        Raises:
            UserError: the masked dimension is not of size D.
        """
        dims, dim, shape = self.logits.numel(), self.dim, tuple(features.shape)
        if not -len(shape) <= dim < len(shape) or shape[dim] != dims:
            raise UserError(
                f"features of shape {shape}: dimension {dim} must have size {dims}; another one "
                "can be given to the mask as dim="
            )
        product = features * self.mask().view([-1] + [1] * (len(shape) - 1 - dim % len(shape)))
        autocast = torch.is_autocast_enabled(features.device.type)
        whole_numbers = not features.is_floating_point()
        return product if autocast or whole_numbers else product.to(features.dtype)

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

    def extra_repr(self) -> str:
        return f"dims={self.logits.numel()}, kind={self.kind}, dim={self.dim}"
