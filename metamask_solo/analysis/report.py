"""The folder that an analysis writes: figures, analysis.json, and report.html in one file."""

import base64
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from metamask_solo.analysis.figures import FIGURES, draw_figures
from metamask_solo.analysis.measure_checkpoint import (
    PROBES,
    SUBSET_TRAIN,
    SUBSET_VAL,
    Measures,
)
from metamask_solo.analysis.subsets import PENALTIES, RATES, SUBSET_PROBES, SubsetCurves
from metamask_solo.atomic_files import atomic_write
from metamask_solo.errors import UserError
from metamask_solo.evaluation.knn import DEFAULT_K, DEFAULT_TEMPERATURE
from metamask_solo.method.mask import nearly_alike

NUMBERS = "analysis.json"
SPLITS = {"train": "training", "val": "validation"}
DRAWN_ONLY = {"correlation", "history", "dimensions"}  # too large for analysis.json
# titles of columns and rows
REDUNDANCY = {
    "rankme": "RankMe",
    "off_diagonal_energy": "off-diagonal energy of the correlation",
    "constant_dims": "constant dimensions",
}
MASK = {"std": "standard deviation", "effective_dims": "effective dimensions"}
ACCURACY = {"difference": "masked − plain", "low": "95 % interval from", "high": "to"}
INFORMATION = {
    "lowest_tenth": "mean, lowest tenth",
    "highest_tenth": "mean, highest tenth",
    "rho": "ρ",
    "low": "95 % interval from",
    "high": "to",
    "p": "p",
    "verdict": "fits damped confounders?",
    "photograph": "background photograph",
    "deviation": "standard deviation (control)",
}
BOUNDS = {
    "contrastive_loss": "L_con (nats)",
    "intra_class_variance": "V",
    "negatives": "K",
    "lower": "lower bound (nats)",
    "cross_entropy": "L_CE (nats)",
    "upper": "upper bound (nats)",
    "width": "width (nats)",
    "inside": "inside?",
}
# of the correlation of what a dimension tells, if damped dimensions are confounders; 0: a control
SIGNS = {"class": 1, "photograph": -1, "deviation": 0}


def check_output(out: Path) -> None:
    """Makes the folder; raises UserError unless it is empty or holds an earlier analysis."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out}: {error.strerror}; name a folder") from error
    if any(out.iterdir()) and not (out / NUMBERS).is_file():
        raise UserError(
            f"--out={out}: holds other files and no analysis of this command; name another folder"
        )


def write_analysis(out: Path, about: Mapping[str, Any], checkpoints: Sequence[Measures]) -> None:
    """Writes the files, each of them whole or not at all; an earlier analysis is replaced.

    Args:
        about: what the page says of the images, and of the settings: ``data``, where they lie;
            ``images``, the number of each split that was read; ``classes``, their number or None;
            ``doubts``, what a reader must know of them, one sentence each; ``photographs``, whether
            their backgrounds are known; ``seed``; and ``draws``.

    Raises:
        UserError: ``out`` cannot be written to.
    """
    figures = draw_figures(checkpoints)
    numbers = {**about, "checkpoints": checkpoints}
    contents = {
        NUMBERS: json.dumps(numbers, indent=1, allow_nan=False, default=_plain).encode(),
        **{f"{name}.png": content for name, content in figures.items()},
        "report.html": report_html(about, checkpoints, figures).encode(),
    }
    for name, content in contents.items():
        with atomic_write(out / name) as temporary:
            temporary.write_bytes(content)
    for name in FIGURES.keys() - figures.keys():  # left by an earlier analysis with a mask
        (out / f"{name}.png").unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """What JSON lacks: null for what is not a number, and lists and dictionaries for the rest."""
    if isinstance(value, pd.DataFrame):
        return json.loads(value.to_json(orient="index", double_precision=15))
    if dataclasses.is_dataclass(value):
        return {name: of for name, of in vars(value).items() if name not in DRAWN_ONLY}
    return value.tolist()


def report_html(
    about: Mapping[str, Any], checkpoints: Sequence[Measures], figures: Mapping[str, bytes]
) -> str:
    """The page: a whole HTML document that loads nothing from elsewhere.

    Args:
        about: as in :func:`write_analysis`.
        figures: PNG files by name.
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
    }
    images = about["images"].items()
    return environment.get_template("report.html.jinja").render(
        about,
        checkpoints=checkpoints,
        figures=figures,
        images_read=" and ".join(f"{count:,} {SPLITS.get(s, '')} images" for s, count in images),
        knn=(DEFAULT_K, DEFAULT_TEMPERATURE),
        penalties=PENALTIES,
        subset_images=(SUBSET_TRAIN, SUBSET_VAL),
        answers=answers(checkpoints),
        clear_errors=clear_errors(max(1, len(_curves(checkpoints)))),
        tables={
            "accuracy": _html(100 * _joined(checkpoints, "accuracy"), 2, ACCURACY | PROBES),
            "redundancy": _html(_redundancy(checkpoints), 4, REDUNDANCY),
            "subsets": _html(100 * _subsets(checkpoints), 2),
            "mask": _html(_masks(checkpoints), 4, MASK),
            "information": _html(_information(checkpoints), 3, INFORMATION),
            "bounds": _html(_bounds(checkpoints), 4, BOUNDS),
        },
    )


