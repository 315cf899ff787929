"""Accuracy when only some feature dimensions are kept: MetaMask's motivating experiment.

An *order* of the dimensions stands for a series of nested subsets: its first 10 %, its first 20 %,
and so on. Similarities and the ridge solution of one subset extend those of the smaller one, so a
series costs little more than its largest member.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import linalg, stats
from tqdm import tqdm

from metamask_solo.analysis.measures import Array, IntArray
from metamask_solo.evaluation.knn import DEFAULT_K, DEFAULT_TEMPERATURE, vote

RATES = tuple(tenths / 10 for tenths in range(1, 11))
# penalties that the ridge may take, in units of N × mean variance of a dimension; a fixed weak one
# overfits with all dimensions, and then any subset looks better
PENALTIES = tuple(10.0**exponent for exponent in range(2, -11, -1))
WITHOUT_GAIN = 2  # so many weaker penalties in a row that are better for no subset: none follows
ERROR_BLOCKS = 40  # of the images of a held-out gain
SUBSET_PROBES = {"knn": "kNN", "ridge": "ridge"}
Hits = NDArray[np.bool_]


@dataclass(frozen=True)
class Labelled:
    """Features (N, D), float32, and labels (N,), 0 to C − 1."""

    features: Array
    labels: IntArray


def cuts_of(dims: int) -> list[int]:
    """Numbers of dimensions that ``RATES`` stand for, at least 1 each."""
    return [max(1, round(rate * dims)) for rate in RATES]


def knn_hits_along(train: Labelled, val: Labelled, order: IntArray, cuts: list[int]) -> Hits:
    """What the cosine kNN gets right on the first ``cuts`` dimensions of ``order``.

    In double precision: features that all point nearly the same way differ in what single precision
    rounds off.

    Returns:
        Whether each image of ``val`` is classified correctly, shape (len(cuts), N).
    """
    bank, queries = (s.features[:, order].astype(np.float64) for s in (train, val))
    labels = torch.as_tensor(train.labels)
    k, classes = min(DEFAULT_K, len(bank)), int(labels.max()) + 1
    products = np.zeros((len(queries), len(bank)))
    squares = [np.full((len(split), 1), np.finfo(float).tiny) for split in (queries, bank)]
    hits = []
    for start, stop in pairwise([0, *cuts]):
        parts = [split[:, start:stop] for split in (queries, bank)]
        products += parts[0] @ parts[1].T
        squares = [
            before + np.square(part).sum(axis=1, keepdims=True)
            for before, part in zip(squares, parts, strict=True)
        ]
        cosine = products / np.sqrt(squares[0]) / np.sqrt(squares[1]).T
        votes = vote(torch.from_numpy(cosine), labels, k, DEFAULT_TEMPERATURE, classes)
        hits.append(votes.argmax(dim=1).numpy() == val.labels)
    return np.stack(hits)


class NestedRidge:
    """Ridge regressions of one-hot labels on centred features, for nested sets of dimensions.

    The moments are those of all dimensions, computed once. Features are not scaled dimension by
    dimension, since that would undo a mask. The unit of ``PENALTIES`` is the mean variance of a
    dimension.
    """

    def __init__(self, train: Labelled):
        self.count = len(train.labels)
        classes = int(train.labels.max()) + 1
        self.mean = train.features.mean(axis=0, dtype=np.float64)
        centred = train.features - self.mean
        self.covariance = centred.T @ centred / self.count
        self.cross = centred.T @ np.eye(classes)[train.labels] / self.count
        self.prior = np.bincount(train.labels, minlength=classes) / self.count
        self.unit = float(np.diag(self.covariance).mean()) or 1.0

    def weights(self, order: IntArray, cuts: list[int]) -> list[Array]:
        """Weights (cut, C) of the regression on the first ``cuts`` dimensions of ``order``.

        Each subset has the penalty of ``PENALTIES`` with the smallest error of generalised
        cross-validation (Golub, Heath and Wahba, 1979) on the training images, the strongest of
        equal ones: mean squared residual / (1 − degrees of freedom / N)². The search goes from the
        strongest on, and ends after ``WITHOUT_GAIN`` that are better for no subset.

        The leading block of a Cholesky factor is the factor of the leading block, and the same
        holds of its inverse, so one factorisation serves all subsets.
        """
        covariance, cross = self.covariance[np.ix_(order, order)], self.cross[order]
        label_variance = 1 - float(self.prior @ self.prior)
        weights: list[Array] = [np.zeros((cut, len(self.prior))) for cut in cuts]
        errors = np.full(len(cuts), np.inf)
        without_gain = 0
        for strength in PENALTIES:
            if without_gain == WITHOUT_GAIN:
                break
            without_gain += 1
            penalty = strength * self.unit
            factor = linalg.cholesky(covariance + penalty * np.eye(len(order)), lower=True)
            inverse, _ = linalg.lapack.dtrtri(factor, lower=1)
            half_solved = inverse @ cross
            traces = np.square(inverse).sum(axis=1).cumsum()  # of the inverse of each leading block
            for index, cut in enumerate(cuts):
                weight = inverse[:cut, :cut].T @ half_solved[:cut]
                explained = np.sum(weight * cross[:cut]) + penalty * np.sum(weight**2)
                residual = max(0.0, label_variance - float(explained))
                left = 1 - (1 + cut - penalty * traces[cut - 1]) / self.count
                error = residual / left**2 if left > 0 else np.inf
                if error < errors[index]:
                    weights[index], errors[index], without_gain = weight, error, 0
        return weights

    def hits_along(self, val: Labelled, order: IntArray, cuts: list[int]) -> Hits:
        """What the regression as a classifier gets right, as :func:`knn_hits_along`."""
        centred = (val.features - self.mean)[:, order]
        scores = [centred[:, : len(w)] @ w + self.prior for w in self.weights(order, cuts)]
        return np.stack([of.argmax(axis=1) == val.labels for of in scores])


@dataclass(frozen=True)
class SubsetCurves:
    """Accuracies of one probe at ``RATES``, 0 to 1.

    Attributes:
        full: with every dimension.
        draws: with random dimensions, shape (draws, rates).
        top, bottom: with those of the largest and smallest |mask|, shape (rates,); None without a
            mask, or with one that is the same for all dimensions.
        gain, gain_error: of :func:`held_out_gain`.
    """

    full: float
    draws: Array
    top: Array | None
    bottom: Array | None
    gain: float
    gain_error: float

    @property
    def share_beating_full(self) -> Array:
        """Share of the random draws that beat the full representation, shape (rates,)."""
        return np.mean(self.draws > self.full, axis=0)


def subset_curves(
    train: Labelled,
    val: Labelled,
    mask: Array | None,
    draws: int,
    rng: np.random.Generator,
) -> dict[str, SubsetCurves]:
    """Runs the experiment on the plain features with both probes, on the same random subsets.

    Args:
        mask: shape (D,), or None. It only ranks the dimensions, by |m|.
        draws: number of random orders of the dimensions.

    Returns:
        Curves of the probes ``knn`` and ``ridge``.
    """
    dims = train.features.shape[1]
    cuts, regression = cuts_of(dims), NestedRidge(train)
    orders = [rng.permutation(dims) for _ in range(draws)]
    if mask is not None and np.ptp(np.abs(mask)) > 0:
        falling = np.argsort(-np.abs(mask), kind="stable")
        orders += [falling, falling[::-1]]
    hits: dict[str, list[Hits]] = {probe: [] for probe in SUBSET_PROBES}
    for order in tqdm(orders, desc="subsets", leave=False):
        hits["knn"].append(knn_hits_along(train, val, order, cuts))
        hits["ridge"].append(regression.hits_along(val, order, cuts))
    return {probe: _curves(np.stack(of), draws, val.labels) for probe, of in hits.items()}


def _curves(hits: Hits, draws: int, labels: IntArray) -> SubsetCurves:
    """Curves from (orders, rates, N) booleans, the ranked orders after the random ones."""
    hits[:, -1] = hits[0, -1]  # every order ends in the same full set, up to rounding
    accuracy = hits.mean(axis=2)
    top, bottom = accuracy[draws:] if len(accuracy) > draws else (None, None)
    gain, gain_error = held_out_gain(hits[:draws], labels)
    return SubsetCurves(float(accuracy[0, -1]), accuracy[:draws], top, bottom, gain, gain_error)


def held_out_gain(hits: Hits, labels: IntArray) -> tuple[float, float]:
    """Accuracy that the best subset gains over the full set, free of the bias of choosing it.

    The best draw on one half of each class is compared with the full set on the other half, then
    the other way round. A half is what comes first, or last, in the order of the images:
    neighbours may be alike (frames of a film, an image and its mirror image), and with one of
    each pair in either half, nothing would be held out. The error is that of single images, or of
    the means of ``ERROR_BLOCKS`` blocks of neighbours where this is larger.

    Args:
        hits: shape (draws, rates, N); the last rate is the full set.
        labels: shape (N,).

    Returns:
        The mean of both gains, and its standard error.
    """
    half = np.zeros(len(labels), dtype=int)
    for label in np.unique(labels):
        images = np.flatnonzero(labels == label)
        half[images[(len(images) + 1) // 2 :]] = 1
    full, subsets = hits[0, -1], hits.reshape(-1, hits.shape[2])
    differences = np.zeros(len(full))
    for choosing in (0, 1):
        best = subsets[:, half == choosing].mean(axis=1).argmax()
        held_out = half != choosing
        differences[held_out] = subsets[best, held_out].astype(float) - full[held_out]
    neighbours = differences[np.lexsort((labels, half))]  # of each half and class: in their order
    parts = np.array_split(neighbours, min(ERROR_BLOCKS, len(neighbours)))
    error = max(stats.sem(differences), stats.sem([part.mean() for part in parts]))
    return float(differences.mean()), float(error)
