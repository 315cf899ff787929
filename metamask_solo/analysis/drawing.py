"""What all figures share. Colours of Okabe and Ito (2008), and never colour alone."""

import io
import textwrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from metamask_solo.analysis.measures import Array

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#666666"
# one look for each checkpoint, in this order
LOOKS = [
    (BLUE, "o"),
    (VERMILION, "s"),
    (GREEN, "^"),
    (PURPLE, "D"),
    (ORANGE, "v"),
    (SKY, "X"),
    (BLACK, "P"),
]
PANEL = 4.6  # inches
SEEN = 0.005  # of a panel's height: less cannot be seen between two curves
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.fontsize": 8.5,
    "legend.framealpha": 0.9,
    "lines.linewidth": 1.6,
    "savefig.dpi": 150,
}


def plain_text(text: str, most: int = 60) -> str:
    """A name that matplotlib shows as it stands: no mathematics, no control characters."""
    kept = "".join(character if character.isprintable() else " " for character in text)
    return kept.replace("$", "")[:most]


def wrapped(text: str, width: int = 34) -> str:
    """A title in lines that fit a panel, also where a name has no blank."""
    return "\n".join(textwrap.wrap(text, width, break_long_words=True)) or text


def least_span(axis: Axes, values: Array, span: float = 0.1, along: str = "y") -> None:
    """Widens an axis to at least ``span``, so that a mask that hardly moved looks like one."""
    low, high = float(np.min(values)), float(np.max(values))
    if high - low < span:
        middle = (low + high) / 2
        limits = middle - 0.6 * span, middle + 0.6 * span
        if along == "y":
            axis.set_ylim(limits)
        else:
            axis.set_xlim(limits)


def coinciding(axis: Axes) -> list[tuple[Line2D, Line2D]]:
    """The curves that cannot be seen as they lie on an earlier one, each with that one."""
    curves = [axis.transScale.transform(line.get_xydata()) for line in axis.lines]
    if not curves:
        return []
    height = float(np.ptp(np.concatenate(curves)[:, 1]))
    found = []
    for place, one in enumerate(curves):
        for before, other in enumerate(curves[:place]):
            if one.shape == other.shape and np.abs(one - other).max() <= SEEN * height:
                found.append((axis.lines[place], axis.lines[before]))
                break
    return found


def note_of_coinciding(axis: Axes) -> str:
    """A line for the title, by the numbers that labels begin with; empty where all can be seen."""
    on: dict[str, list[str]] = {}
    for both in coinciding(axis):
        number, earlier = (str(line.get_label()).partition(":")[0] for line in both)
        on.setdefault(earlier, []).append(number)
    notes = [
        f"{', '.join(numbers)} {'coincide' if len(numbers) > 1 else 'coincides'} with {earlier}"
        for earlier, numbers in on.items()
    ]
    return "\n" + wrapped("; ".join(notes)) if notes else ""


def grid(
    rows: int, columns: int, width: float = PANEL, height: float = PANEL - 0.7
) -> tuple[Figure, Any]:
    """A figure and its (rows, columns) array of axes. No pyplot: nothing global is touched."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file; the same bytes every time."""
    content = io.BytesIO()
    dpi = STYLE["savefig.dpi"]
    figure.savefig(content, format="png", dpi=dpi, metadata={"Software": None})
    return content.getvalue()