def _html(table: pd.DataFrame, digits: int, titles: Mapping[str, str] = {}) -> Markup:
    """A table with the titles of columns and rows; nothing where it has no rows."""
    form = f"{{:.{digits}f}}".format
    table = table.rename(columns=titles, index=titles)
    return Markup(table.to_html(border=0, na_rep="", float_format=form) if len(table) else "")


def answers(checkpoints: Sequence[Measures]) -> list[str]:
    """Three sentences: did the mask spread, are there confounders, accuracy with and without."""
    return [
        _did_it_spread(checkpoints),
        _are_there_confounders(checkpoints),
        _does_it_help(checkpoints),
    ]


def clear_errors(rows: int) -> float:
    """Standard errors that the best of ``rows`` gains passes by chance, in 2.5 % of cases."""
    return NormalDist().inv_cdf(1 - 0.025 / rows)


def _did_it_spread(checkpoints: Sequence[Measures]) -> str:
    parts = []
    for one in checkpoints:
        if (statistics := one.mask_statistics) is not None:
            low, high = statistics["min"], statistics["max"]
            alike = nearly_alike(low, high)
            verdict = "weighs all dimensions nearly alike" if alike else "spread out"
            parts.append(f"{one.name} {verdict}, from {low:.4g} to {high:.4g}")
    if not parts:
        return "No checkpoint has a mask of its own."
    return f"The mask of {'; of '.join(parts)}."


def _curves(checkpoints: Sequence[Measures]) -> dict[tuple[str, str], SubsetCurves]:
    """The curves of the subset experiment, by checkpoint and probe."""
    return {
        (one.name, SUBSET_PROBES[probe]): curves
        for one in checkpoints
        for probe, curves in (one.subsets or {}).items()
    }


def _are_there_confounders(checkpoints: Sequence[Measures]) -> str:
    curves = _curves(checkpoints)
    if not curves:
        return "Without labels, nothing can be said about confounders."
    least = clear_errors(len(curves))
    clear = [f"{n} ({p})" for (n, p), one in curves.items() if one.gain > least * one.gain_error]
    if not clear:
        return (
            "There is no evidence of confounders: no subset of dimensions, chosen on one half of "
            "the validation images, is clearly better than all of them on the other half."
        )
    return f"There is evidence that some dimensions are better left out, in {', '.join(clear)}."


def _does_it_help(checkpoints: Sequence[Measures]) -> str:
    accuracies = {one.name: one.accuracy for one in checkpoints if one.accuracy is not None}
    if not accuracies:
        return "Accuracies need labels; RankMe and redundancy below are no accuracy."
    parts = []
    for name, table in accuracies.items():
        for probe, of in table.iterrows() if "masked" in table else ():
            mean, low, high = (f"{100 * of[key]:+.2f}" for key in ACCURACY)
            change = f"difference {mean} points, {low} to {high}".replace("-", "\N{MINUS SIGN}")
            parts.append(f"{name} {PROBES[probe]} {of.masked:.1%} and {of.plain:.1%} ({change})")
    if not parts:
        return "There are no masked features whose accuracy could be compared."
    return f"Accuracy with the mask and without it: {'; '.join(parts)}."


def _joined(checkpoints: Sequence[Measures], measure: str) -> pd.DataFrame:
    """One table of those of all checkpoints that have one."""
    tables = {one.name: getattr(one, measure) for one in checkpoints}
    known = {name: table for name, table in tables.items() if table is not None}
    return pd.concat(known) if known else pd.DataFrame()


def _redundancy(checkpoints: Sequence[Measures]) -> pd.DataFrame:
    rows = {
        (one.name, version): {name: getattr(of, name) for name in REDUNDANCY}
        for one in checkpoints
        for version, of in (one.redundancy or {}).items()
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def _subsets(checkpoints: Sequence[Measures]) -> pd.DataFrame:
    rows, half = {}, RATES.index(0.5)
    for row, curves in _curves(checkpoints).items():
        best, beating = curves.draws.max(axis=0), curves.share_beating_full
        rows[row] = {
            "all dimensions": curves.full,
            "best random draw": best.max(),
            "its share of dimensions": RATES[int(best.argmax())],
            "most draws better than all": beating.max(),
            "held-out gain of the best": curves.gain,
            "± standard error": curves.gain_error,
            "upper half of mask": np.nan if curves.top is None else curves.top[half],
            "lower half of mask": np.nan if curves.bottom is None else curves.bottom[half],
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def _masks(checkpoints: Sequence[Measures]) -> pd.DataFrame:
    rows = {one.name: one.mask_statistics for one in checkpoints if one.mask_statistics}
    return pd.DataFrame.from_dict(rows, orient="index")


def _information(checkpoints: Sequence[Measures]) -> pd.DataFrame:
    table = _joined(checkpoints, "information")
    if table.empty:
        return table
    sign = np.array([SIGNS[kind] for kind in table.index.get_level_values(1)])
    cases = [sign == 0, ~(table.p < 0.05), table.rho * sign > 0]
    table["verdict"] = np.select(cases, ["", "not shown", "yes"], "the opposite")
    table["p"] = table.p.map("{:.2g}".format, na_action="ignore")
    return table


def _bounds(checkpoints: Sequence[Measures]) -> pd.DataFrame:
    table = _joined(checkpoints, "bounds").reindex(columns=list(BOUNDS))
    return table.assign(inside=table.inside.map({True: "yes", False: "no"}))
