"""What so many seeds can tell: paired comparisons of a family, the noise floor, the power.

Methods are compared by the differences of runs with the same seed.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from metamask_solo.benchmark.rows import Row, group

LEVEL = 0.05  # of a whole family
POWER = 0.8
SAME = 1e-9  # percentage points: what two differences that are one may be apart by rounding


@dataclass(frozen=True)
class Comparison:
    """One method minus another, in percentage points, over the seeds of both.

    Attributes:
        seeds: the number of differences.
        mean: of the differences.
        interval: covers the true mean, together with those of the whole family, in 95 % of all
            cases (Student's t, by Bonferroni); None with one seed, or where all differences are
            equal: of few images they often are, and nothing says then how they vary.
        p_value: of the two-sided paired t-test, corrected for the family by Holm; None where the
            interval is.
        detectable: the smallest true difference that so many seeds, with differences that vary as
            these do, would have shown in 80 % of all cases (two-sided test at 5 %, not corrected).
    """

    one: str
    other: str
    metric: str
    seeds: int
    mean: float
    interval: tuple[float, float] | None
    p_value: float | None
    detectable: float | None

    @property
    def clear(self) -> bool:
        """Whether the family's correction leaves a difference."""
        return self.p_value is not None and self.p_value < LEVEL


@dataclass(frozen=True)
class NoiseFloor:
    """By how much two runs of one method with one seed differ.

    Attributes:
        pairs: number of pairs.
        size: root of the mean of the squared differences, in percentage points.
        detectable: the smallest true difference that so many seeds would have shown in 80 % of all
            cases if pairs differed by this noise alone; None with one pair, or without noise.
    """

    pairs: int
    size: float
    detectable: float | None


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1); None for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def paired(one: Sequence[Row], other: Sequence[Row], metric: str) -> pd.DataFrame:
    """The values ``one`` and ``other`` for each seed that both have, in the order of the seeds.

    The pixels are the same with every seed.
    """
    values = pd.DataFrame({"one": _by_seed(one, metric), "other": _by_seed(other, metric)})
    for name, rows in (("one", one), ("other", other)):
        if rows and rows[0].method == "pixels":
            values[name] = values[name].ffill().bfill()
    return values.dropna().sort_index()


def _by_seed(rows: Sequence[Row], metric: str) -> "pd.Series[float]":
    found = {row.seed: row.metrics[metric] for row in rows if metric in row.metrics}
    return pd.Series(found, dtype=float)


def compare(
    pairs: Sequence[tuple[str, str]], groups: dict[str, list[Row]], metrics: Sequence[str]
) -> list[Comparison]:
    """A family of comparisons: each pair of methods in each metric, corrected for their number.

    Args:
        pairs: names of two groups; a pair without a common seed is left out.
        groups: rows of each method.
        metrics: accuracies in percent.
    """
    family = [
        (one, other, metric, values)
        for one, other in pairs
        for metric in metrics
        if len(values := paired(groups[one], groups[other], metric))
    ]
    tests = [_test(values) for *_, values in family]
    known = [test.pvalue for test in tests if test is not None]
    corrected = iter(multipletests(known, LEVEL, "holm")[1] if known else ())
    found = []
    for (one, other, metric, values), test in zip(family, tests, strict=True):
        mean, deviation = mean_and_deviation(list(values.one - values.other))
        interval = p_value = detectable = None
        if test is not None and deviation is not None:
            low, high = test.confidence_interval(1 - LEVEL / len(known))
            interval, p_value = (float(low), float(high)), float(next(corrected))
            detectable = detectable_effect(len(values)) * deviation
        found.append(
            Comparison(one, other, metric, len(values), mean, interval, p_value, detectable)
        )
    return found


def _test(values: pd.DataFrame) -> Any:
    """The paired t-test; None without spread, where it would divide by zero."""
    differences = values.one - values.other
    if differences.max() - differences.min() < SAME:
        return None
    return stats.ttest_rel(values.one, values.other)


def noise_floor(one: Sequence[Row], other: Sequence[Row], metric: str) -> NoiseFloor | None:
    """Of two methods that are one; None without a common seed."""
    values = paired(one, other, metric)
    if values.empty:
        return None
    size = math.sqrt(statistics.fmean((values.one - values.other) ** 2))
    known = len(values) > 1 and size > SAME
    return NoiseFloor(len(values), size, detectable_effect(len(values)) * size if known else None)


def detectable_effect(count: int) -> float:
    """The effect that a two-sided t-test of ``count`` differences finds with a power of 80 %.

    In units of the standard deviation of the differences.
    """
    solved = TTestPower().solve_power(nobs=count, alpha=LEVEL, power=POWER, alternative="two-sided")
    return float(solved)


def clear_winner(
    groups: dict[str, list[Row]], metric: str, same: tuple[str, str] | None = None
) -> str | None:
    """The method with the best mean, if it is clearly better than every other.

    That is: every comparison with it stays clear when corrected for their number.

    Args:
        same: two methods that are one, so that neither need be better than the other.
    """
    groups = {
        name: rows for name, rows in groups.items() if any(metric in row.metrics for row in rows)
    }
    if len(groups) < 2:
        return None
    best = best_of(groups, metric)
    twins = set(same) if same and best in same else {best}
    others = [name for name in groups if name not in twins]
    found = compare([(best, name) for name in others], groups, [metric])
    # over the seeds that two have in common, the better mean may be the other's
    above = all(c.clear and c.mean > 0 for c in found)
    return best if found and len(found) == len(others) and above else None


def best_settings(rows: Sequence[Row], measures: Sequence[str]) -> dict[str, list[Row]]:
    """Of each method the setting with the best mean; of equal ones, by the next measure.

    A setting takes part if no other of its method has more finished runs: means over fewer seeds
    are no match.
    """
    methods = dict.fromkeys(row.method for row in rows)
    found = {}
    for method in methods:
        groups = group([row for row in rows if row.method == method])
        if groups:
            most = max(map(len, groups.values()))
            whole = {name: runs for name, runs in groups.items() if len(runs) == most}
            best = best_of(whole, *measures)
            found[best] = whole[best]
    return found


def best_of(groups: dict[str, list[Row]], *measures: str) -> str:
    """The group with the highest mean; of equal ones, by the next measure."""

    def means(name: str) -> list[float]:
        found = ([row.metrics[m] for row in groups[name] if m in row.metrics] for m in measures)
        return [statistics.fmean(values) if values else -math.inf for values in found]

    return max(groups, key=means)
