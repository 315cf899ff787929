"""The two losses of MetaMask, on the batch of all processes: Barlow Twins and NT-Xent.

Under DistributedDataParallel each process has its share of the batch, and afterwards the gradients
are averaged. Here every process computes the loss of the *whole* batch, and its gradient is such
that this average is the gradient of that loss: one file means one objective, whatever the number
of processes. On one process, or without ``torch.distributed``, nothing is exchanged.

Both are computed in single precision (or double, if the projections are), also under autocast.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

VARIANCE_OFFSET = 1e-5  # that of BatchNorm, which solo-learn standardises with


def barlow_twins(
    z1: Tensor, z2: Tensor, lamb: float = 5e-3, scale_loss: float = 1.0, *, gather: bool = True
) -> Tensor:
    """The redundancy-reduction loss of two views (Barlow Twins, Zbontar et al. 2021, equation 1).

    With c the cross-correlation of the standardised projections, D × D, it is
    ``scale_loss`` · (Σᵢ (cᵢᵢ − 1)² + ``lamb`` · Σ_{i≠j} cᵢⱼ²).

    Args:
        z1, z2: projections of the two views, N × D each. Under ``torch.distributed`` each process
            gives as many rows, and mean, deviation and correlation are those of all rows.
        lamb: weight λ of the off-diagonal part.
        scale_loss: factor of the whole.
        gather: False for the loss of this process's rows alone.

    Returns:
        A scalar, the same on each process.

    Raises:
        ValueError: the projections do not fit each other or have fewer than two rows.

    Example:
        >>> z = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
        >>> round(float(barlow_twins(z, z)), 3)  # two dimensions without correlation
        0.0
        >>> round(float(barlow_twins(z, -z)), 3)  # each is the other's opposite: (−1 − 1)² · 2
        8.0
    """
    z1, z2 = _whole_batch(z1, z2, gather)
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = (F.batch_norm(z, None, None, training=True, eps=VARIANCE_OFFSET) for z in (z1, z2))
        n, dims = z1.shape
        diagonal = (z1 * z2).sum(0) / n
        # the sum of squares of all entries, less the diagonal's: no mask of D × D is needed, and
        # with fewer rows than dimensions no matrix of that size either (‖z₁ᵀz₂‖² = ⟨z₁z₁ᵀ, z₂z₂ᵀ⟩)
        if n < dims:
            squares = ((z1 @ z1.t()) * (z2 @ z2.t())).sum() / n**2
        else:
            squares = (z1.t() @ z2 / n).pow(2).sum()
        off_diagonal = squares - diagonal.pow(2).sum()
        return scale_loss * ((diagonal - 1).pow(2).sum() + lamb * off_diagonal)


def nt_xent(z1: Tensor, z2: Tensor, temperature: float, *, gather: bool = True) -> Tensor:
    """NT-Xent of two views of one batch (SimCLR, Chen et al. 2020, equation 1).

    The mean over all 2N samples of the cross-entropy that finds its other view among the 2N − 1
    others, by the cosine divided by ``temperature``.

    Args:
        z1, z2: projections of the two views, N × d each. Under ``torch.distributed`` each process
            gives as many rows, and the negatives are those of all processes.
        temperature: above 0.
        gather: False for the loss of this process's rows alone; it has a forward-mode derivative,
            which what crosses processes has not.

    Returns:
        A scalar, the same on each process.

    Raises:
        ValueError: the projections do not fit each other or have fewer than two rows, or the
            temperature is not above 0.

    Example:
        >>> z = torch.eye(2)
        >>> round(float(nt_xent(z, z, temperature=0.5)), 4)  # log(1 + 2 · exp(−1 / 0.5))
        0.2395
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0")
    z1, z2 = _whole_batch(z1, z2, gather)
    with torch.autocast(z1.device.type, enabled=False):
        z = F.normalize(torch.cat((z1, z2)), dim=-1)
        similarity = z @ z.t() / temperature
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        positive = torch.arange(len(z), device=z.device).roll(len(z1))
        return F.cross_entropy(similarity.masked_fill(itself, float("-inf")), positive)


def _whole_batch(z1: Tensor, z2: Tensor, gather: bool) -> tuple[Tensor, Tensor]:
    """Both projections of all processes, in single precision or double."""
    if z1.dim() != 2 or z1.shape != z2.shape:
        raise ValueError(
            f"z1 is {tuple(z1.shape)}, z2 {tuple(z2.shape)}: both must be N × D, two views of the "
            "same images in the same order"
        )
    if z1.dtype != torch.float64:
        z1, z2 = z1.float(), z2.float()
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if gather and distributed and torch.distributed.get_world_size() > 1:
        z1, z2 = _Gather.apply(torch.stack((z1, z2))).unbind()
    if len(z1) < 2:
        raise ValueError(f"a batch of {len(z1)}: both losses compare images, give at least 2")
    return z1, z2


class _Gather(torch.autograd.Function):
    """The rows (dimension 1) of all processes, in the order of their ranks.

    Its gradient is the sum of what all processes have for these rows: that of the *sum* of their
    losses. DistributedDataParallel's mean makes of it that of the mean of their losses.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        total = gradient.contiguous().clone()
        torch.distributed.all_reduce(total)
        chunks = total.chunk(torch.distributed.get_world_size(), dim=1)
        return chunks[torch.distributed.get_rank()]
