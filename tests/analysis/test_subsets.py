"""Probes on nested subsets of dimensions, against scikit-learn and on planted features."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.neighbors import KNeighborsClassifier

from metamask_solo.analysis import measures
from metamask_solo.analysis.subsets import (
    PENALTIES,
    Split,
    SubsetCurves,
    cuts_of,
    held_out_gain,
    knn_along,
    linear_along,
    ridge_system,
    subset_curves,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def blobs(count: int, dims: int, rng: np.random.Generator, noise: float = 1.5) -> Split:
    labels = np.arange(count) % 3
    centres = np.random.default_rng(9).normal(size=(3, dims))
    features = centres[labels] + rng.normal(scale=noise, size=(count, dims))
    return Split(features.astype(np.float32), labels)


def test_cuts():
    assert cuts_of(512)[0] == 51 and cuts_of(512)[-1] == 512
    assert cuts_of(3) == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3]


def test_knn_equals_scikit_learn_on_every_subset(rng, monkeypatch):
    train, val = blobs(120, 10, rng), blobs(60, 10, rng)
    order, cuts = rng.permutation(10), [2, 2, 5, 10]
    found = knn_along(train, val, order, cuts, k=7, temperature=0.2)
    for accuracy, cut in zip(found.mean(axis=1), cuts, strict=True):
        reference = KNeighborsClassifier(
            7, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.2)
        )
        reference.fit(train.features[:, order[:cut]], train.labels)
        assert accuracy == pytest.approx(reference.score(val.features[:, order[:cut]], val.labels))
    monkeypatch.setattr(measures, "BLOCK_VALUES", 5_000)
    np.testing.assert_array_equal(knn_along(train, val, order, cuts, k=7, temperature=0.2), found)


@pytest.mark.parametrize("change", ["offset", "constant", "large", "small"])
def test_knn_of_features_that_single_precision_blurs(change, rng):
    train, val = blobs(300, 20, rng), blobs(200, 20, rng)
    for split in (train, val):
        if change == "offset":
            split.features[:] += 3000
        elif change == "constant":
            split.features[:, 3] = 30_000
        else:
            split.features[:] *= 1e19 if change == "large" else 1e-25
    found = knn_along(train, val, np.arange(20), [20]).mean()
    near = KNeighborsClassifier(
        20, metric="cosine", algorithm="brute", weights=lambda far: np.exp((1 - far) / 0.07)
    )
    size = float(np.abs(train.features).max())  # scikit-learn takes tiny ones for zeros
    near.fit(train.features.astype(np.float64) / size, train.labels)
    expected = near.score(val.features.astype(np.float64) / size, val.labels)
    assert expected > 0.7
    assert found == pytest.approx(expected, abs=0.01)


def test_knn_in_the_order_of_the_features(rng):
    train, val = blobs(50, 6, rng), blobs(30, 6, rng)
    np.testing.assert_array_equal(
        knn_along(train, val, slice(None), [6]), knn_along(train, val, np.arange(6), [6])
    )


def test_knn_survives_dead_dimensions_and_few_images():
    train = Split(np.array([[0, 1], [0, -1]], dtype=np.float32), np.array([0, 1]))
    val = Split(np.array([[0, 2], [0, -3]], dtype=np.float32), np.array([0, 1]))
    np.testing.assert_array_equal(
        knn_along(train, val, np.arange(2), [1, 2]), [[True, False], [True, True]]
    )


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
def test_linear_probe_equals_scikit_learn_on_every_subset(noise, rng, monkeypatch):
    train, val = blobs(120, 80, rng, noise), blobs(60, 80, rng, noise)
    order, cuts = rng.permutation(80), [1, 12, 80]
    found = linear_along(ridge_system(train), val, order, cuts)
    wide = train.features.astype(np.float64)
    chosen = []
    for correct, cut in zip(found, cuts, strict=True):
        kept = order[:cut]
        alpha = plain_choice(wide[:, kept], train.labels, wide.var(axis=0).mean())
        reference = Ridge(alpha=alpha).fit(wide[:, kept], np.eye(3)[train.labels])
        predicted = reference.predict(val.features[:, kept]).argmax(axis=1)
        np.testing.assert_array_equal(correct, predicted == val.labels)
        chosen.append(alpha)
    assert len(set(chosen)) > 1
    monkeypatch.setattr(measures, "BLOCK_VALUES", 70)
    np.testing.assert_array_equal(linear_along(ridge_system(train), val, order, cuts), found)


def test_the_penalty_is_about_as_good_as_that_of_leave_one_out(rng):
    train, val = blobs(150, 140, rng, 4.0), blobs(600, 140, rng, 4.0)
    found = linear_along(ridge_system(train), val, np.arange(140), [140]).mean()
    wide = train.features.astype(np.float64)
    alphas = np.array(PENALTIES) * 150 * wide.var(axis=0).mean()
    reference = RidgeCV(alphas=alphas).fit(wide, np.eye(3)[train.labels])
    expected = np.mean(reference.predict(val.features).argmax(axis=1) == val.labels)
    weak = Ridge(alpha=alphas[-1]).fit(wide, np.eye(3)[train.labels])
    overfitted = np.mean(weak.predict(val.features).argmax(axis=1) == val.labels)
    assert found == pytest.approx(expected, abs=0.02)
    assert found > overfitted + 0.1


def test_directions_of_tiny_variance_are_used_where_they_tell_the_class(rng):
    spread = 1 / np.arange(1, 201) ** 2
    train, val = blobs(600, 200, rng, 1.0), blobs(400, 200, rng, 1.0)
    train, val = train.masked(spread), val.masked(spread)
    found = linear_along(ridge_system(train), val, np.arange(200), [200]).mean()
    wide = train.features.astype(np.float64)
    alphas = 10.0 ** np.arange(2, -13, -1) * 600 * wide.var(axis=0).mean()
    reference = RidgeCV(alphas=alphas).fit(wide, np.eye(3)[train.labels])
    expected = np.mean(reference.predict(val.features).argmax(axis=1) == val.labels)
    assert found == pytest.approx(expected, abs=0.02)


def test_no_subset_is_better_where_all_dimensions_are_alike(rng):
    # every dimension tells the same of the class, with noise of its own, and the images are few:
    # a probe that overfits with all dimensions would find that some are better left out
    gains = []
    for _ in range(10):
        train, val = alike(300, rng), alike(1000, rng)
        gains.append(subset_curves(train, val, None, draws=10, rng=rng)["linear"].gain)
    assert np.mean(gains) < 2 * np.std(gains) / np.sqrt(10)


def alike(count: int, rng: np.random.Generator) -> Split:
    """Four classes in eight directions, spread over 200 dimensions by a fixed random map."""
    labels = np.arange(count) % 4
    hidden = np.eye(8)[labels] * 2 + rng.normal(size=(count, 8))
    spread = np.random.default_rng(3).normal(size=(8, 200))
    features = hidden @ spread + rng.normal(scale=3, size=(count, 200))
    return Split(features.astype(np.float32), labels)


def test_linear_probe_survives_collapsed_features(rng):
    # all images have the same features, up to rounding in single precision
    labels = np.arange(60) % 3
    features = np.full((60, 40), 3.7) * (1 + 1e-7 * rng.normal(size=(60, 40)))
    train = Split(features.astype(np.float32), labels)
    found = linear_along(ridge_system(train), train, np.arange(40), [4, 40])
    assert found.shape == (2, 60)


def test_linear_probe_survives_constant_features():
    train = Split(np.zeros((4, 3), dtype=np.float32), np.array([0, 0, 0, 1]))
    found = linear_along(ridge_system(train), train, np.arange(3), [1, 3])
    np.testing.assert_array_equal(found, [[True, True, True, False]] * 2)


def planted(count: int, rng: np.random.Generator) -> Split:
    """Dimensions 0 to 3 tell the class; 4 to 19 are strong and tell nothing of it."""
    labels = np.arange(count) % 4
    signal = np.eye(4)[labels] + rng.normal(scale=0.2, size=(count, 4))
    confounder = rng.normal(scale=2, size=(count, 16))
    return Split(np.hstack([signal, confounder]).astype(np.float32), labels)


def test_damping_planted_confounders(rng):
    train, val = planted(400, rng), planted(200, rng)
    mask = np.r_[np.full(4, 0.9), np.linspace(0.1, 0.2, 16)]
    curves = subset_curves(train, val, mask, draws=8, rng=rng)
    knn = curves["knn"]
    assert knn.top is not None and knn.bottom is not None
    assert knn.top[1] > 0.95  # 20 % of the dimensions: the four that tell the class
    assert knn.bottom[1] < 0.45  # chance is 0.25
    masked = knn_along(train.masked(mask), val.masked(mask), slice(None), [20]).mean()
    assert knn.full < 0.6 < masked
    assert curves["linear"].full > 0.95
    assert np.array_equal(knn.beating, knn.random > knn.full)
    assert knn.beating.any()
    assert knn.gain > 3 * knn.gain_error > 0


def test_full_set_is_the_same_in_every_draw(rng):
    curves = subset_curves(blobs(90, 12, rng), blobs(45, 12, rng), None, draws=5, rng=rng)
    for curve in curves.values():
        assert curve.random.shape == (5, 10)
        assert curve.top is None and curve.bottom is None
        assert (curve.random[:, -1] == curve.full).all()
        assert not curve.beating[:, -1].any()


def test_curves_are_deterministic_and_count_their_progress(rng):
    train, val = blobs(90, 12, rng), blobs(45, 12, rng)
    steps: list[int] = []

    def run(seed: int) -> dict[str, SubsetCurves]:
        generator = np.random.default_rng(seed)
        return subset_curves(train, val, np.arange(12.0), 4, generator, lambda: steps.append(1))

    first, again, other = run(0), run(0), run(1)
    assert len(steps) == 3 * (4 + 2)
    for probe in ("knn", "linear"):
        np.testing.assert_array_equal(first[probe].random, again[probe].random)
    assert any((first[p].random != other[p].random).any() for p in first)


def test_held_out_gain_of_a_better_subset(rng):
    full = rng.permutation(80) % 4 != 0  # 75 %
    better, worse = np.ones(80, dtype=bool), np.zeros(80, dtype=bool)
    gain, error = held_out_gain(np.stack([[worse, full], [better, full]]), np.arange(80) % 5)
    assert gain == pytest.approx(0.25)
    assert error >= np.sqrt(0.25 * 0.75 / 79)
    assert error == pytest.approx(np.sqrt(0.25 * 0.75 / 80), rel=0.25)


def test_the_best_subset_is_chosen_on_one_half_of_each_class():
    # right where a class's images come first, or last; never both
    labels = np.array([1, 0, 1, 0, 1, 0, 1, 0, 0])
    first = np.array([1, 1, 1, 1, 0, 1, 0, 0, 0], dtype=bool)
    full = np.zeros(9, dtype=bool)
    # the first one is chosen on the first halves, and right nowhere else
    assert held_out_gain(np.stack([[first, full], [~first, full]]), labels)[0] == 0


def test_held_out_gain_of_lucky_subsets_is_none(rng):
    # every subset is as good as the full set: the best of them looks better and is not
    labels = np.arange(100) % 4
    gains, lucky = [], []
    for _ in range(200):
        correct = rng.random((20, 3, 100)) < 0.8
        correct[:, -1] = correct[0, -1]
        gains.append(held_out_gain(correct, labels)[0])
        lucky.append(correct.mean(axis=2).max() - correct[0, -1].mean())
    assert np.mean(lucky) > 0.05
    assert abs(np.mean(gains)) < 3 * np.std(gains) / np.sqrt(200)


@pytest.mark.parametrize("copies", [1, 2, 5])
def test_copies_among_the_images_are_no_evidence(copies, rng):
    # no subset is better than the full set; a film's frames stand side by side, class by class
    labels = np.repeat(np.arange(5), 400)
    found = 0
    for _ in range(200):
        correct = np.repeat(rng.random((20, 3, 2000 // copies)) < 0.5, copies, axis=2)
        correct[:, -1] = correct[0, -1]
        gain, error = held_out_gain(correct, labels)
        found += gain > 2 * error
    assert found <= 14  # 2.3 % of 200 are 5; more than 14 are one case in 1,000


def test_held_out_gain_is_zero_where_the_full_set_is_best():
    full, worse = np.ones(10, dtype=bool), np.zeros(10, dtype=bool)
    assert held_out_gain(np.stack([[worse, full]]), np.arange(10) % 2) == (0, 0)
