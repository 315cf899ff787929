"""The measures put together, on a planted confounder."""

import json
from dataclasses import replace

import numpy as np
import pytest

from metamask_solo.analysis.measure_checkpoint import measure_checkpoint, paired_difference
from metamask_solo.analysis.report import _plain
from metamask_solo.analysis.subsets import Labelled

DIMS = 24


def test_damped_dimensions_are_found_to_be_confounders(confounded):
    of = measure_checkpoint(*confounded(), seed=0, draws=6)
    assert list(of.information.index) == ["class", "photograph", "deviation"]
    of_class, of_photograph = of.information.loc["class"], of.information.loc["photograph"]
    assert of_class.rho > 0.5 > 0.01 > of_class.p
    assert of_photograph.rho < -0.5
    assert of_class.lowest_tenth < 0.1 < of_class.highest_tenth
    assert of_photograph.highest_tenth < 0.1 < of_photograph.lowest_tenth
    # damping them does kNN no harm, and narrows the bounds
    assert of.accuracy.masked["knn"] >= of.accuracy.plain["knn"]
    assert of.bounds.width["masked"] < of.bounds.width["plain"]
    assert of.subsets["knn"].top[4] > of.subsets["knn"].bottom[4]
    assert of.mask_statistics["max"] == pytest.approx(0.9)
    assert of.notes == ()
    again, different = (measure_checkpoint(*confounded(), seed, 6) for seed in (0, 1))
    assert json.dumps(of, default=_plain) == json.dumps(again, default=_plain)
    assert of.subsets["knn"].draws.tolist() != different.subsets["knn"].draws.tolist()


def test_an_interval_of_few_images_holds_the_difference(rng):
    """Coverage by simulation, where few images change, as a mask changes few."""
    for images, gained, lost in ((20, 0.05, 0.02), (50, 0.03, 0.03), (500, 0.004, 0.001)):
        held = 0
        for _ in range(1000):
            drawn = rng.random(images)
            before = drawn >= gained
            hits = (drawn < gained) | (drawn >= gained + lost)
            mean, low, high = paired_difference(hits, before)
            assert mean == pytest.approx(hits.mean() - before.mean())
            assert -1 <= low < mean < high <= 1
            held += low <= gained - lost <= high
        assert held / 1000 > 0.94
    hits, before = rng.random(20_000) < 0.7, rng.random(20_000) < 0.6
    gain = hits.astype(float) - before
    margin = 1.96 * gain.std() / np.sqrt(20_000)  # the usual one, where images are many
    _, low, high = paired_difference(hits, before)
    assert (low, high) == pytest.approx((gain.mean() - margin, gain.mean() + margin), abs=1e-4)


def test_a_constant_mask_ranks_nothing(confounded):
    known, splits, _ = confounded()
    known = replace(known, mask=np.full(DIMS, 0.5, dtype=np.float32), history=None)
    of = measure_checkpoint(known, splits, None, seed=0, draws=2)
    assert of.subsets["knn"].top is None
    assert list(of.information.index) == ["class", "deviation"]
    assert of.information.rho.isna().all() and of.dimensions is None
    # the same factor everywhere changes no direction
    assert of.accuracy.masked["knn"] == of.accuracy.plain["knn"]
    assert of.bounds.width["masked"] == pytest.approx(of.bounds.width["plain"])


@pytest.mark.parametrize("zero", [False, True])
def test_what_a_collapsed_run_allows_is_still_measured(confounded, zero, rng):
    known, splits, photograph = confounded()
    features = np.zeros((200, DIMS)) if zero else 3.7 + 1e-7 * rng.normal(size=(200, DIMS))
    for split, one in splits.items():
        same = features.astype(np.float32)[: len(one.labels)]
        splits[split] = Labelled(same, one.labels)
    of = measure_checkpoint(known, splits, photograph, seed=0, draws=2)
    assert of.mask_statistics["max"] == pytest.approx(0.9)
    assert "all features are (nearly) the same" in of.notes[0]
    assert of.redundancy["plain"].rankme == pytest.approx(0 if zero else 1, abs=1e-3)
    assert of.accuracy.plain["knn"] <= 0.5
    for curves in of.subsets.values():
        assert np.isfinite(curves.draws).all() and np.isfinite(curves.gain_error)
    # zeros have no direction
    assert (of.bounds is None) == zero == any("no bounds: an image" in n for n in of.notes)
