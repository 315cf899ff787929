"""Everything that is measured of one checkpoint, from its features to numbers for a report."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from metamask_solo.analysis.bounds import Bracket, balanced_indices, bracket
from metamask_solo.analysis.measures import (
    Array,
    IntArray,
    Moments,
    correlation_matrix,
    explained_share,
    moments,
    off_diagonal_energy,
    off_diagonal_share,
    one_hot,
    rank_correlation,
    rankme,
    singular_values,
)
from metamask_solo.analysis.records import (
    Accuracy,
    Brackets,
    Curve,
    Difference,
    History,
    Information,
    MaskNumbers,
    Numbers,
    Redundancy,
    References,
    Statistics,
    Subsets,
    Versions,
)
from metamask_solo.analysis.subsets import (
    RATES,
    Split,
    SubsetCurves,
    cuts_of,
    knn_along,
    linear_along,
    ridge_system,
    subset_curves,
)
from metamask_solo.method.mask import mask_statistics

SUBSET_TRAIN, SUBSET_VAL = 5_000, 2_000  # images of the subset experiment, at most
BRACKET_IMAGES = 2_000


@dataclass(frozen=True)
class Background:
    """What lies behind the object of each training image, in the order of its features.

    ``photograph`` holds codes (N,), 0 to P − 1; ``colour`` the mean colour (N, 3), 0 to 1.
    """

    photograph: IntArray
    colour: Array


@dataclass(frozen=True)
class Subject:
    """One checkpoint: the features of both splits and what it knows about its mask.

    Attributes:
        val: None where the images have no labels; those of ``train`` are then not looked at.
        mask: shape (D,), or None for a method without one.
        history: optimiser steps (T,) and masks (T, D), or None.
        views: features of two augmented views of the images that :func:`bracket_images` names,
            each (B, D), or None.
    """

    name: str
    path: str
    method: str | None
    train: Split
    val: Split | None
    mask: Array | None = None
    history: tuple[IntArray, Array] | None = None
    views: tuple[Array, Array] | None = None


@dataclass(frozen=True)
class Study:
    """The measures of one subject, without its features.

    Attributes:
        numbers: what analysis.json holds of it.
        correlation: of the plain dimensions, shape (D, D).
        mask, history: as in :class:`Subject`.
    """

    name: str
    numbers: Numbers
    correlation: Array
    mask: Array | None
    history: tuple[IntArray, Array] | None


def study(
    subject: Subject,
    background: Background | None,
    seed: int,
    draws: int,
    advance: Callable[[], object] = lambda: None,
    references: tuple[References, References] | None = None,
) -> Study:
    """Measures one checkpoint; without labels, redundancy and the mask's values alone.

    Args:
        draws: number of random subsets at each rate.
        advance: called after each of the ``steps_of(subject, draws)`` orders of dimensions.
        references: what stands beside it in the report, on all images and on those of the
            subset experiment.
    """
    labelled = subject.val is not None
    redundancy, correlation = _redundancy(subject)
    on_all, on_subset = references or (None, None)
    numbers = Numbers(
        name=subject.name,
        path=subject.path,
        method=subject.method,
        dims=subject.train.features.shape[1],
        accuracy=_accuracy(subject) if labelled else None,
        redundancy=redundancy,
        subsets=_subsets(subject, seed, draws, advance, on_subset) if labelled else None,
        mask=_mask(subject, background, seed),
        bracket=_brackets(subject, seed) if labelled else None,
        references=on_all,
    )
    return Study(subject.name, numbers, correlation, subject.mask, subject.history)


def subset_images(subject: Subject, seed: int) -> tuple[IntArray, IntArray]:
    """Indices of the training and validation images of the subset experiment."""
    assert subject.val is not None
    train = _draw(len(subject.train.labels), SUBSET_TRAIN, seed)
    return train, _draw(len(subject.val.labels), SUBSET_VAL, seed)


def reference_accuracies(references: dict[str, tuple[Split, Split]]) -> References:
    """Accuracy of both probes on all dimensions of other features of the same images."""
    with threadpool_limits(limits=1):
        return {
            name: {probe: float(correct.mean()) for probe, correct in _probes(*splits).items()}
            for name, splits in references.items()
        }


def steps_of(subject: Subject, draws: int) -> int:
    """How often :func:`study` calls ``advance``."""
    if subject.val is None:
        return 0
    return draws + (0 if ranking_mask(subject.mask) is None else 2)


def bracket_images(labels: IntArray, seed: int) -> IntArray:
    """Indices of the validation images of the bracket: classes of equal size."""
    return balanced_indices(labels, BRACKET_IMAGES, np.random.default_rng(seed))


def ranking_mask(mask: Array | None) -> Array | None:
    """The mask if it ranks the dimensions; None where it is missing or the same for all."""
    return None if mask is None or np.ptp(np.abs(mask)) == 0 else mask


def _draw(count: int, limit: int, seed: int) -> IntArray:
    chosen = np.random.default_rng(seed).permutation(count)[:limit]
    return np.sort(chosen)


def _probes(train: Split, val: Split) -> dict[str, NDArray[np.bool_]]:
    """Which validation images each probe gets right with all dimensions."""
    dims = train.features.shape[1]
    return {
        "knn": knn_along(train, val, slice(None), [dims])[0],
        "linear": linear_along(ridge_system(train), val, np.arange(dims), [dims])[0],
    }


def _accuracy(subject: Subject) -> dict[str, Accuracy]:
    """Both probes on all images and all dimensions, and what the mask adds to each."""
    assert subject.val is not None
    plain = _probes(subject.train, subject.val)
    if subject.mask is None:
        return {name: Accuracy(float(correct.mean())) for name, correct in plain.items()}
    masked = _probes(subject.train.masked(subject.mask), subject.val.masked(subject.mask))
    found = {}
    for name, correct in masked.items():
        difference = paired_difference(correct, plain[name])
        found[name] = Accuracy(float(plain[name].mean()), float(correct.mean()), difference)
    return found


def paired_difference(correct: NDArray[np.bool_], before: NDArray[np.bool_]) -> Difference:
    """Accuracy gained on the same images, with the 95 % interval of Bonett and Price (2012).

    They add an image to either kind of change, so that the interval holds for few images and few
    changes, too: where no image changed, the difference may still not be 0.
    """
    count = len(correct) + 2
    gained = (np.count_nonzero(correct & ~before) + 1) / count
    lost = (np.count_nonzero(before & ~correct) + 1) / count
    middle = gained - lost
    margin = 1.96 * math.sqrt((gained + lost - middle**2) / count)
    mean = float(correct.mean() - before.mean())
    return Difference(mean, max(-1.0, middle - margin), min(1.0, middle + margin))


def _redundancy(subject: Subject) -> tuple[Versions[Redundancy], Array]:
    plain = moments(subject.train.features)
    correlation = correlation_matrix(plain)
    found = [_redundancy_of(plain, correlation)]
    if subject.mask is not None:
        masked = plain.masked(subject.mask)
        found.append(_redundancy_of(masked, correlation_matrix(masked)))
    return Versions(*found), correlation


def _redundancy_of(found: Moments, correlation: Array) -> Redundancy:
    values = singular_values(found)
    return Redundancy(
        constant_dims=int(np.count_nonzero(np.diag(correlation) == 0)),
        off_diagonal_energy=off_diagonal_energy(correlation),
        off_diagonal_share=off_diagonal_share(found.covariance),
        rankme=rankme(values),
        singular_values=values.tolist(),
    )


def _subsets(
    subject: Subject,
    seed: int,
    draws: int,
    advance: Callable[[], object],
    references: References | None,
) -> Subsets:
    assert subject.val is not None
    train, val = subset_images(subject, seed)
    # matrices of this size gain nothing from threads, and one thread is the same everywhere
    with threadpool_limits(limits=1):
        curves = subset_curves(
            subject.train.take(train),
            subject.val.take(val),
            ranking_mask(subject.mask),
            draws,
            np.random.default_rng(seed),
            advance,
        )
    return Subsets(
        train_images=len(train),
        val_images=len(val),
        rates=list(RATES),
        kept_dims=cuts_of(subject.train.features.shape[1]),
        references=references,
        **{probe: _summary(curve) for probe, curve in curves.items()},
    )


def _summary(curve: SubsetCurves) -> Curve:
    low, high = np.quantile(curve.random, [0.05, 0.95], axis=0)
    return Curve(
        full=curve.full,
        mean=curve.random.mean(axis=0).tolist(),
        quantile_05=low.tolist(),
        quantile_95=high.tolist(),
        best=curve.random.max(axis=0).tolist(),
        held_out_gain=curve.gain,
        held_out_gain_error=curve.gain_error,
        share_beating_full=curve.beating.mean(axis=0).tolist(),
        top_by_mask=None if curve.top is None else curve.top.tolist(),
        bottom_by_mask=None if curve.bottom is None else curve.bottom.tolist(),
        draws=curve.random.tolist(),
    )


def _mask(subject: Subject, background: Background | None, seed: int) -> MaskNumbers | None:
    if subject.mask is None:
        return None
    history = None
    if subject.history is not None:
        steps, masks = subject.history
        history = History(steps.tolist(), [_statistics(mask) for mask in masks])
    return MaskNumbers(
        values=subject.mask.tolist(),
        statistics=_statistics(subject.mask),
        history=history,
        information=_information(subject.train, np.abs(subject.mask), background, seed),
    )


def _statistics(mask: Array) -> Statistics:
    found = mask_statistics(torch.as_tensor(mask))
    return Statistics(**{name: float(value) for name, value in found.items()})


def _information(
    train: Split, weight: Array, background: Background | None, seed: int
) -> dict[str, Information]:
    """What each dimension tells, against its mask weight |m|; measured on plain features."""
    told = {}
    classes = int(train.labels.max()) + 1
    if classes > 0:
        told["class"] = explained_share(train.features, one_hot(train.labels, classes))
    if background is not None:
        photographs = int(background.photograph.max()) + 1
        if photographs > 1:
            codes = one_hot(background.photograph, photographs)
            told["photograph"] = explained_share(train.features, codes)
        told["colour"] = explained_share(train.features, background.colour)
    told["deviation"] = np.sqrt(np.maximum(np.diag(moments(train.features).covariance), 0))
    order = np.argsort(weight, kind="stable")
    tenth = max(1, round(len(weight) / 10))
    return {
        name: Information(
            values=values.tolist(),
            lowest_tenth=float(values[order[:tenth]].mean()),
            highest_tenth=float(values[order[-tenth:]].mean()),
            rank_correlation=rank_correlation(weight, values, np.random.default_rng(seed)),
        )
        for name, values in told.items()
    }


def _brackets(subject: Subject, seed: int) -> Brackets:
    """The bracket of plain and of masked features."""
    assert subject.val is not None
    chosen = bracket_images(subject.val.labels, seed)
    labels = subject.val.labels[chosen]
    first, second = subject.views or (subject.val.features[chosen], None)

    def of(mask: Array) -> Bracket:
        return bracket(first * mask, labels, None if second is None else second * mask)

    return Brackets(
        of(np.ones(first.shape[1])),
        None if subject.mask is None else of(subject.mask),
        positives="same class" if second is None else "two views",
        images=len(chosen),
    )
