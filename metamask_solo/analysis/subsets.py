"""Accuracy when only some feature dimensions are kept: MetaMask's motivating experiment.

An *order* of the dimensions stands for a series of nested subsets: its first 10 %, its first 20 %,
and so on. Similarities and the ridge solution of one subset extend those of the smaller one, so a
series costs little more than its largest member.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from metamask_solo.analysis.measures import Array, IntArray, blocks, one_hot
from metamask_solo.evaluation.knn import DEFAULT_K as KNN_K
from metamask_solo.evaluation.knn import DEFAULT_TEMPERATURE as KNN_TEMPERATURE

RATES = tuple(tenths / 10 for tenths in range(1, 11))
# penalties that the linear probe may take, in units of N × mean variance of a dimension; a fixed
# weak one overfits with all dimensions, and then any subset looks better
PENALTIES = tuple(10.0**exponent for exponent in range(2, -11, -1))
WITHOUT_GAIN = 2  # so many weaker penalties in a row that are better for no subset: none follows
ERROR_BLOCKS = 40  # of the images of a held-out gain


@dataclass(frozen=True)
class Split:
    """Features (N, D), float32, and labels (N,), 0 to C − 1."""

    features: Array
    labels: IntArray

    def take(self, indices: IntArray) -> "Split":
        return Split(self.features[indices], self.labels[indices])

    def masked(self, mask: Array) -> "Split":
        return Split(self.features * mask.astype(self.features.dtype), self.labels)


def cuts_of(dims: int, rates: tuple[float, ...] = RATES) -> list[int]:
    """Numbers of dimensions that the rates stand for, at least 1 each."""
    return [max(1, round(rate * dims)) for rate in rates]


def knn_along(
    train: Split,
    val: Split,
    order: IntArray | slice,
    cuts: list[int],
    k: int = KNN_K,
    temperature: float = KNN_TEMPERATURE,
) -> NDArray[np.bool_]:
    """What the cosine kNN classifier gets right on the first ``cuts`` dimensions of ``order``.

    The k nearest training images vote with weight exp(cosine / temperature). In double precision:
    features that all point nearly the same way differ in what single precision rounds off.

    Args:
        order: indices of dimensions, or ``slice(None)`` for their own order without a copy.
        cuts: increasing numbers of dimensions, the last at most the number in ``order``.

    Returns:
        Whether each image of ``val`` is classified correctly, booleans (len(cuts), N).
    """
    k = min(k, len(train.labels))
    classes = int(train.labels.max()) + 1
    votes_for = one_hot(train.labels, classes)
    bank = train.features[:, order].astype(np.float64)
    bank_length = _lengths(bank, cuts)
    correct = np.zeros((len(cuts), len(val.labels)), dtype=bool)
    for rows in blocks(len(val.labels), 4 * len(bank)):
        queries = val.features[rows][:, order].astype(np.float64)
        query_length = _lengths(queries, cuts)
        products = np.zeros((len(queries), len(bank)))
        for index, (start, stop) in enumerate(pairwise([0, *cuts])):
            products += queries[:, start:stop] @ bank[:, start:stop].T
            cosine = products / bank_length[index]
            nearest = np.argpartition(cosine, -k, axis=1)[:, -k:]
            similar = np.take_along_axis(cosine, nearest, axis=1) / query_length[index][:, None]
            weight = np.exp(similar / temperature)
            votes = np.zeros((len(queries), classes))
            for neighbour in range(k):
                votes += weight[:, neighbour, None] * votes_for[nearest[:, neighbour]]
            correct[index, rows] = votes.argmax(axis=1) == val.labels[rows]
    return correct


def _lengths(features: Array, cuts: list[int]) -> Array:
    """Length of each vector over its first ``cuts`` entries, shape (len(cuts), N)."""
    parts = [features[:, start:stop] for start, stop in pairwise([0, *cuts])]
    squared = np.stack([np.einsum("nd,nd->n", part, part) for part in parts])
    return np.sqrt(np.maximum(squared.cumsum(axis=0), np.finfo(float).tiny))


@dataclass(frozen=True)
class RidgeSystem:
    """What a ridge regression of one-hot labels on centred features is computed from.

    ``covariance`` (D, D) of the features, ``cross`` (D, C) of features and labels; ``scale`` is
    the mean variance of a dimension, the unit of ``PENALTIES``.
    """

    count: int
    mean: Array
    covariance: Array
    cross: Array
    prior: Array
    scale: float


def ridge_system(train: Split) -> RidgeSystem:
    """Builds the moments that all subsets of dimensions share.

    Features are not scaled dimension by dimension, since that would undo a mask.
    """
    count, dims = train.features.shape
    classes = int(train.labels.max()) + 1
    mean = train.features.mean(axis=0, dtype=np.float64)
    covariance, cross = np.zeros((dims, dims)), np.zeros((dims, classes))
    for rows in blocks(count, dims):
        centred = train.features[rows] - mean
        covariance += centred.T @ centred / count
        cross += centred.T @ one_hot(train.labels[rows], classes) / count
    prior = np.bincount(train.labels, minlength=classes) / count
    scale = float(np.diag(covariance).mean())
    return RidgeSystem(count, mean, covariance, cross, prior, scale if scale > 0 else 1.0)


def ridge_along(system: RidgeSystem, order: IntArray, cuts: list[int]) -> list[Array]:
    """Weights of the ridge regression on the first ``cuts`` dimensions of ``order``.

    Each subset has the penalty of ``PENALTIES`` with the smallest error of generalised
    cross-validation (Golub, Heath and Wahba, 1979) on the training images, the strongest of equal
    ones: mean squared residual / (1 − degrees of freedom / N)². The search goes from the strongest
    on, and ends after ``WITHOUT_GAIN`` that are better for no subset.

    The leading block of a Cholesky factor is the factor of the leading block, and the same holds
    of its inverse, so one factorisation serves all subsets.

    Returns:
        An array (cut, C) for each of ``cuts``.
    """
    covariance, cross = system.covariance[np.ix_(order, order)], system.cross[order]
    label_variance = 1 - float(system.prior @ system.prior)
    weights: list[Array] = []
    errors = np.full(len(cuts), np.inf)
    without_gain = 0
    for strength in PENALTIES:
        if without_gain == WITHOUT_GAIN:
            break
        without_gain += 1
        penalty = strength * system.scale
        factor = linalg.cholesky(covariance + penalty * np.eye(len(order)), lower=True)
        inverse, _ = linalg.lapack.dtrtri(factor, lower=1)
        half_solved = inverse @ cross
        traces = np.square(inverse).sum(axis=1).cumsum()  # of the inverse of each leading block
        for index, cut in enumerate(cuts):
            weight = inverse[:cut, :cut].T @ half_solved[:cut]
            explained = np.sum(weight * cross[:cut]) + penalty * np.sum(weight**2)
            residual = max(0.0, label_variance - float(explained))
            left = 1 - (1 + cut - penalty * traces[cut - 1]) / system.count
            error = residual / left**2 if left > 0 else np.inf
            if len(weights) == index:
                weights.append(weight)
            elif error >= errors[index]:
                continue
            weights[index], errors[index], without_gain = weight, error, 0
    return weights


def linear_along(
    system: RidgeSystem, val: Split, order: IntArray, cuts: list[int]
) -> NDArray[np.bool_]:
    """What the ridge classifier gets right on the first ``cuts`` dimensions of ``order``.

    Returns:
        Whether each image of ``val`` is classified correctly, booleans (len(cuts), N).
    """
    weights = ridge_along(system, order, cuts)
    correct = np.zeros((len(cuts), len(val.labels)), dtype=bool)
    for rows in blocks(len(val.labels), 2 * len(order)):
        centred = (val.features[rows] - system.mean)[:, order]
        for index, (cut, weight) in enumerate(zip(cuts, weights, strict=True)):
            scores = centred[:, :cut] @ weight + system.prior
            correct[index, rows] = scores.argmax(axis=1) == val.labels[rows]
    return correct


@dataclass(frozen=True)
class SubsetCurves:
    """Accuracies of one probe at ``RATES``, 0 to 1.

    ``full`` is the accuracy with every dimension; ``random`` has shape (draws, rates); ``top`` and
    ``bottom`` (rates,) keep the dimensions of the largest and smallest |mask|, and are None
    without a mask. ``gain`` and ``gain_error`` are those of :func:`held_out_gain`.
    """

    full: float
    random: Array
    top: Array | None
    bottom: Array | None
    gain: float
    gain_error: float

    @property
    def beating(self) -> NDArray[np.bool_]:
        """Which random draws beat the full representation, shape (draws, rates)."""
        return self.random > self.full


def subset_curves(
    train: Split,
    val: Split,
    mask: Array | None,
    draws: int,
    rng: np.random.Generator,
    advance: Callable[[], object] = lambda: None,
) -> dict[str, SubsetCurves]:
    """Runs the experiment on the plain features with both probes, on the same random subsets.

    Args:
        mask: shape (D,), or None. It only ranks the dimensions, by |m|.
        draws: number of random orders of the dimensions.
        advance: called after each order, for a progress bar.

    Returns:
        Curves of the probes ``knn`` and ``linear``.
    """
    dims = train.features.shape[1]
    cuts = cuts_of(dims)
    system = ridge_system(train)
    orders = [rng.permutation(dims) for _ in range(draws)]
    if mask is not None:
        falling = np.argsort(-np.abs(mask), kind="stable")
        orders += [falling, falling[::-1]]
    knn, linear = [], []
    for order in orders:
        knn.append(knn_along(train, val, order, cuts))
        linear.append(linear_along(system, val, order, cuts))
        advance()
    probes = {"knn": np.stack(knn), "linear": np.stack(linear)}
    return {name: _curves(correct, draws, val.labels) for name, correct in probes.items()}


def _curves(correct: NDArray[np.bool_], draws: int, labels: IntArray) -> SubsetCurves:
    """Curves from (orders, rates, N) booleans, the ranked orders after the random ones."""
    correct[:, -1] = correct[0, -1]  # every order ends in the same full set, up to rounding
    accuracy = correct.mean(axis=2)
    top, bottom = accuracy[draws:] if len(accuracy) > draws else (None, None)
    gain, gain_error = held_out_gain(correct[:draws], labels)
    return SubsetCurves(float(accuracy[0, -1]), accuracy[:draws], top, bottom, gain, gain_error)


def held_out_gain(correct: NDArray[np.bool_], labels: IntArray) -> tuple[float, float]:
    """Accuracy that the best subset gains over the full set, free of the bias of choosing it.

    The best draw on one half of each class is compared with the full set on the other half, then
    the other way round. A half is what comes first, or last, in the order of the images:
    neighbours may be alike (frames of a film, an image and its mirror image), and with one of
    each pair in either half, nothing would be held out. The error is that of single images, or of
    the means of ``ERROR_BLOCKS`` blocks of neighbours where this is larger.

    Args:
        correct: shape (draws, rates, N); the last rate is the full set.
        labels: shape (N,).

    Returns:
        The mean of both gains, and its standard error.
    """
    half = np.zeros(len(labels), dtype=int)
    for label in np.unique(labels):
        images = np.flatnonzero(labels == label)
        half[images[(len(images) + 1) // 2 :]] = 1
    full = correct[0, -1]
    subsets = correct.reshape(-1, correct.shape[2])
    differences = np.zeros(len(full))
    for chosen_on in (0, 1):
        best = subsets[:, half == chosen_on].mean(axis=1).argmax()
        held_out = half != chosen_on
        differences[held_out] = subsets[best, held_out].astype(float) - full[held_out]
    neighbours = differences[np.lexsort((labels, half))]  # in each of both: their own order
    blocks_of = np.array_split(neighbours, min(ERROR_BLOCKS, len(neighbours)))
    errors = [_error(differences), _error(np.array([block.mean() for block in blocks_of]))]
    return float(differences.mean()), max(errors)


def _error(values: Array) -> float:
    """Standard error of the mean of independent values."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
