"""All that is measured of one checkpoint, from its features to the numbers of a report."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from metamask_solo.analysis.bounds import bounds
from metamask_solo.analysis.measures import (
    Array,
    IntArray,
    Redundancy,
    explained_share,
    rank_correlation,
    redundancy,
)
from metamask_solo.analysis.subsets import Labelled, SubsetCurves, subset_curves
from metamask_solo.evaluation.features import imbalance_note, is_collapsed
from metamask_solo.evaluation.knn import knn_hits
from metamask_solo.evaluation.linear import linear_probe
from metamask_solo.method.mask import mask_statistics

SUBSET_TRAIN, SUBSET_VAL = 5_000, 2_000  # images of the subset experiment, at most
PROBES = {"knn": "kNN", "linear": "linear"}


@dataclass(frozen=True)
class Measures:
    """What is known and measured of one checkpoint; None for what could not be measured.

    Attributes:
        notes: what a reader of the report must know of this checkpoint, one sentence each.
        redundancy: of the ``plain`` features and, where there is a mask, the ``masked`` ones.
        accuracy: ``plain`` for each of ``PROBES``, 0 to 1, and where there is a mask ``masked``,
            with ``difference``, ``low`` and ``high`` of :func:`paired_difference`.
        subsets: curves by probe.
        bounds: the terms of :func:`bounds`, a row for each kind of features.
        mask: shape (D,); None for a method without one.
        history: a row of D weights for each optimiser step that was noted, by step.
        dimensions: for each dimension its ``weight`` |m|, and what it tells: the share of its
            variance that the ``class`` and the background ``photograph`` explain where these are
            known, and as a control its standard ``deviation``. None where all weights are equal.
        information: for each of these columns the mean over the tenth of the dimensions with the
            lowest and the highest weights (NaN for equal ones), and the rank correlation with them.
    """

    name: str
    path: str
    method: str | None
    notes: tuple[str, ...] = ()
    dims: int | None = None
    redundancy: dict[str, Redundancy] | None = None
    accuracy: pd.DataFrame | None = None
    subsets: dict[str, SubsetCurves] | None = None
    bounds: pd.DataFrame | None = None
    mask: Array | None = None
    mask_statistics: dict[str, float] | None = None
    history: pd.DataFrame | None = None
    dimensions: pd.DataFrame | None = None
    information: pd.DataFrame | None = None


def measure_checkpoint(
    known: Measures,
    splits: Mapping[str, Labelled],
    photograph: IntArray | None,
    seed: int,
    draws: int,
) -> Measures:
    """Measures one checkpoint: all that its features, labels and mask allow.

    Args:
        known: name, path, method, mask, history and notes.
        splits: plain features of ``train``, and of ``val`` where there are labels; none where they
            are not finite.
        photograph: which photograph lies behind the object of each training image, shape (N,), 0
            to P − 1; None where that is not known.
        draws: number of random subsets at each rate.
    """
    train, val, mask, notes = splits.get("train"), splits.get("val"), known.mask, [*known.notes]
    measured: dict[str, Any] = {}
    if train is not None:
        measured["dims"] = train.features.shape[1]
        measured["redundancy"] = redundancy(train.features, mask)
        if is_collapsed(torch.as_tensor(train.features)):
            notes.append("all features are (nearly) the same: the representation has collapsed")
    if train is not None and val is not None:
        measured["accuracy"] = _accuracy(train, val, mask)
        notes += _doubts(measured["accuracy"], train, val)
        # matrices of this size gain nothing from threads, and one thread is the same everywhere
        with threadpool_limits(limits=1):
            drawn = _drawn(train, SUBSET_TRAIN, seed), _drawn(val, SUBSET_VAL, seed)
            measured["subsets"] = subset_curves(*drawn, mask, draws, np.random.default_rng(seed))
        try:
            rows = {"plain": bounds(val.features, val.labels, seed=seed)}
            if mask is not None:
                rows["masked"] = bounds(val.features * mask, val.labels, seed=seed)
            measured["bounds"] = pd.DataFrame.from_dict(rows, orient="index")
        except ValueError as error:
            notes.append(f"no bounds: {error}")
    if mask is not None:
        statistics = mask_statistics(torch.as_tensor(mask))
        measured["mask_statistics"] = {name: float(value) for name, value in statistics.items()}
        if train is not None:
            dimensions = _dimensions(train, np.abs(mask), photograph)
            measured["information"] = _information(dimensions)
            measured["dimensions"] = dimensions if np.ptp(dimensions.weight) > 0 else None
    return replace(known, notes=tuple(notes), **measured)


def accuracies(train: Labelled, val: Labelled) -> dict[str, NDArray[np.bool_]]:
    """Which validation images each of ``PROBES`` gets right with all dimensions."""
    x, y = torch.as_tensor(train.features), torch.as_tensor(train.labels)
    val_x, val_y = torch.as_tensor(val.features), torch.as_tensor(val.labels)
    return {
        "knn": knn_hits(x, y, val_x, val_y)[0].numpy(),
        "linear": linear_probe(x, y, val_x, val_y)[0].numpy(),
    }


def _accuracy(train: Labelled, val: Labelled, mask: Array | None) -> pd.DataFrame:
    plain = accuracies(train, val)
    table = pd.DataFrame({"plain": {probe: hits.mean() for probe, hits in plain.items()}})
    if mask is not None:
        masks = mask.astype(train.features.dtype)
        both = (Labelled(split.features * masks, split.labels) for split in (train, val))
        for probe, hits in accuracies(*both).items():
            change = paired_difference(hits, plain[probe])
            table.loc[probe, ["masked", "difference", "low", "high"]] = hits.mean(), *change
    return table


def _doubts(accuracy: pd.DataFrame, train: Labelled, val: Labelled) -> Iterator[str]:
    """A sentence for each accuracy that says no more than that classes are of unequal size."""
    labels = torch.as_tensor(train.labels), torch.as_tensor(val.labels)
    for kind in accuracy.columns.intersection(["plain", "masked"]):
        for probe, value in accuracy[kind].items():
            if (note := imbalance_note(100 * value, *labels)) is not None:
                yield f"{PROBES[str(probe)]}, {kind} features: {note}"


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


def _drawn(split: Labelled, limit: int, seed: int) -> Labelled:
    """At most ``limit`` images of a split."""
    images = np.sort(np.random.default_rng(seed).permutation(len(split.labels))[:limit])
    return Labelled(split.features[images], split.labels[images])


def _dimensions(train: Labelled, weight: Array, photograph: IntArray | None) -> pd.DataFrame:
    table = pd.DataFrame({"weight": weight})
    if train.labels.max() >= 0:
        table["class"] = explained_share(train.features, train.labels)
    if photograph is not None:
        table["photograph"] = explained_share(train.features, photograph)
    table["deviation"] = train.features.std(axis=0, dtype=np.float64)
    return table


def _information(dimensions: pd.DataFrame) -> pd.DataFrame:
    order = np.argsort(dimensions.weight, kind="stable")
    tenth, differ = max(1, round(len(order) / 10)), np.ptp(dimensions.weight) > 0
    rows = {
        kind: {
            "lowest_tenth": values.iloc[order[:tenth]].mean() if differ else math.nan,
            "highest_tenth": values.iloc[order[-tenth:]].mean() if differ else math.nan,
            **rank_correlation(dimensions.weight.to_numpy(), values.to_numpy()),
        }
        for kind, values in dimensions.drop(columns="weight").items()
    }
    return pd.DataFrame.from_dict(rows, orient="index")
