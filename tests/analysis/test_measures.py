"""Measures on features whose answer is known."""

import numpy as np
import pytest
from scipy import stats
from sklearn.feature_selection import f_classif

from metamask_solo.analysis import measures
from metamask_solo.analysis.measures import (
    correlation_matrix,
    explained_share,
    moments,
    off_diagonal_energy,
    off_diagonal_share,
    one_hot,
    rank_correlation,
    rankme,
    singular_values,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def orthogonal(count: int, dims: int, rng: np.random.Generator) -> np.ndarray:
    """Columns that are centred, of variance 1, and uncorrelated."""
    columns = rng.normal(size=(count, dims))
    basis, _ = np.linalg.qr(columns - columns.mean(axis=0))
    return basis * np.sqrt(count)


def test_moments_in_small_blocks_equal_numpy(rng, monkeypatch):
    features = rng.normal(2, 3, size=(101, 7)).astype(np.float32)
    monkeypatch.setattr(measures, "BLOCK_VALUES", 50)
    found = moments(features)
    wide = features.astype(np.float64)
    np.testing.assert_allclose(found.mean, wide.mean(axis=0))
    np.testing.assert_allclose(found.covariance, np.cov(wide.T, bias=True), atol=1e-12)
    mask = rng.uniform(size=7)
    np.testing.assert_allclose(found.masked(mask).second, (wide * mask).T @ (wide * mask) / 101)


def test_blocks_cover_every_row_once(monkeypatch):
    monkeypatch.setattr(measures, "BLOCK_VALUES", 10)
    assert [(b.start, b.stop) for b in measures.blocks(7, 4)] == [(0, 2), (2, 4), (4, 6), (6, 7)]
    assert [(b.start, b.stop) for b in measures.blocks(2, 99)] == [(0, 1), (1, 2)]


def test_uncorrelated_dimensions_have_no_redundancy(rng):
    found = moments(orthogonal(500, 6, rng))
    np.testing.assert_allclose(correlation_matrix(found), np.eye(6), atol=1e-12)
    assert off_diagonal_energy(correlation_matrix(found)) == pytest.approx(0, abs=1e-20)
    assert off_diagonal_share(found.covariance) == pytest.approx(0, abs=1e-12)
    assert rankme(singular_values(found)) == pytest.approx(6)


def test_a_duplicated_dimension(rng):
    base = orthogonal(500, 4, rng)
    found = moments(np.column_stack([base, -2 * base[:, 0]]))
    correlation = correlation_matrix(found)
    assert correlation[0, 4] == pytest.approx(-1)
    # one pair of the ten is fully correlated
    assert off_diagonal_energy(correlation) == pytest.approx(1 / 10)
    # covariance: diagonal 1, 1, 1, 1, 4 and one pair of -2
    assert off_diagonal_share(found.covariance) == pytest.approx(8 / (4 + 16 + 8))
    # singular values sqrt(500) times sqrt(5), 1, 1, 1, 0
    values = singular_values(found)
    np.testing.assert_allclose(values[:4], np.sqrt(500) * np.array([np.sqrt(5), 1, 1, 1]))
    assert values[4] == pytest.approx(0, abs=1e-5)


def test_scaling_changes_the_share_but_not_the_energy(rng):
    base = orthogonal(500, 4, rng)
    found = moments(np.column_stack([base, base[:, 0]]))
    masked = found.masked(np.array([1, 1, 1, 1, 0.1]))
    assert off_diagonal_energy(correlation_matrix(masked)) == pytest.approx(
        off_diagonal_energy(correlation_matrix(found))
    )
    assert off_diagonal_share(masked.covariance) < 0.01 < off_diagonal_share(found.covariance)


def test_constant_dimensions_are_left_out(rng):
    base = orthogonal(500, 2, rng)
    features = np.column_stack([base, base[:, 0], np.full(500, 3.7), np.zeros(500)])
    correlation = correlation_matrix(moments(features))
    assert np.isfinite(correlation).all()
    assert not correlation[3:].any()
    assert off_diagonal_energy(correlation) == pytest.approx(1 / 3)
    assert off_diagonal_energy(correlation_matrix(moments(np.ones((9, 3))))) == 0


def test_rankme_of_known_spectra():
    assert rankme(np.array([2.0, 0, 0])) == pytest.approx(1)
    assert rankme(np.full(8, 0.3)) == pytest.approx(8)
    assert rankme(np.array([3.0, 1.0])) == pytest.approx(4 / 3**0.75)
    assert rankme(np.zeros(3)) == 0


def test_singular_values_equal_numpy(rng):
    features = rng.normal(1, 1, size=(60, 5))
    expected = np.linalg.svd(features, compute_uv=False)
    np.testing.assert_allclose(singular_values(moments(features)), expected)


def test_explained_share_orders_dimensions_like_anova(rng):
    labels = np.arange(300) % 3
    features = rng.normal(size=(300, 5)) + labels[:, None] * np.array([0, 0.2, 1, 5, -2])
    share = explained_share(features, one_hot(labels, 3))
    f, _ = f_classif(features, labels)
    np.testing.assert_allclose(share, f * 2 / (f * 2 + 297))


def test_explained_share_of_a_planted_confounder(rng):
    count = 400
    labels, photograph = np.arange(count) % 4, np.arange(count) // 4 % 2
    colours = rng.uniform(size=(count, 3))
    features = np.column_stack(
        [
            labels == 2,
            photograph * 3.0 + 1,
            colours @ [1.0, -2.0, 0.5] + 7,
            np.full(count, 2.5),
        ]
    ).astype(np.float32)
    of_class = explained_share(features, one_hot(labels, 4))
    of_photograph = explained_share(features, one_hot(photograph, 2))
    of_colour = explained_share(features, colours)
    np.testing.assert_allclose(of_class[:2], [1, 0], atol=1e-9)
    np.testing.assert_allclose(of_photograph[:2], [0, 1], atol=1e-9)
    assert of_colour[2] == pytest.approx(1, abs=1e-6)
    assert of_class[3] == of_photograph[3] == of_colour[3] == 0


def test_explained_share_in_small_blocks(rng, monkeypatch):
    features, predictors = rng.normal(size=(50, 9)), rng.normal(size=(50, 2))
    whole = explained_share(features, predictors)
    monkeypatch.setattr(measures, "BLOCK_VALUES", 100)
    np.testing.assert_allclose(explained_share(features, predictors), whole)


def test_rank_correlation_agrees_with_scipy(rng):
    x = rng.normal(size=80).round(1)  # with ties
    y = x + rng.normal(size=80)
    found = rank_correlation(x, y, rng, permutations=999, resamples=500)
    assert found is not None
    assert found.rho == pytest.approx(stats.spearmanr(x, y).statistic)
    assert found.low < found.rho < found.high
    assert found.low > 0 and found.high < 1
    assert found.p_value == pytest.approx(1 / 1000)


def test_rank_correlation_of_unrelated_values_is_not_significant(rng):
    p_values = []
    for _ in range(60):
        found = rank_correlation(
            rng.normal(size=30), rng.normal(size=30), rng, permutations=199, resamples=10
        )
        assert found is not None
        p_values.append(found.p_value)
    # under the null hypothesis p is uniform
    assert stats.kstest(p_values, "uniform").pvalue > 0.01


def test_rank_correlation_p_value_is_exact_for_few_dimensions(rng):
    # of the 24 orders of four values, the increasing and the decreasing one reach |rho| = 1
    found = rank_correlation(np.arange(4.0), np.arange(4.0), rng, permutations=20_000)
    assert found is not None
    assert found.rho == pytest.approx(1)
    assert found.p_value == pytest.approx(2 / 24, abs=0.008)


def test_rank_correlation_is_undefined_for_a_constant_mask(rng):
    assert rank_correlation(np.full(9, 0.5), np.arange(9.0), rng) is None
    assert rank_correlation(np.arange(2.0), np.arange(2.0), rng) is None
