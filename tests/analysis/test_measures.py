"""Measures on features whose answer is known."""

import numpy as np
import pytest
from scipy import stats
from sklearn.feature_selection import f_classif

from metamask_solo.analysis.measures import explained_share, rank_correlation, redundancy


def orthogonal(count: int, dims: int, rng: np.random.Generator) -> np.ndarray:
    """Columns that are centred, of variance 1, and uncorrelated."""
    columns = rng.normal(size=(count, dims))
    basis, _ = np.linalg.qr(columns - columns.mean(axis=0))
    return basis * np.sqrt(count)


def test_redundancy_equals_numpy(rng):
    features = (rng.normal(2, 3, size=(101, 7)) @ rng.normal(size=(7, 7))).astype(np.float32)
    mask = rng.uniform(size=7)
    wide = features.astype(np.float64)
    for version, values in (("plain", wide), ("masked", wide * mask)):
        of = redundancy(features, mask)[version]
        np.testing.assert_allclose(of.correlation, np.corrcoef(values.T), atol=1e-9)
        np.testing.assert_allclose(of.singular_values, np.linalg.svd(values, compute_uv=False))
        assert of.off_diagonal_energy == pytest.approx(
            np.mean(np.corrcoef(values.T)[~np.eye(7, dtype=bool)] ** 2)
        )


def test_constant_dimensions_are_left_out(rng):
    base = orthogonal(500, 2, rng)
    features = np.column_stack([base, base[:, 0], np.full(500, 3.7), np.zeros(500)])
    of = redundancy(features)["plain"]
    assert of.constant_dims == 2
    assert not of.correlation[3:].any()
    assert of.off_diagonal_energy == pytest.approx(1 / 3)
    collapsed = redundancy(np.ones((9, 3)))["plain"]
    assert (collapsed.off_diagonal_energy, collapsed.constant_dims) == (0, 3)
    assert collapsed.rankme == pytest.approx(1)


def test_explained_share_is_the_effect_size_of_anova(rng):
    labels = np.minimum(np.arange(300) % 4, 2)  # classes of unequal size
    features = rng.normal(size=(300, 5)) + labels[:, None] * np.array([0, 0.2, 1, 5, -2])
    f, _ = f_classif(features, labels)
    np.testing.assert_allclose(explained_share(features, labels), f * 2 / (f * 2 + 297))
    photograph = np.arange(300) // 3 % 2
    columns = [photograph * 3.0 + 1, labels == 2, np.full(300, 2.5)]
    planted = np.column_stack(columns).astype(np.float32)
    np.testing.assert_allclose(explained_share(planted, photograph), [1, 0, 0], atol=1e-9)


def test_rank_correlation_agrees_with_resampling(rng):
    x = rng.normal(size=200).round(1)  # with ties
    y = x + 2 * rng.normal(size=200)
    of = rank_correlation(x, y)

    def rho(x, y):
        return stats.spearmanr(x, y).statistic

    assert of["rho"] == pytest.approx(rho(x, y))
    resampled = [rho(x[draw], y[draw]) for draw in rng.integers(200, size=(1000, 200))]
    limits = np.quantile(resampled, [0.025, 0.975])
    assert (of["low"], of["high"]) == pytest.approx(tuple(limits), abs=0.04)
    x, y = x[:40], y[:40] - x[:40]
    shuffled = [abs(rho(rng.permutation(x), y)) for _ in range(2000)]
    of = rank_correlation(x, y)
    assert of["p"] == pytest.approx(np.mean(np.array(shuffled) >= abs(of["rho"])), abs=0.04)
    # undefined for a constant mask
    assert np.isnan([*rank_correlation(np.full(9, 0.5), np.arange(9.0)).values()]).all()
    assert rank_correlation(np.arange(9.0), np.arange(9.0))["rho"] == 1
