"""Probes on nested subsets of dimensions, against scikit-learn and on planted features."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsClassifier

from metamask_solo.analysis.subsets import (
    PENALTIES,
    Labelled,
    NestedRidge,
    cuts_of,
    held_out_gain,
    knn_hits_along,
    subset_curves,
)


def blobs(count: int, dims: int, rng: np.random.Generator, noise: float = 1.5) -> Labelled:
    labels = np.arange(count) % 3
    centres = np.random.default_rng(9).normal(size=(3, dims))
    features = centres[labels] + rng.normal(scale=noise, size=(count, dims))
    return Labelled(features.astype(np.float32), labels)


def test_each_tenth_of_the_dimensions_has_at_least_one():
    assert cuts_of(3) == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3]
    assert cuts_of(512) == [51, 102, 154, 205, 256, 307, 358, 410, 461, 512]


@pytest.mark.parametrize("offset", [0, 3000])  # single precision blurs directions that are alike
def test_knn_equals_scikit_learn_on_every_subset(offset, rng):
    train, val = blobs(120, 10, rng), blobs(60, 10, rng)
    train.features[:], val.features[:] = train.features + offset, val.features + offset
    order, cuts = rng.permutation(10), [2, 2, 5, 10]
    hits = knn_hits_along(train, val, order, cuts)
    for accuracy, cut in zip(hits.mean(axis=1), cuts, strict=True):
        reference = KNeighborsClassifier(
            20, metric="cosine", algorithm="brute", weights=lambda far: np.exp((1 - far) / 0.07)
        )
        wide = [split.features.astype(np.float64)[:, order[:cut]] for split in (train, val)]
        reference.fit(wide[0], train.labels)
        assert accuracy == pytest.approx(reference.score(wide[1], val.labels), abs=1 / 60)


def plain_choice(features: np.ndarray, labels: np.ndarray, unit: float) -> float:
    """The penalty that generalised cross-validation chooses, from the matrices themselves."""
    count = len(labels)
    centred = features - features.mean(axis=0)
    targets = np.eye(labels.max() + 1)[labels]
    targets = targets - targets.mean(axis=0)
    errors = {}
    for strength in PENALTIES:
        gram = centred.T @ centred + strength * unit * count * np.eye(centred.shape[1])
        hat = centred @ np.linalg.solve(gram, centred.T)
        residual = np.mean(np.sum((targets - hat @ targets) ** 2, axis=1))
        errors[strength * unit * count] = residual / (1 - (1 + np.trace(hat)) / count) ** 2
    return min(errors, key=errors.__getitem__)


@pytest.mark.parametrize("noise", [0.5, 2.0])
def test_ridge_equals_scikit_learn_on_every_subset(noise, rng):
    train, val = blobs(120, 80, rng, noise), blobs(60, 80, rng, noise)
    order, cuts = rng.permutation(80), [1, 12, 80]
    hits = NestedRidge(train).hits_along(val, order, cuts)
    wide = train.features.astype(np.float64)
    chosen = set()
    for correct, cut in zip(hits, cuts, strict=True):
        kept = order[:cut]
        alpha = plain_choice(wide[:, kept], train.labels, wide.var(axis=0).mean())
        reference = Ridge(alpha=alpha).fit(wide[:, kept], np.eye(3)[train.labels])
        predicted = reference.predict(val.features[:, kept]).argmax(axis=1)
        np.testing.assert_array_equal(correct, predicted == val.labels)
        chosen.add(alpha)
    assert len(chosen) > 1


def test_damping_planted_confounders(rng):
    """Dimensions 0 to 3 tell the class; 4 to 19 are strong and tell nothing of it."""

    def planted(count: int) -> Labelled:
        labels = np.arange(count) % 4
        signal = np.eye(4)[labels] + rng.normal(scale=0.2, size=(count, 4))
        confounder = rng.normal(scale=2, size=(count, 16))
        return Labelled(np.hstack([signal, confounder]).astype(np.float32), labels)

    train, val = planted(400), planted(200)
    mask = np.r_[np.full(4, 0.9), np.linspace(0.1, 0.2, 16)]
    curves = subset_curves(train, val, mask, 8, rng)
    knn, ridge = curves["knn"], curves["ridge"]
    assert knn.top is not None and knn.bottom is not None
    assert knn.top[1] > 0.95  # 20 % of the dimensions: the four that tell the class
    assert knn.bottom[1] < 0.45  # chance is 0.25
    assert ridge.full > 0.95 > 0.6 > knn.full
    assert knn.gain > 3 * knn.gain_error > 0
    assert (knn.draws[:, -1] == knn.full).all()  # every order ends in the same full set
    assert knn.share_beating_full[-1] == 0 < knn.share_beating_full.max()


def test_the_best_subset_is_chosen_on_one_half_of_each_class():
    # right where a class's images come first, or last; never both
    labels = np.array([1, 0, 1, 0, 1, 0, 1, 0, 0])
    first = np.array([1, 1, 1, 1, 0, 1, 0, 0, 0], dtype=bool)
    full = np.zeros(9, dtype=bool)
    # the first one is chosen on the first halves, and right nowhere else
    assert held_out_gain(np.stack([[first, full], [~first, full]]), labels)[0] == 0


@pytest.mark.parametrize("copies", [1, 5])
def test_copies_among_the_images_are_no_evidence(copies, rng):
    # no subset is better than the full set; a film's frames stand side by side, class by class
    labels = np.repeat(np.arange(5), 400)
    clear = 0
    for _ in range(200):
        correct = np.repeat(rng.random((20, 3, 2000 // copies)) < 0.5, copies, axis=2)
        correct[:, -1] = correct[0, -1]
        gain, error = held_out_gain(correct, labels)
        clear += gain > 2 * error
    assert clear <= 14  # 2.3 % of 200 are 5; more than 14 are one case in 1,000
