"""The bounds on features whose every term is known in closed form."""

import math

import numpy as np
import pytest

from metamask_solo.analysis.bounds import bounds


def test_collapsed_classes_close_the_bounds():
    labels = np.repeat(np.arange(4), 5)
    of = bounds(np.eye(4)[labels] * 3.0, labels)  # length 3: must be normalised
    cross_entropy = math.log(math.e + 3) - 1
    assert (of["classes"], of["negatives"]) == (4, 20)
    assert of["intra_class_variance"] == pytest.approx(0, abs=1e-15)
    assert of["contrastive_loss"] == pytest.approx(cross_entropy + math.log(20 / 4))
    for side in ("cross_entropy", "lower", "upper"):
        assert of[side] == pytest.approx(cross_entropy)
    assert of["width"] == pytest.approx(0, abs=1e-7) and of["inside"]


def test_two_lobes_in_closed_form():
    # two classes; in each, two directions at an angle of 0.7 to either side of the class mean
    c, s = math.cos(0.7), math.sin(0.7)
    features = np.array([[c, s, 0, 0], [c, -s, 0, 0], [0, 0, c, s], [0, 0, c, -s]])
    labels = np.array([0, 0, 1, 1])
    of = bounds(features, labels)
    # class means are c·e: each score is c² for the class itself and 0 for the other
    assert of["intra_class_variance"] == pytest.approx(s**2)
    assert of["cross_entropy"] == pytest.approx(math.log(1 + math.exp(-(c**2))))
    spread = math.log(math.e + math.exp(c**2 - s**2) + 2)
    assert of["contrastive_loss"] == pytest.approx(spread - c**2)
    centre = spread - c**2 - math.log(4 / 2)
    assert of["lower"] == pytest.approx(centre - s - s**2 / 2)
    assert of["upper"] == pytest.approx(centre + s)
    assert of["width"] == pytest.approx(2 * s + s**2 / 2)
    assert of["inside"]


@pytest.mark.parametrize("seed", range(20))
def test_cross_entropy_lies_inside_for_any_features(seed):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(3), 12)
    features = rng.normal(size=(36, 4)) + rng.normal(size=(3, 4))[labels] * rng.uniform(0, 3)
    assert bounds(features, labels)["inside"]


def test_classes_of_equal_size_are_drawn(rng):
    labels = np.array([0] * 9 + [1] * 4 + [2] * 6)
    features = rng.normal(size=(19, 5))
    assert bounds(features, labels)["negatives"] == 12
    few = [bounds(features, labels, limit=7, seed=seed) for seed in (0, 0, 1)]
    assert few[0]["negatives"] == 6 and few[0] == few[1] != few[2]


def test_what_has_no_bounds_is_refused():
    with pytest.raises(ValueError, match="fewer than two"):
        bounds(np.eye(3), np.array([0, 0, 1]))
    with pytest.raises(ValueError, match="all zero"):
        bounds(np.zeros((4, 3)), np.array([0, 0, 1, 1]))
