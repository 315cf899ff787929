"""The dimensional mask (MetaMask, section 4.2): one learned weight for each feature dimension."""

import math

import torch
from torch import Tensor, nn

KINDS = ("sigmoid", "linear")
DEFAULT_INITIAL_LOGIT = {"sigmoid": 0.0, "linear": 1.0}


def mask_from_logits(logits: Tensor, kind: str) -> Tensor:
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
    raise ValueError(f"mask.kind={kind!r}: allowed are {', '.join(KINDS)}")


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
    """Multiplies features by a mask that the meta-update learns.

    The logits are a parameter without ``requires_grad``: the regular training step must neither
    differentiate nor average them (DistributedDataParallel skips them); only the meta-update,
    which has their gradient in hand, moves them.

    Args:
        dims: number of feature dimensions D, at least 1.
        kind: ``sigmoid`` or ``linear``.
        initial_logit: the starting value of every logit; None for 0 (sigmoid, so that m = 0.5)
            or 1 (linear, so that m = 1).
    """

    def __init__(self, dims: int, kind: str = "sigmoid", initial_logit: float | None = None):
        super().__init__()
        if dims < 1:
            raise ValueError(f"dims={dims}: a mask needs at least 1 dimension")
        if kind not in KINDS:
            raise ValueError(f"mask.kind={kind!r}: allowed are {', '.join(KINDS)}")
        if initial_logit is None:
            initial_logit = DEFAULT_INITIAL_LOGIT[kind]
        if not math.isfinite(initial_logit):
            raise ValueError(f"mask.initial_logit={initial_logit}: must be finite")
        self.kind = kind
        self.logits = nn.Parameter(torch.full((dims,), float(initial_logit)), requires_grad=False)

    def mask(self) -> Tensor:
        """The current mask m, shape (D,)."""
        return mask_from_logits(self.logits, self.kind)

    def forward(self, features: Tensor) -> Tensor:
        """Returns the masked features u = h ⊙ m, of the shape N × D of ``features``."""
        return features * self.mask().to(features.dtype)

    def extra_repr(self) -> str:
        return f"dims={self.logits.numel()}, kind={self.kind}"
