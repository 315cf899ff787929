"""What runs of several seeds can tell: one linear model, and one family of comparisons.

Functions of a DataFrame with a line for each finished run: ``method``, ``seed``, and a column for
each measure. What is untrained takes no part in the model, measure ~ method + seed: methods and
seeds add up, and the runs of each method vary normally with a spread of their own (HC3 errors,
MacKinnon and White 1985).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import statsmodels.api as sm
from numpy.typing import NDArray
from scipy import optimize, stats

from metamask_solo.benchmark.schema import UNTRAINED_NAMES

Pair = tuple[str, str]
LEVEL = 0.05  # of a whole family
POWER = 0.8
LEAST_SEEDS = 3  # of each of two methods that are compared
LEAST_FREEDOM = 3  # degrees of freedom of the residuals
NO_SPREAD = 1e-9
# standard deviations of methods in simulations; only their ratios matter
SPREADS = (0.2, 0.7)


@dataclass(frozen=True)
class Model:
    """A fitted linear model of one measure.

    Attributes:
        fit: the result of statsmodels, its errors HC3.
        method: the method of each run that the model was fitted to.
    """

    fit: Any
    method: list[str]

    @property
    def seeds(self) -> dict[str, int]:
        """Runs of each method."""
        return {name: self.method.count(name) for name in sorted(set(self.method))}

    @property
    def freedom(self) -> int:
        """Degrees of freedom of the residuals."""
        return int(self.fit.df_resid)

    def contrasts(self, pairs: Sequence[Pair]) -> NDArray[np.float64]:
        """One method minus another as weights of the coefficients, shape (pairs, coefficients)."""
        weights = pd.DataFrame(0.0, index=range(len(pairs)), columns=self.fit.params.index)
        for line, (method_1, method_2) in enumerate(pairs):
            for method, sign in ((method_1, 1.0), (method_2, -1.0)):
                if f"method_{method}" in weights:  # the first method has no coefficient
                    weights.loc[line, f"method_{method}"] = sign
        return weights.to_numpy()

    @property
    def means(self) -> "pd.Series[float]":
        """Of each method, the mean that it has if each seed counts once."""
        design = pd.DataFrame(self.fit.model.exog, columns=self.fit.params.index)
        seeds = [name for name in design if name.startswith("seed_")]
        design[seeds] = design[seeds].drop_duplicates().mean().to_numpy()
        return (design @ self.fit.params).groupby(self.method).first()

    def enough(self, pair: Pair) -> bool:
        """Whether both methods have enough seeds, and the model enough degrees of freedom."""
        seeds = all(self.seeds.get(method, 0) >= LEAST_SEEDS for method in pair)
        return seeds and self.freedom >= LEAST_FREEDOM

    def varies(self, pair: Pair) -> bool:
        """Whether the difference of two methods of the model changes from seed to seed."""
        return float(self.fit.t_test(self.contrasts([pair])).sd.item()) > NO_SPREAD

    def compares(self, pair: Pair) -> bool:
        """Whether the runs tell the difference of two methods from chance."""
        return self.enough(pair) and self.varies(pair)


def fit(runs: pd.DataFrame, measure: str) -> Model | None:
    """The linear model of a measure; None where the runs leave nothing to estimate a spread from.

    A run that the model fits exactly, such as the only one of its method or of its seed, tells
    nothing of the spread (HC3 would divide by zero) and is left out.
    """
    runs = runs[~runs.method.isin(UNTRAINED_NAMES)].dropna(subset=[measure])
    while runs.method.nunique() > 1:
        design = pd.get_dummies(runs[["method", "seed"]].astype(str), drop_first=True, dtype=float)
        design.insert(0, "intercept", 1.0)
        basis, size, _ = np.linalg.svd(design.to_numpy(), full_matrices=False)
        leverage = (basis[:, size > NO_SPREAD] ** 2).sum(1)
        if leverage.max() < 1 - NO_SPREAD:
            if (size <= NO_SPREAD).any():  # methods without a common seed
                return None
            fitted = sm.OLS(runs[measure], design).fit(cov_type="HC3", use_t=True)
            return Model(fitted, runs.method.tolist())
        runs = runs[leverage < 1 - NO_SPREAD]
    return None


def compare(runs: pd.DataFrame, pairs: Sequence[Pair], measures: Sequence[str]) -> pd.DataFrame:
    """A family of comparisons: each pair of methods in each measure, corrected for their number.

    Returns:
        A line for each that can be compared: ``method``, ``baseline``, ``measure``, ``difference``
        (in the units of the measure), ``low`` and ``high`` (its interval; all of the family cover
        the truth together in 95 % of all cases, by Bonferroni), ``p`` (two-sided, corrected in the
        same way), ``clear`` (p is below 0.05, and 0 outside of the interval) and ``detectable``
        (see :func:`detectable_effect`). Runs that do not vary cannot be compared.
    """
    models = {measure: fit(runs, measure) for measure in measures}
    comparable = [
        (pair, measure, model)
        for pair in pairs
        for measure, model in models.items()
        if model is not None and model.compares(pair)
    ]
    lines = [
        {"method": pair[0], "baseline": pair[1], "measure": measure}
        | difference(model, pair, len(comparable))
        for pair, measure, model in comparable
    ]
    columns = ["method", "baseline", "measure", "difference", "low", "high", "p", "clear"]
    columns += ["detectable"]
    return pd.DataFrame(lines, columns=columns)


def difference(model: Model, pair: Pair, family: int) -> dict[str, Any]:
    """One method minus another, as :func:`compare` describes it, in a family of that size."""
    test = model.fit.t_test(model.contrasts([pair]))
    low, high = test.conf_int(LEVEL / family)[0]
    error = float(test.sd.item())
    p_value = min(1.0, family * float(test.pvalue))
    return {
        "difference": float(test.effect.item()),
        "low": float(low),
        "high": float(high),
        "p": p_value,
        "clear": p_value < LEVEL,
        "detectable": detectable_effect(error, model.freedom, family),
    }


def detectable_effect(error: float, freedom: int, family: int) -> float:
    """The minimum detectable effect: the true difference that a family shows with power 80 %.

    Args:
        error: the standard error of the difference.
        freedom: degrees of freedom of the residuals.
        family: the number of comparisons that are corrected for.
    """
    # libraries lose the noncentral t with few degrees of freedom: this is its definition, a normal
    # variable over the root of a χ² one, averaged over quantiles of that
    shares = (np.arange(10_000) + 0.5) / 10_000
    limits = stats.t.isf(LEVEL / 2 / family, freedom) * np.sqrt(
        stats.chi2.ppf(shares, freedom) / freedom
    )

    def lacking(size: float) -> float:
        return POWER - float(
            (stats.norm.cdf(size - limits) + stats.norm.cdf(-size - limits)).mean()
        )

    return error * float(optimize.brentq(lacking, 0, limits.max() + 10))


def detectable_with(model: Model, pairs: Sequence[Pair], family: int, seeds: int) -> float:
    """The largest minimum detectable effect of some comparisons if each method had so many seeds.

    Standard errors are taken to change as those of the balanced model do, from the fewest seeds.

    Args:
        model: of the runs that there are.
        pairs: of methods of the model.
        family: see :func:`detectable_effect`.
        seeds: at least 2.
    """
    error = float(model.fit.t_test(model.contrasts(pairs)).sd.max())
    now = min(model.seeds[method] for pair in pairs for method in pair)
    freedom = model.freedom if seeds == now else (len(model.seeds) - 1) * (seeds - 1)
    return detectable_effect(error * np.sqrt((now - 1) / (seeds - 1)), freedom, family)


def best_method(
    model: Model, methods: Iterable[str], family: int, same: Iterable[str] = ()
) -> tuple[str, list[str]]:
    """The method with the highest mean, and the methods that it is not clearly better than.

    It is clearly better than another as :func:`difference` says. Looking at the best one alone
    needs no further correction: to name a wrong one, it must beat the true best one (Hsu 1984).

    Args:
        model: of the measure.
        methods: those that may be the best; the model lacks some with a single run.
        family: the number of comparisons of the page.
        same: methods that are one and the same; none of them need be better than another.
    """
    best = str(model.means.idxmax())
    twins = {best, *same} if best in set(same) else {best}
    rivals = []
    for rival in sorted({*methods} - twins):
        clear = False
        if rival in model.seeds and model.compares((best, rival)):
            clear = difference(model, (best, rival), max(family, 1))["clear"]
        rivals += [] if clear else [rival]
    return best, rivals


def coverage(
    model: Model, pairs: Sequence[Pair], measures: int = 1, draws: int = 20_000
) -> tuple[float, float, float]:
    """How often intervals of this model cover the truth, in simulations with unequal spreads.

    Each draw gives each method a standard deviation from ``SPREADS``. The measures are simulated
    as independent.

    Args:
        model: whose methods and seeds are simulated.
        pairs: the comparisons in each measure.
        measures: their number.
        draws: simulated pages.

    Returns:
        In percent: of single intervals at 95 %, the lowest and the highest of the comparisons; and
        of all corrected intervals of a page together.
    """
    design = np.asarray(model.fit.model.exog)
    method = pd.Categorical(model.method).codes
    solve = np.linalg.pinv(design)
    hat = design @ solve
    weights = model.contrasts(pairs) @ solve
    random = np.random.default_rng(0)
    spreads = random.uniform(*SPREADS, (draws, len(model.seeds)))
    noise = random.standard_normal((draws, len(method))) * spreads[:, method]
    squares = ((noise - noise @ hat) / (1 - np.diag(hat))) ** 2
    t = np.abs(noise @ weights.T) / np.sqrt(squares @ (weights**2).T)
    family = len(pairs) * measures
    single = 100 * (t < stats.t.ppf(1 - LEVEL / 2, model.freedom)).mean(0)
    together = (t < stats.t.ppf(1 - LEVEL / 2 / family, model.freedom)).all(1).mean() ** measures
    return float(single.min()), float(single.max()), 100 * float(together)


def differences(runs: pd.DataFrame, pair: Pair, measure: str) -> "pd.Series[float]":
    """One method minus another, by the seeds that both have."""
    values = runs[runs.method.isin(pair)].pivot(index="seed", columns="method", values=measure)
    values = values.reindex(columns=list(pair))
    return (values[pair[0]] - values[pair[1]]).dropna()


def noise_floor(runs: pd.DataFrame, pair: Pair, measure: str) -> tuple[float, int]:
    """Root mean square of the differences of two methods with the same seed, and their number."""
    of_seeds = differences(runs, pair, measure)
    return float(np.sqrt((of_seeds**2).mean())), len(of_seeds)
