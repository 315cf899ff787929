"""Measures of redundancy and of what each feature dimension tells. Pure functions on arrays."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, stats

Array = NDArray[np.floating]
IntArray = NDArray[np.integer]

BLOCK_VALUES = 2**23  # float64 values of a temporary block: 64 MB


@dataclass(frozen=True)
class Moments:
    """First and second moments of N feature vectors.

    ``mean`` has shape (D,), ``second`` is the mean of h hᵀ, shape (D, D), both float64.
    """

    count: int
    mean: Array
    second: Array

    @property
    def covariance(self) -> Array:
        """Population covariance, shape (D, D)."""
        return self.second - np.outer(self.mean, self.mean)

    def masked(self, mask: Array) -> "Moments":
        """The moments of the masked features h ⊙ m, without a second look at the features."""
        return Moments(self.count, self.mean * mask, self.second * np.outer(mask, mask))


def moments(features: Array) -> Moments:
    """Moments of ``features`` (N, D), summed in float64, block by block."""
    count, dims = features.shape
    total, second = np.zeros(dims), np.zeros((dims, dims))
    for rows in blocks(count, dims):
        block = features[rows].astype(np.float64)
        total += block.sum(axis=0)
        second += block.T @ block
    return Moments(count, total / count, second / count)


def blocks(count: int, width: int) -> Iterator[slice]:
    """Slices of ``count`` rows such that rows × ``width`` stays within ``BLOCK_VALUES``."""
    step = max(1, BLOCK_VALUES // max(1, width))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def correlation_matrix(moments: Moments) -> Array:
    """Correlation of the dimensions, shape (D, D); 0 in the rows of a constant dimension."""
    covariance = moments.covariance
    variance = np.diag(covariance).copy()
    # what is left of a constant dimension is the rounding of its second moment
    constant = variance <= 1e-10 * np.maximum(np.diag(moments.second), np.finfo(float).tiny)
    scale = np.zeros_like(variance)
    scale[~constant] = 1 / np.sqrt(variance[~constant])
    return np.clip(covariance * np.outer(scale, scale), -1, 1)


def off_diagonal_energy(correlation: Array) -> float:
    """Mean squared correlation of two different dimensions that are not constant, 0 to 1.

    This is the term that the redundancy-reduction loss pushes to 0. It does not change when a
    dimension is scaled, so a mask without zeros leaves it as it was.
    """
    live = int(np.count_nonzero(np.diag(correlation)))
    if live < 2:
        return 0.0
    squared = correlation**2
    return float((squared.sum() - np.trace(squared)) / (live * (live - 1)))


def off_diagonal_share(covariance: Array) -> float:
    """Off-diagonal part of the squared covariance matrix, 0 (uncorrelated) to 1.

    Unlike :func:`off_diagonal_energy` it weighs a dimension by its variance, so that a mask
    changes it.
    """
    squared = covariance**2
    total = squared.sum()
    return float(1 - np.trace(squared) / total) if total > 0 else 0.0


def singular_values(moments: Moments) -> Array:
    """Singular values of the N × D feature matrix (not centred), largest first, shape (D,)."""
    eigenvalues = linalg.eigvalsh(moments.second)[::-1]
    return np.sqrt(np.maximum(eigenvalues, 0) * moments.count)


def rankme(singular_values: Array) -> float:
    """Effective rank exp(H), with H the entropy of σ / Σσ: 1 to D.

    RankMe (Garrido et al., ICML 2023, arXiv 2210.02885, equation 1). 0 if every value is 0.
    """
    total = singular_values.sum()
    if total <= 0:
        return 0.0
    share = singular_values[singular_values > 0] / total
    return math.exp(-float(np.sum(share * np.log(share))))


def one_hot(labels: IntArray, classes: int) -> Array:
    """Rows of the identity, shape (N, classes)."""
    return np.eye(classes)[labels]


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
        varies = total > 1e-12 * size
        explained = np.sum((design.T @ block) ** 2, axis=0)
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

    The p value is (1 + b) / (1 + permutations), with b the number of random pairings whose |ρ|
    is at least the observed one. The interval holds the middle 95 % of ρ over dimensions drawn
    with replacement. Both treat the dimensions as independent of each other, which redundant
    ones are not: with strong redundancy they are too optimistic.

    Returns:
        None where ρ is not defined: fewer than 3 dimensions, or x or y is constant.
    """
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    rank_x, rank_y = _standard_ranks(x[None]), _standard_ranks(y[None])
    rho = float((rank_x * rank_y).sum())
    exceeding = 0
    for rows in blocks(permutations, 4 * len(x)):
        shuffled = rng.permuted(np.tile(rank_x, (rows.stop - rows.start, 1)), axis=1)
        exceeding += int(np.count_nonzero(np.abs(shuffled @ rank_y[0]) >= abs(rho) - 1e-12))
    draws = []
    for rows in blocks(resamples, 4 * len(x)):
        chosen = rng.integers(len(x), size=(rows.stop - rows.start, len(x)))
        draws.append((_standard_ranks(x[chosen]) * _standard_ranks(y[chosen])).sum(axis=1))
    low, high = np.quantile(np.concatenate(draws), [0.025, 0.975])
    return RankCorrelation(rho, float(low), float(high), (1 + exceeding) / (1 + permutations))


def _standard_ranks(values: Array) -> Array:
    """Ranks along the rows of an (R, D) array, centred and of length 1; 0 for a constant row."""
    ranks = stats.rankdata(values, axis=1)
    ranks -= ranks.mean(axis=1, keepdims=True)
    length = np.linalg.norm(ranks, axis=1, keepdims=True)
    return np.divide(ranks, length, out=np.zeros_like(ranks), where=length > 0)
