"""The bracket on features whose every term is known in closed form."""

import math
from dataclasses import replace

import numpy as np
import pytest

from metamask_solo.analysis import measures
from metamask_solo.analysis.bounds import balanced_indices, bracket


def collapsed(classes: int, each: int) -> tuple[np.ndarray, np.ndarray]:
    """Every image sits exactly on its class mean, and the means are orthogonal."""
    labels = np.repeat(np.arange(classes), each)
    return np.eye(classes)[labels] * 3.0, labels  # length 3: must be normalised


@pytest.mark.parametrize("two_views", [False, True])
def test_collapsed_classes_close_the_bracket(two_views):
    features, labels = collapsed(4, 5)
    found = bracket(features, labels, features * 2 if two_views else None)
    cross_entropy = math.log(math.e + 3) - 1
    assert found.classes == 4
    assert found.negatives == (40 if two_views else 20)
    assert found.intra_class_variance == pytest.approx(0, abs=1e-15)
    assert found.cross_entropy == pytest.approx(cross_entropy)
    assert found.contrastive_loss == pytest.approx(cross_entropy + math.log(found.negatives / 4))
    assert found.lower == pytest.approx(cross_entropy)
    assert found.upper == pytest.approx(cross_entropy)
    assert found.width == pytest.approx(0, abs=1e-7)
    assert found.inside


def two_lobes(angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Two classes; in each, two directions at ``angle`` to either side of the class mean."""
    c, s = math.cos(angle), math.sin(angle)
    features = np.array([[c, s, 0, 0], [c, -s, 0, 0], [0, 0, c, s], [0, 0, c, -s]])
    return features, np.array([0, 0, 1, 1])


def test_two_lobes_in_closed_form():
    angle = 0.7
    c, s = math.cos(angle), math.sin(angle)
    features, labels = two_lobes(angle)
    found = bracket(features, labels)
    # class means are c·e: each score is c² for the own class and 0 for the other
    assert found.intra_class_variance == pytest.approx(s**2)
    assert found.cross_entropy == pytest.approx(math.log(1 + math.exp(-(c**2))))
    spread = math.log(math.e + math.exp(c**2 - s**2) + 2)
    assert found.contrastive_loss == pytest.approx(spread - c**2)
    centre = spread - c**2 - math.log(4 / 2)
    assert found.lower == pytest.approx(centre - s - s**2 / 2)
    assert found.upper == pytest.approx(centre + s)
    assert found.width == pytest.approx(2 * s + s**2 / 2)
    assert found.width == pytest.approx(found.upper - found.lower)
    assert found.inside


def test_two_views_take_the_pair_as_positive():
    features, labels = two_lobes(0.7)
    same = bracket(features, labels, features)
    swapped = bracket(features, labels, features[[1, 0, 3, 2]])
    # the embeddings are the same: only the alignment of the pairs differs, 1 against cos(1.4)
    assert same.cross_entropy == pytest.approx(swapped.cross_entropy)
    assert same.intra_class_variance == pytest.approx(swapped.intra_class_variance)
    gap = swapped.contrastive_loss - same.contrastive_loss
    assert gap == pytest.approx(1 - math.cos(1.4))
    assert same.inside and swapped.inside


def test_bracket_holds_and_narrows_when_a_confounder_is_damped():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(5), 40)
    signal = np.eye(5)[labels] + rng.normal(scale=0.1, size=(200, 5))
    confounder = rng.normal(size=(200, 3))
    wide = bracket(np.hstack([signal, confounder]), labels)
    narrow = bracket(np.hstack([signal, 0.1 * confounder]), labels)
    assert wide.inside and narrow.inside
    assert narrow.width < wide.width
    assert narrow.cross_entropy < wide.cross_entropy


@pytest.mark.parametrize("seed", range(20))
def test_cross_entropy_lies_inside_for_any_features(seed):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(3), 12)
    features = rng.normal(size=(36, 4)) + rng.normal(size=(3, 4))[labels] * rng.uniform(0, 3)
    views = features + rng.normal(size=features.shape) * rng.uniform(0, 1)
    assert bracket(features, labels).inside
    assert bracket(features, labels, views).inside


def test_small_blocks_give_the_same(monkeypatch):
    features, labels = two_lobes(0.3)
    whole = bracket(features, labels)
    monkeypatch.setattr(measures, "BLOCK_VALUES", 5)
    assert bracket(features, labels).contrastive_loss == pytest.approx(whole.contrastive_loss)


def test_inside_is_false_beyond_either_side():
    found = bracket(*two_lobes(0.3))
    assert not replace(found, cross_entropy=found.upper + 1e-6).inside
    assert not replace(found, cross_entropy=found.lower - 1e-6).inside


def test_classes_of_unequal_size_are_refused():
    with pytest.raises(ValueError, match="classes of 1 to 2 images"):
        bracket(np.eye(3), np.array([0, 0, 1]))
    with pytest.raises(ValueError, match="all zero"):
        bracket(np.zeros((2, 3)), np.array([0, 1]))


def test_balanced_indices():
    labels = np.array([0] * 9 + [1] * 4 + [2] * 6)
    rng = np.random.default_rng(0)
    chosen = balanced_indices(labels, 100, rng)
    np.testing.assert_array_equal(np.bincount(labels[chosen]), [4, 4, 4])
    assert len(set(chosen.tolist())) == 12
    np.testing.assert_array_equal(np.bincount(labels[balanced_indices(labels, 7, rng)]), [2, 2, 2])
