"""The measures put together, on a planted confounder."""

from dataclasses import replace

import numpy as np
import pytest

from metamask_solo.analysis import study as study_module
from metamask_solo.analysis.study import bracket_images, steps_of, study

DIMS, CLASSES = 24, 4


def test_damped_dimensions_are_found_to_be_confounders(confounded):
    subject, background = confounded()
    numbers = study(subject, background, seed=0, draws=6).numbers
    information = numbers.mask.information
    assert list(information) == ["class", "photograph", "colour", "deviation"]
    of_class, of_photograph = information["class"], information["photograph"]
    assert of_class.rank_correlation.rho > 0.5 > 0.01 > of_class.rank_correlation.p_value
    assert of_photograph.rank_correlation.rho < -0.5
    assert of_class.lowest_tenth < 0.1 < of_class.highest_tenth
    assert of_photograph.highest_tenth < 0.1 < of_photograph.lowest_tenth
    assert information["colour"].rank_correlation.rho < -0.3
    assert len(of_class.values) == DIMS
    # damping them does kNN no harm, and narrows the bracket
    assert numbers.accuracy["knn"].masked >= numbers.accuracy["knn"].plain
    bracket = numbers.bracket
    assert bracket.positives == "same class"
    assert bracket.masked.width < bracket.plain.width
    assert bracket.plain.inside and bracket.masked.inside
    # correlation knows no scale, the covariance does
    plain, masked = numbers.redundancy.plain, numbers.redundancy.masked
    assert masked.off_diagonal_energy == pytest.approx(plain.off_diagonal_energy)
    assert masked.off_diagonal_share < plain.off_diagonal_share
    assert numbers.subsets.knn.top_by_mask[4] > numbers.subsets.knn.bottom_by_mask[4]


def test_an_interval_of_few_images_holds_the_difference():
    """Coverage by simulation, where few images change, as a mask changes few."""
    rng = np.random.default_rng(0)
    for images, gained, lost in ((20, 0.05, 0.02), (50, 0.03, 0.03), (500, 0.004, 0.001)):
        held = 0
        for _ in range(1000):
            drawn = rng.random(images)
            before = drawn >= gained
            correct = (drawn < gained) | (drawn >= gained + lost)
            found = study_module.paired_difference(correct, before)
            assert found.mean == pytest.approx(correct.mean() - before.mean())
            assert -1 <= found.low < found.mean < found.high <= 1
            held += found.low <= gained - lost <= found.high
        assert held / 1000 > 0.94


def test_the_interval_of_many_images_is_the_usual_one():
    rng = np.random.default_rng(0)
    correct, before = rng.random(20_000) < 0.7, rng.random(20_000) < 0.6
    found = study_module.paired_difference(correct, before)
    gain = correct.astype(float) - before
    margin = 1.96 * gain.std() / np.sqrt(20_000)
    assert found.low == pytest.approx(gain.mean() - margin, abs=1e-4)
    assert found.high == pytest.approx(gain.mean() + margin, abs=1e-4)


def test_mask_numbers_hold_its_history(confounded):
    subject, background = confounded()
    mask = study(subject, background, seed=0, draws=2).numbers.mask
    assert mask.history.step == [0, 10, 20]
    assert mask.history.statistics[0].std == pytest.approx(0)
    assert mask.history.statistics[-1] == mask.statistics
    assert mask.statistics.max == pytest.approx(0.9)


def test_without_a_mask_only_the_plain_features_are_measured(confounded):
    subject, background = confounded(masked=False)
    numbers = study(subject, background, seed=0, draws=3).numbers
    assert numbers.mask is None
    assert numbers.accuracy["knn"].masked is None
    assert numbers.redundancy.masked is None
    assert numbers.bracket.masked is None
    assert numbers.subsets.linear.top_by_mask is None
    assert 0.25 < numbers.accuracy["linear"].plain <= 1


def test_a_constant_mask_ranks_nothing(confounded):
    subject, _ = confounded()
    subject = replace(subject, mask=np.full(DIMS, 0.5, dtype=np.float32), history=None)
    numbers = study(subject, None, seed=0, draws=2).numbers
    assert numbers.subsets.knn.top_by_mask is None
    assert list(numbers.mask.information) == ["class", "deviation"]
    assert numbers.mask.information["class"].rank_correlation is None
    assert numbers.mask.history is None
    # the same factor everywhere changes no direction
    assert numbers.accuracy["knn"].masked == numbers.accuracy["knn"].plain
    assert numbers.bracket.masked.width == pytest.approx(numbers.bracket.plain.width)


def test_a_single_photograph_explains_nothing_and_is_left_out(confounded):
    subject, background = confounded()
    background = replace(background, photograph=np.zeros(200, dtype=int))
    information = study(subject, background, seed=0, draws=2).numbers.mask.information
    assert list(information) == ["class", "colour", "deviation"]


def test_two_views_are_taken_as_positives(confounded):
    subject, _ = confounded(masked=False)
    same = study(subject, None, seed=0, draws=2).numbers.bracket
    chosen = bracket_images(subject.val.labels, 0)
    view = subject.val.features[chosen]
    twice = replace(subject, views=(view, view))
    found = study(twice, None, seed=0, draws=2).numbers.bracket
    assert found.positives == "two views"
    assert found.plain.negatives == 2 * same.plain.negatives
    assert found.plain.cross_entropy == pytest.approx(same.plain.cross_entropy)
    # identical views are perfectly aligned, so the loss is lower than with any of the class
    assert found.plain.contrastive_loss - np.log(2) < same.plain.contrastive_loss


def test_large_splits_are_drawn_from(confounded, monkeypatch):
    monkeypatch.setattr(study_module, "SUBSET_TRAIN", 50)
    monkeypatch.setattr(study_module, "SUBSET_VAL", 30)
    monkeypatch.setattr(study_module, "BRACKET_IMAGES", 10)
    subject, _ = confounded(masked=False)
    numbers = study(subject, None, seed=0, draws=2).numbers
    assert (numbers.subsets.train_images, numbers.subsets.val_images) == (50, 30)
    assert numbers.bracket.images == 10 // CLASSES * CLASSES


def test_study_is_deterministic_and_counts_its_steps(confounded):
    subject, background = confounded()
    steps: list[int] = []
    first = study(subject, background, 3, 4, lambda: steps.append(1)).numbers
    assert len(steps) == steps_of(subject, 4) == 6
    assert steps_of(confounded(masked=False)[0], 4) == 4
    again = study(subject, background, 3, 4).numbers
    other = study(subject, background, 4, 4).numbers
    assert first == again != other
