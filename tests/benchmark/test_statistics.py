"""The analysis against statsmodels called by hand, and against simulations."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as smf
from scipy import stats

from metamask_solo.benchmark import statistics

ROWS = Path(__file__).parents[2] / "docs" / "results" / "cifar10.csv"
PAIRS = [
    ("metamask", "joint"),
    ("heads", "joint"),
    ("fast", "joint"),
    ("heads", "metamask"),
    ("fast", "metamask"),
    ("joint", "simclr"),
    ("joint", "barlow_twins"),
    ("joint", "vicreg"),
]


@pytest.fixture(scope="module")
def cifar10() -> pd.DataFrame:
    rows = pd.read_csv(ROWS)
    return rows[~rows.method.isin(["random", "pixels"])]


def simulated(methods: int, seeds: int, draw: np.random.Generator, **shift: float) -> pd.DataFrame:
    """Runs whose methods have spreads from 0.2 to 0.7; ``shift`` is added to a method."""
    spreads = draw.uniform(0.2, 0.7, methods)
    of_seed = draw.normal(0, 1, seeds)
    lines = [
        {
            "method": f"m{m}",
            "seed": s,
            "knn": 50 + of_seed[s] + spreads[m] * draw.normal() + shift.get(f"m{m}", 0.0),
        }
        for m in range(methods)
        for s in range(seeds)
    ]
    return pd.DataFrame(lines)


@pytest.mark.parametrize("measure", ["knn", "linear"])
def test_the_table_is_that_of_statsmodels_by_hand(cifar10: pd.DataFrame, measure: str) -> None:
    family = statistics.compare(cifar10, PAIRS, ["knn", "linear"])
    assert len(family) == 16

    fitted = smf.ols(f"{measure} ~ C(method) + C(seed)", cifar10).fit(cov_type="HC3", use_t=True)
    assert fitted.df_resid == 26
    for method, baseline in PAIRS:
        terms = [
            f"{sign} C(method)[T.{name}]"
            for sign, name in (("", method), ("-", baseline))
            if f"C(method)[T.{name}]" in fitted.params
        ]
        test = fitted.t_test(f"{' '.join(terms)} = 0")
        of_pair = (family.method == method) & (family.baseline == baseline)
        (line,) = family[of_pair & (family.measure == measure)].itertuples()
        low, high = test.conf_int(0.05 / 16)[0]
        assert line.difference == pytest.approx(test.effect.item())
        assert (line.low, line.high) == pytest.approx((low, high))
        assert line.p == pytest.approx(min(1, 16 * float(test.pvalue)), abs=1e-12)
        assert line.clear == (low > 0 or high < 0)


def test_the_best_method_of_cifar10(cifar10: pd.DataFrame) -> None:
    same = ("joint", "fixed_mask")
    for measure in ("knn", "linear"):
        for rows, best, above_all in (
            (cifar10, "vicreg", True),
            (cifar10[cifar10.method != "vicreg"], "simclr", False),
        ):
            model = statistics.fit(rows, measure)
            assert model is not None
            name, rivals = statistics.best_method(model, rows.method.unique(), 16, same)
            assert (name, not rivals) == (best, above_all)
            means = rows.groupby("method")[measure].mean()  # methods have other numbers of seeds
            assert model.means[name] == pytest.approx(means[name], abs=0.5)


@pytest.mark.parametrize(("methods", "seeds"), [(8, 5), (4, 3)])
def test_the_minimum_detectable_effect_is_shown_in_four_of_five_cases(
    methods: int, seeds: int
) -> None:
    """By the corrected test, on average over unequal spreads; HC3 written out for whole designs."""
    draw = np.random.default_rng(1)
    freedom, family, draws = (methods - 1) * (seeds - 1), 2 * (methods - 1), 20_000
    spreads = draw.uniform(0.2, 0.7, (draws, methods, 1))
    noise = draw.normal(size=(draws, methods, seeds)) * spreads
    of_method, of_seed = noise.mean(2, keepdims=True), noise.mean(1, keepdims=True)
    residuals = noise - of_method - of_seed + noise.mean((1, 2), keepdims=True)
    squares = (residuals / (freedom / (methods * seeds))) ** 2
    error = np.sqrt((squares[:, 0] + squares[:, 1]).sum(1)) / seeds
    one = statistics.detectable_effect(1.0, freedom, family)

    # the effect that a page with these spreads states on average
    true_error = np.sqrt((spreads[:, :2, 0] ** 2).sum(1) / seeds)
    stated = one * true_error * np.mean(error / true_error)
    differences = of_method[:, 0, 0] - of_method[:, 1, 0] + stated
    limit = stats.t.ppf(1 - 0.05 / 2 / family, freedom)
    power = (differences / error > limit).mean()
    assert 0.72 < power < 0.88, power


@pytest.mark.parametrize(("freedom", "family"), [(1, 2), (2, 3), (3, 12), (26, 16)])
def test_the_minimum_detectable_effect_has_its_power(freedom: int, family: int) -> None:
    effect = statistics.detectable_effect(1.0, freedom, family)
    draw = np.random.default_rng(8)
    error = np.sqrt(draw.chisquare(freedom, 400_000) / freedom)
    t = (effect + draw.normal(size=400_000)) / error
    limit = stats.t.ppf(1 - 0.05 / 2 / family, freedom)
    assert (np.abs(t) > limit).mean() == pytest.approx(0.8, abs=0.003)


def test_the_coverage_that_a_page_states_is_that_of_its_intervals() -> None:
    draw = np.random.default_rng(2)
    pairs = [("m0", "m1"), ("m2", "m1")]
    model = statistics.fit(simulated(3, 3, draw), "knn")
    assert model is not None
    low, high, together = statistics.coverage(model, pairs)
    single, both = np.zeros(2), 0
    for _ in range(500):
        runs = simulated(3, 3, draw)
        fitted = smf.ols("knn ~ C(method) + C(seed)", runs).fit(cov_type="HC3", use_t=True)
        contrasts = ("C(method)[T.m1] = 0", "C(method)[T.m2] - C(method)[T.m1] = 0")
        t = np.abs([fitted.t_test(contrast).tvalue.item() for contrast in contrasts])
        single += t < stats.t.ppf(0.975, 4)
        both += bool((t < stats.t.ppf(1 - 0.0125, 4)).all())
    assert 100 * single.min() / 500 == pytest.approx(low, abs=2.5)
    assert 100 * single.max() / 500 == pytest.approx(high, abs=2.5)
    assert 100 * both / 500 == pytest.approx(together, abs=2.5)


def test_what_runs_cannot_tell_is_not_compared() -> None:
    draw = np.random.default_rng(3)
    pairs = [("m0", "m1"), ("m0", "m2")]
    for methods, seeds, comparisons in ((8, 2, 0), (2, 3, 0), (2, 4, 1), (3, 3, 2), (8, 1, 0)):
        runs = simulated(methods, seeds, draw)
        assert len(statistics.compare(runs, pairs, ["knn"])) == comparisons, (methods, seeds)
    # one method with two seeds among others that have five
    runs = simulated(4, 5, draw)
    runs = runs[(runs.method != "m1") | (runs.seed < 2)]
    assert list(statistics.compare(runs, pairs, ["knn"]).baseline) == ["m2"]
    model = statistics.fit(runs, "knn")
    assert model is not None
    best, rivals = statistics.best_method(model, [*model.seeds, "once"], 2)
    assert {"m1", "once"} <= {best, *rivals}
    # methods without a common seed
    runs = simulated(4, 6, draw)
    early = runs.method.isin(["m0", "m1"])
    apart = runs[(early & (runs.seed < 3)) | (~early & (runs.seed >= 3))]
    assert statistics.compare(apart, pairs, ["knn"]).empty
    # runs that do not vary, or by their seeds alone
    runs = simulated(3, 3, draw)
    for same in (runs.assign(knn=50.0), runs.assign(knn=runs.seed + (runs.method == "m0"))):
        assert statistics.compare(same, pairs, ["knn"]).empty


def test_a_run_that_tells_nothing_of_the_spread_changes_nothing() -> None:
    """HC3 divides by one minus its leverage."""
    runs = simulated(3, 4, np.random.default_rng(5))
    pairs = [("m0", "m1"), ("m9", "m1")]
    alone = [("m9", 0, 1.0), ("m0", 9, 99.0), ("m8", 7, 7.0)]  # of its method, its seed, or both
    more = pd.DataFrame(alone, columns=["method", "seed", "knn"])
    expected = statistics.compare(runs, pairs, ["knn"])
    comparisons = statistics.compare(pd.concat([runs, more]), pairs, ["knn"])
    pd.testing.assert_frame_equal(comparisons, expected)


def test_more_seeds_show_less() -> None:
    """The forecast for five seeds from three is near what five seeds show."""
    draw = np.random.default_rng(7)
    pair, forecasts = ("m0", "m1"), []
    for _ in range(200):
        few, more = (statistics.fit(simulated(4, seeds, draw), "knn") for seeds in (3, 5))
        assert few is not None and more is not None
        shown = statistics.difference(more, pair, 3)["detectable"]
        forecasts.append([statistics.detectable_with(few, [pair], 3, 5), shown])
    forecast, real = np.sqrt((np.array(forecasts) ** 2).mean(0))
    assert forecast == pytest.approx(real, rel=0.15)
