"""The folder that an analysis writes: figures, analysis.json, and report.html in one file."""

import base64
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from metamask_solo.analysis.figures import FIGURES, draw_figures
from metamask_solo.analysis.measure_checkpoint import PROBES, Accuracies, Information, Measures
from metamask_solo.analysis.subsets import PENALTIES, SUBSET_PROBES, SubsetCurves
from metamask_solo.atomic_files import atomic_write
from metamask_solo.errors import UserError
from metamask_solo.evaluation.knn import DEFAULT_K, DEFAULT_TEMPERATURE

MADE_BY = "metamask-solo analyze"
NUMBERS = "analysis.json"
SPLITS = {"train": "training", "val": "validation"}
DRAWN_ONLY = {"correlation", "masks"}  # too large for analysis.json
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


@dataclass(frozen=True)
class Analysis:
    """What analysis.json holds.

    Attributes:
        data: where the images lie.
        images: of each split that was read.
        classes: their number; None without labels.
        doubts: what a reader must know of the images, one sentence each.
        background: whether it is known what lies behind the objects of the images.
        untrained: accuracies of an untrained backbone and of the pixels, on all images.
    """

    data: str
    images: dict[str, int]
    classes: int | None
    doubts: list[str]
    background: bool
    seed: int
    samples: int
    draws: int
    untrained: Accuracies
    checkpoints: list[Measures]
    made_by: str = MADE_BY


def check_output(out: Path) -> None:
    """Raises UserError unless ``out`` is new, empty, or holds an earlier analysis."""
    nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"--out={out}: {nearest} is a file; name a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"--out={out}: cannot be written (no permission for {nearest})")
    if nearest == out and any(out.iterdir()) and not _is_ours(out):
        raise UserError(
            f"--out={out}: holds other files and no analysis of this command; name another folder"
        )


