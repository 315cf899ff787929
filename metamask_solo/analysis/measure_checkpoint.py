"""All that is measured of one checkpoint, from its features to the numbers of a report."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from metamask_solo.analysis.bounds import Bounds, balanced_indices, bounds
from metamask_solo.analysis.measures import (
    Array,
    IntArray,
    RankCorrelation,
    Redundancy,
    explained_share,
    rank_correlation,
    redundancy,
)
from metamask_solo.analysis.subsets import (
    RATES,
    Labelled,
    NestedRidge,
    SubsetCurves,
    cuts_of,
    knn_hits_along,
    subset_curves,
)
from metamask_solo.evaluation.features import is_collapsed
from metamask_solo.evaluation.knn import knn_hits
from metamask_solo.evaluation.linear import linear_probe
from metamask_solo.method.mask import mask_statistics

SUBSET_TRAIN, SUBSET_VAL = 5_000, 2_000  # images of the subset experiment, at most
BOUNDS_IMAGES = 2_000
PROBES = {"knn": "kNN", "linear": "linear"}
Accuracies = dict[str, dict[str, float]]  # of untrained features, by their name and the probe


@dataclass(frozen=True)
class Background:
    """What lies behind the object of each training image, in the order of its features.

    ``photograph`` holds codes (N,), 0 to P − 1; ``colour`` the mean colour (N, 3), 0 to 1.
    """

    photograph: IntArray
    colour: Array


@dataclass(frozen=True)
class CheckpointFeatures:
    """The plain features of one checkpoint, and what it knows about its mask.

    Attributes:
        train: None where the features cannot be used (``notes`` says why).
        val: None where the images have no labels; those of ``train`` are then not looked at.
        mask: shape (D,), or None for a method without one.
        history: optimiser steps (T,) and masks (T, D), or None.
        views: features of two augmented views of the images of the bounds, each (B, D), or None.
        notes: what a reader of the report must know of this checkpoint, one sentence each.
    """

    name: str
    path: str
    method: str | None
    train: Labelled | None
    val: Labelled | None
    mask: Array | None = None
    history: tuple[IntArray, Array] | None = None
    views: tuple[Array, Array] | None = None
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Accuracy:
    """Of one probe, 0 to 1; the difference is masked minus plain, with its 95 % interval."""

    plain: float
    masked: float | None = None
    difference: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Subsets:
    """The subset experiment, and the accuracies of untrained features on the same images."""

    train_images: int
    val_images: int
    kept_dims: list[int]
    curves: dict[str, SubsetCurves]
    untrained: Accuracies
    rates: tuple[float, ...] = RATES


@dataclass(frozen=True)
class Information:
    """What each dimension tells, the mean of those of the lowest and highest weights |m|."""

    values: Array
    lowest_tenth: float
    highest_tenth: float
    rank_correlation: RankCorrelation | None


@dataclass(frozen=True)
class MaskMeasures:
    """A mask (D,), its way over training, and what its dimensions tell, by what they tell of.

    Attributes:
        history: a row of statistics for each optimiser ``step`` that was noted; empty for none.
        masks: the masks at these steps, shape (T, D).
    """

    values: Array
    statistics: dict[str, float]
    history: list[dict[str, float]]
    masks: Array
    information: dict[str, Information]


@dataclass(frozen=True, kw_only=True)
class Measures:
    """All measures of one checkpoint; None for what could not be measured.

    Measures by ``plain`` and ``masked`` have the latter where there is a mask.
    """

    name: str
    path: str
    method: str | None
    dims: int | None
    redundancy: dict[str, Redundancy] | None
    accuracy: dict[str, Accuracy] | None
    subsets: Subsets | None
    bounds: dict[str, Bounds] | None
    bounds_images: int
    positives: str
    mask: MaskMeasures | None
    notes: list[str]


def measure_checkpoint(
    subject: CheckpointFeatures,
    background: Background | None,
    seed: int,
    draws: int,
    advance: Callable[[], object] = lambda: None,
    untrained: dict[str, tuple[Labelled, Labelled]] | None = None,
) -> Measures:
    """Measures one checkpoint: all that its features, labels and mask allow.

    Args:
        draws: number of random subsets at each rate.
        advance: called after each order of dimensions of the subset experiment.
        untrained: other features of the same images, whose accuracies stand beside those of the
            subset experiment.
    """
    train, val, mask, notes = subject.train, subject.val, subject.mask, list(subject.notes)
    both = None if train is None or val is None else (train, val)
    if train is not None and is_collapsed(torch.as_tensor(train.features)):
        notes.append("all features are (nearly) the same: the representation has collapsed")
    within: dict[str, Bounds] | None = None
    images = bounds_images(val.labels, seed) if val is not None else np.zeros(0, dtype=int)
    if val is not None:
        try:
            within = _bounds(subject, images)
        except ValueError as error:
            notes.append(f"no bounds: {error}")
    return Measures(
        name=subject.name,
        path=subject.path,
        method=subject.method,
        dims=None if train is None else train.features.shape[1],
        redundancy=None if train is None else redundancy(train.features, mask),
        accuracy=None if both is None else _accuracy(*both, mask),
        subsets=None if both is None else _subsets(both, mask, seed, draws, advance, untrained),
        bounds=within,
        bounds_images=len(images),
        positives="same class" if subject.views is None else "two views",
        mask=None if mask is None else _mask(mask, subject.history, train, background, seed),
        notes=notes,
    )


def accuracies(train: Labelled, val: Labelled) -> dict[str, NDArray[np.bool_]]:
    """Which validation images each of ``PROBES`` gets right with all dimensions."""
    x, y = torch.as_tensor(train.features), torch.as_tensor(train.labels)
    val_x, val_y = torch.as_tensor(val.features), torch.as_tensor(val.labels)
    knn, _ = knn_hits(x, y, val_x, val_y)
    probe = linear_probe(x, y, val_x, val_y)
    return {"knn": knn.numpy(), "linear": probe.correct.numpy()}


def bounds_images(labels: IntArray, seed: int) -> IntArray:
    """Indices of the validation images of the bounds: classes of equal size."""
    return balanced_indices(labels, BOUNDS_IMAGES, seed)


def _accuracy(train: Labelled, val: Labelled, mask: Array | None) -> dict[str, Accuracy]:
    """Both probes on all images and all dimensions, and what the mask adds to each."""
    plain = accuracies(train, val)
    if mask is None:
        return {name: Accuracy(float(hits.mean())) for name, hits in plain.items()}
    masked = accuracies(_masked(train, mask), _masked(val, mask))
    return {
        name: Accuracy(
            float(plain[name].mean()), float(hits.mean()), paired_difference(hits, plain[name])
        )
        for name, hits in masked.items()
    }


def _masked(split: Labelled, mask: Array) -> Labelled:
    return Labelled(split.features * mask.astype(split.features.dtype), split.labels)


def paired_difference(
    hits: NDArray[np.bool_], before: NDArray[np.bool_]
) -> tuple[float, float, float]:
    """Accuracy gained on the same images, with the 95 % interval of Bonett and Price (2012).

    They add an image to either kind of change, so that the interval holds for few images and few
    changes, too: where no image changed, the difference may still not be 0.
    """
    count = len(hits) + 2
    gained = (np.count_nonzero(hits & ~before) + 1) / count
    lost = (np.count_nonzero(before & ~hits) + 1) / count
    middle = gained - lost
    margin = 1.96 * math.sqrt((gained + lost - middle**2) / count)
    mean = float(hits.mean() - before.mean())
    return mean, max(-1.0, middle - margin), min(1.0, middle + margin)


def _subsets(
    splits: tuple[Labelled, Labelled],
    mask: Array | None,
    seed: int,
    draws: int,
    advance: Callable[[], object],
    untrained: dict[str, tuple[Labelled, Labelled]] | None,
) -> Subsets:
    # matrices of this size gain nothing from threads, and one thread is the same everywhere
    with threadpool_limits(limits=1):
        train, val = _sample(splits, seed)
        rng = np.random.default_rng(seed)
        curves = subset_curves(train, val, mask, draws, rng, advance)
        others = {}
        for name, features in (untrained or {}).items():
            other_train, other_val = _sample(features, seed)
            dims = other_train.features.shape[1]
            every, cuts = np.arange(dims), [dims]
            knn = knn_hits_along(other_train, other_val, every, cuts)
            ridge = NestedRidge(other_train).hits_along(other_val, every, cuts)
            others[name] = {"knn": float(knn.mean()), "ridge": float(ridge.mean())}
    cuts = cuts_of(train.features.shape[1])
    return Subsets(len(train.labels), len(val.labels), cuts, curves, others)


def _sample(splits: tuple[Labelled, Labelled], seed: int) -> tuple[Labelled, Labelled]:
    """The images of the subset experiment."""
    drawn = []
    for split, limit in zip(splits, (SUBSET_TRAIN, SUBSET_VAL), strict=True):
        chosen = np.sort(np.random.default_rng(seed).permutation(len(split.labels))[:limit])
        drawn.append(Labelled(split.features[chosen], split.labels[chosen]))
    return drawn[0], drawn[1]


def _mask(
    mask: Array,
    history: tuple[IntArray, Array] | None,
    train: Labelled | None,
    background: Background | None,
    seed: int,
) -> MaskMeasures:
    steps, masks = history if history is not None else (np.zeros(0), np.zeros((0, len(mask))))
    return MaskMeasures(
        values=mask,
        statistics=_statistics(mask),
        history=[
            {"step": int(step), **_statistics(m)} for step, m in zip(steps, masks, strict=True)
        ],
        masks=masks,
        information={} if train is None else _information(train, np.abs(mask), background, seed),
    )


def _statistics(mask: Array) -> dict[str, float]:
    statistics = mask_statistics(torch.as_tensor(mask))
    return {name: float(value) for name, value in statistics.items()}


def _information(
    train: Labelled, weight: Array, background: Background | None, seed: int
) -> dict[str, Information]:
    """What each dimension tells, against its mask weight |m|; measured on plain features."""
    shares = {}
    classes = int(train.labels.max()) + 1
    if classes > 0:
        shares["class"] = explained_share(train.features, np.eye(classes)[train.labels])
    if background is not None:
        photographs = int(background.photograph.max()) + 1
        if photographs > 1:
            codes = np.eye(photographs)[background.photograph]
            shares["photograph"] = explained_share(train.features, codes)
        shares["colour"] = explained_share(train.features, background.colour)
    shares["deviation"] = train.features.std(axis=0, dtype=np.float64)
    order = np.argsort(weight, kind="stable")
    tenth = max(1, round(len(weight) / 10))
    return {
        name: Information(
            values=values,
            lowest_tenth=float(values[order[:tenth]].mean()),
            highest_tenth=float(values[order[-tenth:]].mean()),
            rank_correlation=rank_correlation(weight, values, np.random.default_rng(seed)),
        )
        for name, values in shares.items()
    }


def _bounds(subject: CheckpointFeatures, images: IntArray) -> dict[str, Bounds]:
    """The bounds of plain and of masked features."""
    assert subject.val is not None
    labels = subject.val.labels[images]
    first, second = subject.views or (subject.val.features[images], None)
    masks: dict[str, Array] = {"plain": np.ones(first.shape[1])}
    if subject.mask is not None:
        masks["masked"] = subject.mask
    return {
        name: bounds(first * mask, labels, None if second is None else second * mask)
        for name, mask in masks.items()
    }
