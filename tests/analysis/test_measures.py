"""Measures on features whose answer is known."""

import numpy as np
import pytest
from scipy import stats
from sklearn.feature_selection import f_classif

from metamask_solo.analysis import measures
from metamask_solo.analysis.measures import explained_share, rank_correlation, redundancy


def orthogonal(count: int, dims: int, rng: np.random.Generator) -> np.ndarray:
    """Columns that are centred, of variance 1, and uncorrelated."""
    columns = rng.normal(size=(count, dims))
    basis, _ = np.linalg.qr(columns - columns.mean(axis=0))
    return basis * np.sqrt(count)


def test_blocks_cover_every_row_once(monkeypatch):
    monkeypatch.setattr(measures, "BLOCK_VALUES", 10)
    assert [(b.start, b.stop) for b in measures.blocks(7, 4)] == [(0, 2), (2, 4), (4, 6), (6, 7)]
    assert [(b.start, b.stop) for b in measures.blocks(2, 99)] == [(0, 1), (1, 2)]


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
    # scaling a dimension changes the covariance, and no correlation
    plain, masked = redundancy(features, mask).values()
    assert plain.off_diagonal_energy == pytest.approx(masked.off_diagonal_energy)
    assert plain.off_diagonal_share != pytest.approx(masked.off_diagonal_share)


def test_rankme_is_that_of_the_singular_values(rng):
    for features in (rng.normal(size=(60, 9)), rng.normal(size=(12, 30))):  # also of low rank
        share = np.linalg.svd(features.astype(np.float32), compute_uv=False).astype(float)
        share /= share.sum()
        of = redundancy(features.astype(np.float32))["plain"]
        assert of.rankme == pytest.approx(np.exp(stats.entropy(share)), rel=1e-6)


def test_uncorrelated_dimensions_have_no_redundancy(rng):
    of = redundancy(orthogonal(500, 6, rng))["plain"]
    assert of.off_diagonal_energy == pytest.approx(0, abs=1e-15)
    assert of.off_diagonal_share == pytest.approx(0, abs=1e-12)
    assert of.rankme == pytest.approx(6)


def test_a_duplicated_dimension(rng):
    base = orthogonal(500, 4, rng)
    of = redundancy(np.column_stack([base, -2 * base[:, 0]]))["plain"]
    assert of.correlation[0, 4] == pytest.approx(-1)
    assert of.off_diagonal_energy == pytest.approx(1 / 10)  # one pair of ten
    # covariance: diagonal 1, 1, 1, 1, 4 and one pair of -2
    assert of.off_diagonal_share == pytest.approx(8 / (4 + 16 + 8))


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


def test_explained_share_orders_dimensions_like_anova(rng, monkeypatch):
    labels = np.arange(300) % 3
    features = rng.normal(size=(300, 5)) + labels[:, None] * np.array([0, 0.2, 1, 5, -2])
    share = explained_share(features, np.eye(3)[labels])
    f, _ = f_classif(features, labels)
    np.testing.assert_allclose(share, f * 2 / (f * 2 + 297))
    monkeypatch.setattr(measures, "BLOCK_VALUES", 700)
    np.testing.assert_allclose(explained_share(features, np.eye(3)[labels]), share)


def test_explained_share_of_a_planted_confounder(rng):
    labels, photograph = np.arange(400) % 4, np.arange(400) // 4 % 2
    colours = rng.uniform(size=(400, 3))
    columns = [labels == 2, photograph * 3.0 + 1, colours @ [1.0, -2.0, 0.5] + 7, np.full(400, 2.5)]
    features = np.column_stack(columns).astype(np.float32)
    of_class = explained_share(features, np.eye(4)[labels])
    np.testing.assert_allclose(of_class[[0, 1, 3]], [1, 0, 0], atol=1e-9)
    of_photograph = explained_share(features, np.eye(2)[photograph])
    np.testing.assert_allclose(of_photograph[:2], [0, 1], atol=1e-9)
    assert explained_share(features, colours)[2] == pytest.approx(1, abs=1e-6)


def test_rank_correlation_agrees_with_scipy(rng):
    x = rng.normal(size=80).round(1)  # with ties
    y = x + rng.normal(size=80)
    of = rank_correlation(x, y, rng, permutations=999, resamples=500)
    assert of is not None
    assert of.rho == pytest.approx(stats.spearmanr(x, y).statistic)
    reference = stats.bootstrap(
        (x, y), lambda x, y: stats.spearmanr(x, y).statistic, paired=True, vectorized=False,
        n_resamples=500, method="percentile",
    ).confidence_interval  # fmt: skip
    assert (of.low, of.high) == pytest.approx(tuple(reference), abs=0.05)
    assert of.p_value == pytest.approx(1 / 1000)


def test_rank_correlation_p_value(rng):
    # of the 24 orders of four values, the increasing and the decreasing one reach |rho| = 1
    of = rank_correlation(np.arange(4.0), np.arange(4.0), rng, permutations=20_000, resamples=2)
    assert of is not None and of.p_value == pytest.approx(2 / 24, abs=0.008)
    # under the null hypothesis p is uniform
    pairs = rng.normal(size=(60, 2, 30))
    found = [rank_correlation(x, y, rng, permutations=199, resamples=2) for x, y in pairs]
    assert stats.kstest([one.p_value for one in found if one], "uniform").pvalue > 0.01


def test_rank_correlation_is_undefined_for_a_constant_mask(rng):
    assert rank_correlation(np.full(9, 0.5), np.arange(9.0), rng) is None
    assert rank_correlation(np.arange(2.0), np.arange(2.0), rng) is None