def _is_ours(out: Path) -> bool:
    try:
        content = json.loads((out / NUMBERS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("made_by") == MADE_BY


def write_analysis(out: Path, analysis: Analysis) -> None:
    """Writes the files, each of them whole or not at all; an earlier analysis is replaced.

    Raises:
        UserError: ``out`` cannot be written to.
    """
    figures = draw_figures(analysis.checkpoints)
    contents = {
        NUMBERS: (json.dumps(plain(analysis), indent=1, allow_nan=False) + "\n").encode(),
        **{f"{name}.png": content for name, content in figures.items()},
        "report.html": report_html(analysis, figures).encode(),
    }
    for name, content in contents.items():
        with atomic_write(out / name) as temporary:
            temporary.write_bytes(content)
    for name in FIGURES.keys() - figures.keys():  # left by an earlier analysis with a mask
        (out / f"{name}.png").unlink(missing_ok=True)


def plain(value: Any) -> Any:
    """Dataclasses as dictionaries, arrays as lists, and null for what is no finite number."""
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: plain(getattr(value, name)) for name in names if name not in DRAWN_ONLY}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {key: plain(below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [plain(below) for below in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def report_html(analysis: Analysis, figures: Mapping[str, bytes]) -> str:
    """The page: a whole HTML document that loads nothing from elsewhere.

    Args:
        figures: PNG files by name; a name that is missing has its section say why.
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
        "cell_of": _cell,
        "pair": _pair,
        "subset_cells": _subset_cells,
        "information_cells": _information_cells,
    }
    rows = len(list(_named_curves(analysis.checkpoints)))
    return environment.get_template("report.html.jinja").render(
        vars(analysis),
        figures=figures,
        images_read=" and ".join(
            f"{count:,} {SPLITS.get(split, '')} images" for split, count in analysis.images.items()
        ),
        subset_probes=SUBSET_PROBES,
        knn=(DEFAULT_K, DEFAULT_TEMPERATURE),
        penalties=PENALTIES,
        answers=answers(analysis.checkpoints),
        clear_errors=clear_errors(max(rows, 1)),
    )


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
    for name, mask in [(one.name, one.mask) for one in checkpoints if one.mask is not None]:
        low, high = mask.statistics["min"], mask.statistics["max"]
        spread = high - low >= LEAST_SPREAD * max(abs(low), abs(high)) > 0
        verdict = "spread out" if spread else "weighs all dimensions nearly alike"
        parts.append(f"{name} {verdict}, from {low:.4g} to {high:.4g}")
    if not parts:
        return "No checkpoint has a mask of its own."
    return f"The mask of {'; of '.join(parts)}."


def _named_curves(checkpoints: Sequence[Measures]) -> Iterator[tuple[str, SubsetCurves]]:
    """The rows of the table of gains."""
    for one in checkpoints:
        for probe, curves in (one.subsets.curves if one.subsets else {}).items():
            yield f"{one.name} ({SUBSET_PROBES[probe]})", curves


def _are_there_confounders(checkpoints: Sequence[Measures]) -> str:
    curves = list(_named_curves(checkpoints))
    if not curves:
        return "Whether dimensions confound cannot be said without labels."
    least = clear_errors(len(curves))
    clear = [name for name, one in curves if one.gain > least * one.gain_error]
    if not clear:
        return (
            "There is no evidence of confounders: no subset of dimensions, chosen on one half of "
            "the validation images, is clearly better than all of them on the other half."
        )
    return f"There is evidence that some dimensions are better left out, in {', '.join(clear)}."


def _does_it_help(checkpoints: Sequence[Measures]) -> str:
    if not any(one.accuracy for one in checkpoints):
        return "Accuracies need labels; RankMe and redundancy below are no accuracy."
    parts = []
    for one in checkpoints:
        for probe, accuracy in (one.accuracy or {}).items():
            if accuracy.difference is not None:
                mean, low, high = (_signed(100 * value) for value in accuracy.difference)
                parts.append(
                    f"{one.name} {PROBES[probe]} {accuracy.masked:.1%} and {accuracy.plain:.1%} "
                    f"(difference {mean} points, {low} to {high})"
                )
    if not parts:
        return "There are no masked features whose accuracy could be compared."
    return f"Accuracy with the mask and without it: {'; '.join(parts)}."


def _pair(versions: Any, form: str, key: str | None = None) -> str:
    """Of the plain features, and after a slash of the masked ones if there are any."""
    if versions is None:
        return "not measured"
    if isinstance(versions, Mapping):
        values = [getattr(version, key or "") for version in versions.values()]
    else:
        values = [value for value in (versions.plain, versions.masked) if value is not None]
    return " / ".join(format(value, form) for value in values)


def _cell(key: str, measures: Any) -> str:
    value = getattr(measures, key)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _subset_cells(curves: SubsetCurves, rates: Sequence[float]) -> list[str]:
    best, beating = curves.draws.max(axis=0), curves.share_beating_full
    most, half = beating.max(), rates.index(0.5)
    return [
        f"{curves.full:.1%}",
        f"{best.max():.1%} (at {rates[int(best.argmax())]:.0%})",
        f"{most:.0%} (at {rates[int(beating.argmax())]:.0%})" if most else "none",
        f"{_signed(100 * curves.gain)} ± {100 * curves.gain_error:.2f} points",
        *(
            "no ranking" if ranked is None else f"{ranked[half]:.1%}"
            for ranked in (curves.top, curves.bottom)
        ),
    ]


def _information_cells(information: Information, kind: str) -> list[str]:
    name, expected = INFORMATION[kind]
    row = [name, f"{information.lowest_tenth:.3f}", f"{information.highest_tenth:.3f}"]
    rank = information.rank_correlation
    if rank is None:
        return [*row, "not defined", "", "", "constant values" if expected else ""]
    verdict = "yes" if rank.rho * expected > 0 else "the opposite"
    if rank.p_value >= 0.05:
        verdict = "not shown"
    interval = f"{_signed(rank.low)} to {_signed(rank.high)}"
    return [*row, _signed(rank.rho), interval, f"{rank.p_value:.4f}", verdict if expected else ""]


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")
