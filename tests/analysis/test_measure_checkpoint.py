"""The measures put together, on a planted confounder."""

from dataclasses import replace

import numpy as np
import pytest

from metamask_solo.analysis import measure_checkpoint as module
from metamask_solo.analysis.measure_checkpoint import (
    bounds_images,
    measure_checkpoint,
    paired_difference,
)
from metamask_solo.analysis.report import plain
from metamask_solo.analysis.subsets import Labelled

DIMS, CLASSES = 24, 4


def test_damped_dimensions_are_found_to_be_confounders(confounded):
    subject, background = confounded()
    of = measure_checkpoint(subject, background, seed=0, draws=6)
    information = of.mask.information
    assert list(information) == ["class", "photograph", "colour", "deviation"]
    of_class, of_photograph = information["class"], information["photograph"]
    assert of_class.rank_correlation.rho > 0.5 > 0.01 > of_class.rank_correlation.p_value
    assert of_photograph.rank_correlation.rho < -0.5
    assert of_class.lowest_tenth < 0.1 < of_class.highest_tenth
    assert of_photograph.highest_tenth < 0.1 < of_photograph.lowest_tenth
    # damping them does kNN no harm, and narrows the bounds
    assert of.accuracy["knn"].masked >= of.accuracy["knn"].plain
    assert of.positives == "same class"
    assert of.bounds["masked"].width < of.bounds["plain"].width
    assert of.subsets.curves["knn"].top[4] > of.subsets.curves["knn"].bottom[4]
    assert [row["step"] for row in of.mask.history] == [0, 10, 20]
    assert of.mask.history[0]["std"] == pytest.approx(0)
    assert {**of.mask.history[-1], "step": 0} == {**of.mask.statistics, "step": 0}
    assert of.notes == []


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


def test_without_a_mask_only_the_plain_features_are_measured(confounded):
    subject, _ = confounded(masked=False)
    of = measure_checkpoint(subject, None, seed=0, draws=3)
    assert of.mask is None
    assert of.accuracy["knn"].masked is None
    assert list(of.redundancy) == list(of.bounds) == ["plain"]
    assert of.subsets.curves["ridge"].top is None
    assert 0.25 < of.accuracy["linear"].plain <= 1


def test_a_constant_mask_ranks_nothing(confounded):
    subject, _ = confounded()
    subject = replace(subject, mask=np.full(DIMS, 0.5, dtype=np.float32), history=None)
    of = measure_checkpoint(subject, None, seed=0, draws=2)
    assert of.subsets.curves["knn"].top is None
    assert list(of.mask.information) == ["class", "deviation"]
    assert of.mask.information["class"].rank_correlation is None
    assert of.mask.history == []
    # the same factor everywhere changes no direction
    assert of.accuracy["knn"].masked == of.accuracy["knn"].plain
    assert of.bounds["masked"].width == pytest.approx(of.bounds["plain"].width)


def test_two_views_are_taken_as_positives(confounded):
    subject, _ = confounded(masked=False)
    same = measure_checkpoint(subject, None, seed=0, draws=2).bounds["plain"]
    view = subject.val.features[bounds_images(subject.val.labels, 0)]
    of = measure_checkpoint(replace(subject, views=(view, view)), None, seed=0, draws=2)
    assert of.positives == "two views"
    assert of.bounds["plain"].negatives == 2 * same.negatives
    assert of.bounds["plain"].cross_entropy == pytest.approx(same.cross_entropy)
    # identical views are perfectly aligned, so the loss is lower than with any of the class
    assert of.bounds["plain"].contrastive_loss - np.log(2) < same.contrastive_loss


def test_large_splits_are_drawn_from_and_untrained_features_as_well(confounded, monkeypatch):
    monkeypatch.setattr(module, "SUBSET_TRAIN", 50)
    monkeypatch.setattr(module, "SUBSET_VAL", 30)
    monkeypatch.setattr(module, "BOUNDS_IMAGES", 10)
    subject, _ = confounded(masked=False)
    other = {"same": (subject.train, subject.val)}
    of = measure_checkpoint(subject, None, seed=0, draws=2, untrained=other)
    assert (of.subsets.train_images, of.subsets.val_images) == (50, 30)
    assert of.bounds_images == 10 // CLASSES * CLASSES
    for probe, curves in of.subsets.curves.items():
        assert of.subsets.untrained["same"][probe] == curves.full


@pytest.mark.parametrize("case", ["the same", "nearly the same", "zero", "no features"])
def test_what_a_collapsed_run_allows_is_still_measured(confounded, case, rng):
    subject, background = confounded()
    noise = 1e-7 * rng.normal(size=(200, DIMS)) if case == "nearly the same" else 0
    features = np.full((200, DIMS), 0.0 if case == "zero" else 3.7) * (1 + noise)
    train = Labelled(features.astype(np.float32), subject.train.labels)
    val = Labelled(train.features[:80], subject.val.labels)
    if case == "no features":
        subject = replace(subject, train=None, val=None, notes=["not finite"])
    else:
        subject = replace(subject, train=train, val=val)
    of = measure_checkpoint(subject, background, seed=0, draws=2)
    assert of.mask.statistics["max"] == pytest.approx(0.9)
    if case == "no features":
        assert of.notes == ["not finite"]
        assert of.redundancy is of.accuracy is of.subsets is of.bounds is None
    else:
        assert "all features are (nearly) the same" in of.notes[0]
        assert of.redundancy["plain"].rankme == pytest.approx(0 if case == "zero" else 1, abs=1e-3)
        assert of.accuracy["knn"].plain <= 0.5
        assert (of.bounds is None) == (case == "zero")
    assert (case == "zero") == any("no bounds: an image has features" in n for n in of.notes)


def test_the_same_seed_gives_the_same_numbers(confounded):
    subject, background = confounded()
    first, again, other = (
        plain(measure_checkpoint(subject, background, seed, 4)) for seed in (3, 3, 4)
    )
    assert first == again != other
