"""Measures of redundancy and of what each feature dimension tells. Pure functions on arrays."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import linalg, stats

from metamask_solo.evaluation.features import effective_rank, second_moments

Array = NDArray[np.floating]
IntArray = NDArray[np.integer]

BLOCK_VALUES = 2**23  # float64 values of a temporary block: 64 MB


def blocks(count: int, width: int) -> Iterator[slice]:
    """Slices of ``count`` rows such that rows × ``width`` stays within ``BLOCK_VALUES``."""
    step = max(1, BLOCK_VALUES // max(1, width))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


@dataclass(frozen=True)
class Redundancy:
    """How much the dimensions of N × D features repeat each other.

    Attributes:
        constant_dims: number of dimensions that do not vary.
        off_diagonal_energy: mean squared correlation of two different dimensions that vary, 0 to
            1: the term that the redundancy-reduction loss pushes to 0. Scaling a dimension leaves
            it as it is, and so does a mask without zeros.
        off_diagonal_share: off-diagonal part of the squared covariance matrix, 0 (uncorrelated) to
            1. It weighs a dimension by its variance, so a mask changes it.
        rankme: effective rank, 1 to D, 0 if every feature is 0 (:func:`effective_rank`).
        singular_values: of the features (not centred), largest first, shape (D,).
        correlation: of the dimensions, shape (D, D); 0 in the rows of a constant one.
    """

    constant_dims: int
    off_diagonal_energy: float
    off_diagonal_share: float
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
    variance = np.diag(covariance).copy()
    # what is left of a constant dimension is the rounding of its second moment
    varies = variance > 1e-10 * np.maximum(np.diag(second), np.finfo(float).tiny)
    scale = np.zeros_like(variance)
    scale[varies] = 1 / np.sqrt(variance[varies])
    correlation = np.clip(covariance * np.outer(scale, scale), -1, 1)
    live = np.count_nonzero(varies)
    pairs = max(1, live * (live - 1))
    total = np.sum(covariance**2)
    return Redundancy(
        constant_dims=int(len(varies) - live),
        off_diagonal_energy=float((np.sum(correlation**2) - live) / pairs) if live > 1 else 0.0,
        off_diagonal_share=float(1 - np.sum(variance**2) / total) if total > 0 else 0.0,
        rankme=effective_rank(torch.as_tensor(second)),
        singular_values=np.sqrt(np.maximum(linalg.eigvalsh(second)[::-1], 0) * count),
        correlation=correlation,
    )


def explained_share(features: Array, predictors: Array) -> Array:
    """Share of each dimension's variance that a linear function of the predictors explains.

    With one-hot class labels this is η², the effect size of a one-way ANOVA: the same order
    of dimensions as its F statistic, on a scale from 0 to 1.

    Args:
        features: shape (N, D).
        predictors: shape (N, P); an intercept is added.

    Returns:
        R² of each dimension, shape (D,), 0 to 1; 0 for a constant dimension.
    """
    design = linalg.orth(predictors - predictors.mean(axis=0))
    share = np.zeros(features.shape[1])
    for columns in blocks(features.shape[1], features.shape[0]):
        block = features[:, columns].astype(np.float64)
        size = np.sum(block**2, axis=0)
        block -= block.mean(axis=0)
        total = np.sum(block**2, axis=0)
        explained = np.sum((design.T @ block) ** 2, axis=0)
        varies = total > 1e-12 * size
        share[columns] = np.divide(explained, total, out=np.zeros_like(total), where=varies)
    return np.clip(share, 0, 1)


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's ρ with a 95 % bootstrap interval and a two-sided permutation p value."""

    rho: float
    low: float
    high: float
    p_value: float


def rank_correlation(
    x: Array,
    y: Array,
    rng: np.random.Generator,
    permutations: int = 9_999,
    resamples: int = 2_000,
) -> RankCorrelation | None:
    """Spearman's rank correlation of two properties of the D dimensions.

    The p value is (1 + b) / (1 + permutations), with b the number of random pairings whose |ρ| is
    at least the observed one. The interval holds the middle 95 % of ρ over dimensions drawn with
    replacement. Both treat the dimensions as independent of each other, which redundant ones are
    not: with strong redundancy they are too optimistic.

    Returns:
        None where ρ is not defined: fewer than 3 dimensions, or x or y is constant.
    """
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    rank_x, rank_y = _standard_ranks(x), _standard_ranks(y)
    rho = float(rank_x @ rank_y)
    shuffled = [abs(rng.permutation(rank_x) @ rank_y) for _ in range(permutations)]
    exceeding = np.count_nonzero(np.array(shuffled) >= abs(rho) - 1e-12)
    draws = [rng.integers(len(x), size=len(x)) for _ in range(resamples)]
    resampled = [_standard_ranks(x[draw]) @ _standard_ranks(y[draw]) for draw in draws]
    low, high = np.quantile(resampled, [0.025, 0.975])
    return RankCorrelation(rho, float(low), float(high), (1 + exceeding) / (1 + permutations))


def _standard_ranks(values: Array) -> Array:
    """Ranks of (D,) values, centred and of length 1; 0 if all are equal."""
    ranks = stats.rankdata(values)
    ranks -= ranks.mean()
    return ranks / (np.linalg.norm(ranks) or 1.0)
