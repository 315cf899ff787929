"""The contrastive loss in the form that the meta-update differentiates."""

import torch
import torch.nn.functional as F
from torch import Tensor


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """NT-Xent of two views of one batch (SimCLR, equation 1).

    The same value as solo-learn's ``simclr_loss_func`` on one process. That one gathers the other
    processes' samples through an autograd function which neither forward mode nor ``torch.func``
    can differentiate, and the meta-update needs both; so it uses each process's own batch.

    Args:
        z1, z2: projections of the two views, N × d each, N ≥ 2.
        temperature: above 0.

    Returns:
        The mean over the 2N samples, a scalar.
    """
    z = F.normalize(torch.cat((z1, z2)), dim=-1)
    similarity = z @ z.t() / temperature
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = torch.arange(len(z), device=z.device).roll(len(z1))
    return F.cross_entropy(similarity.masked_fill(itself, float("-inf")), positive)
