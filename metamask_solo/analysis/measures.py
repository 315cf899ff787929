"""Measures of redundancy and of what each feature dimension tells. Pure functions on arrays."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import linalg, stats

from metamask_solo.evaluation.features import effective_rank, second_moments

Array = NDArray[np.floating]
IntArray = NDArray[np.integer]


@dataclass(frozen=True)
class Redundancy:
    """How much the dimensions of N × D features repeat each other.

    Attributes:
        constant_dims: number of dimensions that do not vary.
        off_diagonal_energy: mean squared correlation of two different dimensions that vary, 0 to
            1: the term that the redundancy-reduction loss pushes to 0. Scaling a dimension leaves
            it as it is, and so does a mask without zeros.
        rankme: effective rank, 1 to D, 0 if every feature is 0 (:func:`effective_rank`).
        singular_values: of the features (not centred), largest first, shape (D,).
        correlation: of the dimensions, shape (D, D); 0 in the rows of a constant one.
    """

    constant_dims: int
    off_diagonal_energy: float
    rankme: float
    singular_values: Array
    correlation: Array


def redundancy(features: Array, mask: Array | None = None) -> dict[str, Redundancy]:
    """Redundancy of the ``plain`` features (N, D) and, with a mask (D,), of the ``masked`` ones."""
    count = len(features)
    mean = features.mean(axis=0, dtype=np.float64)
    second = second_moments(torch.as_tensor(features)).numpy() / count
    measured = {"plain": _redundancy(count, mean, second)}
    if mask is not None:
        weights = mask.astype(np.float64)
        measured["masked"] = _redundancy(count, mean * weights, second * np.outer(weights, weights))
    return measured


def _redundancy(count: int, mean: Array, second: Array) -> Redundancy:
    """From the mean (D,) and the mean of h hᵀ (D, D) of ``count`` features."""
    covariance = second - np.outer(mean, mean)
    variance = np.diag(covariance)
    # what is left of a constant dimension is the rounding of its second moment
    varies = variance > 1e-10 * np.maximum(np.diag(second), np.finfo(float).tiny)
    scale = np.zeros_like(variance)
    scale[varies] = 1 / np.sqrt(variance[varies])
    correlation = np.clip(covariance * np.outer(scale, scale), -1, 1)
    live = np.count_nonzero(varies)
    pairs = max(1, live * (live - 1))
    return Redundancy(
        constant_dims=int(len(varies) - live),
        off_diagonal_energy=float((np.sum(correlation**2) - live) / pairs) if live > 1 else 0.0,
        rankme=effective_rank(torch.as_tensor(second)),
        singular_values=np.sqrt(np.maximum(linalg.eigvalsh(second)[::-1], 0) * count),
        correlation=correlation,
    )


def explained_share(features: Array, groups: IntArray) -> Array:
    """Share of each dimension's variance that lies between groups of images: η², 0 to 1.

    The effect size of a one-way ANOVA: the same order of dimensions as its F statistic.

    Args:
        features: shape (N, D).
        groups: shape (N,), integers.

    Returns:
        Shape (D,); 0 for a constant dimension.
    """
    names, sizes = np.unique(groups, return_counts=True)
    mean, total = (of(features, axis=0, dtype=np.float64) for of in (np.mean, np.var))
    means = np.stack([features[groups == name].mean(axis=0, dtype=np.float64) for name in names])
    between = np.average((means - mean) ** 2, axis=0, weights=sizes)
    varies = total > 1e-12 * (mean**2 + total)
    share = np.divide(between, total, out=np.zeros_like(total), where=varies)
    return np.clip(share, 0, 1)


def rank_correlation(x: Array, y: Array) -> dict[str, float]:
    """Spearman's ``rho``, its 95 % interval ``low`` to ``high``, and its two-sided ``p``.

    The interval is that of Bonett and Wright (2000), p that of the t approximation. Both treat the
    entries of x and y, shape (D,), as independent of each other.

    Returns:
        NaN where ρ is not defined: fewer than 4 entries, or x or y is constant.
    """
    if len(x) < 4 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return dict.fromkeys(("rho", "low", "high", "p"), math.nan)
    rho, p = map(float, stats.spearmanr(x, y))
    middle = math.atanh(min(max(rho, -1 + 1e-12), 1 - 1e-12))
    margin = 1.96 * math.sqrt((1 + rho**2 / 2) / (len(x) - 3))
    return {
        "rho": rho,
        "low": math.tanh(middle - margin),
        "high": math.tanh(middle + margin),
        "p": p,
    }
