"""The HTML page of an analysis: one file, figures inline, nothing loaded from elsewhere."""

import base64
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from metamask_solo.analysis.records import (
    PROBES,
    Analysis,
    Curve,
    Information,
    Numbers,
    Versions,
)

TEMPLATE = "report.html.jinja"
INFORMATION = {
    # what a dimension can tell: name, and the sign of the correlation if damped dimensions
    # are confounders (0: a control, where no sign is expected)
    "class": ("class", 1),
    "photograph": ("background photograph", -1),
    "colour": ("background's mean colour", -1),
    "deviation": ("standard deviation (control)", 0),
}
# a mask whose largest and smallest weights are closer, relative to the largest, weighs all alike
LEAST_SPREAD = 0.1


def report_html(analysis: Analysis, figures: Mapping[str, bytes]) -> str:
    """Writes the page.

    Args:
        analysis: the content of analysis.json.
        figures: PNG files by name; a name that is missing has its section say why.

    Returns:
        A whole HTML document.
    """
    environment = Environment(
        loader=PackageLoader("metamask_solo", "analysis"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "base64": lambda content: base64.b64encode(content).decode(),
        "number": format,
        "pair": _pair,
        "subset_cells": _subset_cells,
        "information_cells": _information_cells,
    }
    template = environment.get_template(TEMPLATE)
    answered = answers(analysis.checkpoints)
    rows = len(_named_curves(analysis.checkpoints))
    return template.render(
        vars(analysis),
        figures=figures,
        probes=PROBES,
        answers=answered,
        clear_errors=clear_errors(max(rows, 1)),
    )


def answers(found: Sequence[Numbers]) -> list[str]:
    """Three sentences: did the mask spread, are there confounders, accuracy with and without."""
    return [_did_it_spread(found), _are_there_confounders(found), _does_it_help(found)]


def clear_errors(rows: int) -> float:
    """Standard errors that the best of ``rows`` gains passes by chance, in 2.5 % of cases."""
    return NormalDist().inv_cdf(1 - 0.025 / rows)


def _did_it_spread(found: Sequence[Numbers]) -> str:
    parts = []
    for one in found:
        if one.mask is None:
            continue
        values = one.mask.statistics
        largest = max(abs(values.min), abs(values.max))
        spread = values.max - values.min >= LEAST_SPREAD * largest > 0
        verdict = "spread out" if spread else "weighs all dimensions nearly alike"
        parts.append(f"{one.name} {verdict}, from {values.min:.4g} to {values.max:.4g}")
    return (
        f"The mask of {'; of '.join(parts)}." if parts else "No checkpoint has a mask of its own."
    )


def _named_curves(found: Sequence[Numbers]) -> list[tuple[str, Curve]]:
    """The rows of the table of gains."""
    return [
        (f"{one.name} ({PROBES[probe]})", curve)
        for one in found
        if one.subsets is not None
        for probe, curve in one.subsets.curves.items()
    ]


def _are_there_confounders(found: Sequence[Numbers]) -> str:
    curves = _named_curves(found)
    if not curves:
        return "Whether dimensions confound cannot be said without labels."
    least = clear_errors(len(curves))
    clear = [name for name, one in curves if one.held_out_gain > least * one.held_out_gain_error]
    if not clear:
        return (
            "There is no evidence of confounders: no subset of dimensions, chosen on one half of "
            "the validation images, is clearly better than all of them on the other half."
        )
    return f"There is evidence that some dimensions are better left out, in {', '.join(clear)}."


def _does_it_help(found: Sequence[Numbers]) -> str:
    if found[0].accuracy is None:
        return "Accuracies need labels; RankMe and redundancy below are no accuracy."
    parts = []
    for one in found:
        for probe, accuracy in (one.accuracy or {}).items():
            gain = accuracy.difference
            if gain is None:
                continue
            mean, low, high = (_signed(100 * each) for each in (gain.mean, gain.low, gain.high))
            parts.append(
                f"{one.name} {PROBES[probe]} {accuracy.masked:.1%} and {accuracy.plain:.1%} "
                f"(difference {mean} points, {low} to {high})"
            )
    if not parts:
        return "There are no masked features whose accuracy could be compared."
    return f"Accuracy with the mask and without it: {'; '.join(parts)}."


def _pair(found: Versions[Any], form: str, key: str | None = None) -> str:
    """Of the plain features, and after a slash of the masked ones where there are any."""
    values = [one if key is None else getattr(one, key) for _, one in found.items()]
    return " / ".join(format(value, form) for value in values)


def _subset_cells(curve: Curve, rates: Sequence[float]) -> list[str]:
    best, beating = max(curve.best), max(curve.share_beating_full)
    best_rate = rates[curve.best.index(best)]
    beating_rate = rates[curve.share_beating_full.index(beating)]
    gain, error = 100 * curve.held_out_gain, 100 * curve.held_out_gain_error
    half = rates.index(0.5)
    return [
        f"{curve.full:.1%}",
        f"{best:.1%} (at {best_rate:.0%})",
        f"{beating:.0%} (at {beating_rate:.0%})" if beating else "none",
        f"{_signed(gain)} ± {error:.2f} points",
        *(
            "no ranking" if ranked is None else f"{ranked[half]:.1%}"
            for ranked in (curve.top_by_mask, curve.bottom_by_mask)
        ),
    ]


def _information_cells(told: Information, kind: str) -> list[str]:
    name, expected = INFORMATION[kind]
    row = [name, f"{told.lowest_tenth:.3f}", f"{told.highest_tenth:.3f}"]
    rank = told.rank_correlation
    if rank is None:
        return [*row, "not defined", "", "", "constant values" if expected else ""]
    if expected == 0:
        verdict = ""
    elif rank.p_value >= 0.05:
        verdict = "not shown"
    else:
        verdict = "yes" if rank.rho * expected > 0 else "the opposite"
    interval = f"{_signed(rank.low)} to {_signed(rank.high)}"
    return [*row, _signed(rank.rho), interval, f"{rank.p_value:.4f}", verdict]


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")
