"""The losses written down as the papers define them, entry by entry."""

import torch
from torch import nn


def plain_barlow(z1: torch.Tensor, z2: torch.Tensor, lamb: float) -> torch.Tensor:
    """Barlow Twins from its definition, with the variance offset of BatchNorm."""
    z1, z2 = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (z1, z2))
    total = torch.zeros((), dtype=z1.dtype)
    for i in range(z1.shape[1]):
        for j in range(z1.shape[1]):
            c = (z1[:, i] * z2[:, j]).mean()
            total = total + ((c - 1) ** 2 if i == j else lamb * c**2)
    return total


def plain_nt_xent(z1: torch.Tensor, z2: torch.Tensor, temperature: float) -> torch.Tensor:
    z = nn.functional.normalize(torch.cat([z1, z2]), dim=1)
    n = len(z1)
    total = torch.zeros((), dtype=z.dtype)
    for i in range(2 * n):
        positive = (z[i] @ z[(i + n) % (2 * n)] / temperature).exp()
        others = sum((z[i] @ z[j] / temperature).exp() for j in range(2 * n) if j != i)
        total = total - torch.log(positive / others)
    return total / (2 * n)
