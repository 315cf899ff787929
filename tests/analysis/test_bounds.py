"""The bounds on features whose every term is known in closed form."""

import math

import numpy as np
import pytest

from metamask_solo.analysis import measures
from metamask_solo.analysis.bounds import balanced_indices, bounds


@pytest.mark.parametrize("two_views", [False, True])
def test_collapsed_classes_close_the_bounds(two_views):
    labels = np.repeat(np.arange(4), 5)
    features = np.eye(4)[labels] * 3.0  # length 3: must be normalised
    of = bounds(features, labels, features * 2 if two_views else None)
    cross_entropy = math.log(math.e + 3) - 1
    assert (of.classes, of.negatives) == (4, 40 if two_views else 20)
    assert of.intra_class_variance == pytest.approx(0, abs=1e-15)
    assert of.contrastive_loss == pytest.approx(cross_entropy + math.log(of.negatives / 4))
    for value in (of.cross_entropy, of.lower, of.upper):
        assert value == pytest.approx(cross_entropy)
    assert of.width == pytest.approx(0, abs=1e-7)
    assert of.inside


def two_lobes(angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Two classes; in each, two directions at ``angle`` to either side of the class mean."""
    c, s = math.cos(angle), math.sin(angle)
    features = np.array([[c, s, 0, 0], [c, -s, 0, 0], [0, 0, c, s], [0, 0, c, -s]])
    return features, np.array([0, 0, 1, 1])


def test_two_lobes_in_closed_form(monkeypatch):
    c, s = math.cos(0.7), math.sin(0.7)
    features, labels = two_lobes(0.7)
    of = bounds(features, labels)
    # class means are c·e: each score is c² for the class itself and 0 for the other
    assert of.intra_class_variance == pytest.approx(s**2)
    assert of.cross_entropy == pytest.approx(math.log(1 + math.exp(-(c**2))))
    spread = math.log(math.e + math.exp(c**2 - s**2) + 2)
    assert of.contrastive_loss == pytest.approx(spread - c**2)
    centre = spread - c**2 - math.log(4 / 2)
    assert of.lower == pytest.approx(centre - s - s**2 / 2)
    assert of.upper == pytest.approx(centre + s)
    assert of.width == pytest.approx(2 * s + s**2 / 2) == pytest.approx(of.upper - of.lower)
    assert of.inside
    monkeypatch.setattr(measures, "BLOCK_VALUES", 5)
    assert bounds(features, labels).contrastive_loss == pytest.approx(of.contrastive_loss)


def test_two_views_take_the_pair_as_positive():
    features, labels = two_lobes(0.7)
    same, swapped = (bounds(features, labels, f) for f in (features, features[[1, 0, 3, 2]]))
    # the embeddings are the same: only the alignment of the pairs differs, 1 against cos(1.4)
    assert same.cross_entropy == pytest.approx(swapped.cross_entropy)
    gap = swapped.contrastive_loss - same.contrastive_loss
    assert gap == pytest.approx(1 - math.cos(1.4))


@pytest.mark.parametrize("seed", range(20))
def test_cross_entropy_lies_inside_for_any_features(seed):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(3), 12)
    features = rng.normal(size=(36, 4)) + rng.normal(size=(3, 4))[labels] * rng.uniform(0, 3)
    views = features + rng.normal(size=features.shape) * rng.uniform(0, 1)
    assert bounds(features, labels).inside
    assert bounds(features, labels, views).inside


def test_what_has_no_bounds_is_refused():
    with pytest.raises(ValueError, match="not of equal size"):
        bounds(np.eye(3), np.array([0, 0, 1]))
    with pytest.raises(ValueError, match="all zero"):
        bounds(np.zeros((2, 3)), np.array([0, 1]))


def test_balanced_indices():
    labels = np.array([0] * 9 + [1] * 4 + [2] * 6)
    chosen = balanced_indices(labels, 100, seed=0)
    np.testing.assert_array_equal(np.bincount(labels[chosen]), [4, 4, 4])
    assert len(set(chosen.tolist())) == 12
    np.testing.assert_array_equal(np.bincount(labels[balanced_indices(labels, 7, 0)]), [2, 2, 2])
    assert len(balanced_indices(np.array([0, 0, 1]), 100, 0)) == 0  # a class of one image
