"""What all figures share. Colours of Okabe and Ito (2008), and never colour alone."""

import io
import textwrap
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from metamask_solo.analysis.measures import Array, IntArray

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
VISIBLE = 0.005  # of a panel's height: a smaller distance of two curves cannot be seen
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
    printable = "".join(character if character.isprintable() else " " for character in text)
    return printable.replace("$", "")[:most]


def wrapped(text: str, width: int = 34) -> str:
    """A title in lines that fit a panel, also where a name has no blank."""
    return "\n".join(textwrap.wrap(text, width, break_long_words=True)) or text


def least_span(axis: Axes, values: Array, span: float = 0.1, along: str = "y") -> None:
    """Widens an axis to at least ``span``, so that a mask that hardly moved looks like one."""
    low, high = float(np.min(values)), float(np.max(values))
    if high - low < span:
        middle = (low + high) / 2
        limits = middle - 0.6 * span, middle + 0.6 * span
        (axis.set_ylim if along == "y" else axis.set_xlim)(*limits)


def coinciding(axis: Axes) -> dict[Line2D, Line2D]:
    """The curves that cannot be seen as they lie on an earlier one, each with that one."""
    curves = [axis.transScale.transform(line.get_xydata()) for line in axis.lines]
    heights = np.concatenate([curve[:, 1] for curve in curves]) if curves else np.zeros(0)
    heights = heights[np.isfinite(heights)]
    height = float(np.ptp(heights)) if len(heights) else 0.0
    hidden = {}
    for number, curve in enumerate(curves):
        for earlier, line in zip(curves[:number], axis.lines, strict=False):
            if curve.shape == earlier.shape and np.allclose(
                curve, earlier, rtol=0, atol=VISIBLE * height, equal_nan=True
            ):
                hidden[axis.lines[number]] = line
                break
    return hidden


def note_of_coinciding(axis: Axes) -> str:
    """A line for the title, by the numbers that labels begin with; empty where all can be seen."""
    under: dict[str, list[str]] = {}
    for lines in coinciding(axis).items():
        number, earlier = (str(line.get_label()).partition(":")[0] for line in lines)
        under.setdefault(earlier, []).append(number)
    notes = [
        f"{', '.join(numbers)} {'coincide' if len(numbers) > 1 else 'coincides'} with {earlier}"
        for earlier, numbers in under.items()
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


def class_colours(count: int) -> list[Any]:
    """A colour for each of ``count`` classes, by label: the same whichever classes are drawn."""
    if count <= 20:
        colours = matplotlib.colormaps["tab10" if count <= 10 else "tab20"]
        return [colours(label) for label in range(count)]
    return list(matplotlib.colormaps["turbo"](np.linspace(0, 1, count)))


def legend_below(figure: Figure, columns: int) -> None:
    """One legend for all panels, in which a label stands once."""
    handles: dict[str, Any] = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        place: dict[str, Any] = {"loc": "outside lower center", "ncols": min(columns, len(handles))}
        figure.legend(list(handles.values()), list(handles), **place)


def draw_mask_history(axis: Axes, times: Array | IntArray, masks: Array) -> None:
    """A mask's way over training: all dimensions, their middle half, median and start.

    Args:
        times: shape (T,).
        masks: shape (T, D).
    """
    low, quarter, middle, upper, high = np.quantile(masks, [0, 0.25, 0.5, 0.75, 1], axis=1)
    band: dict[str, Any] = {"color": SKY, "linewidth": 0}
    axis.fill_between(times, low, high, alpha=0.35, label="mask: all dimensions", **band)
    axis.fill_between(times, quarter, upper, alpha=0.8, label="mask: middle half", **band)
    axis.plot(times, middle, color=BLUE, label="mask: median")
    start = float(masks[0].mean())
    axis.axhline(start, color=GREY, linestyle=":", linewidth=1.1, label="mask: start")
    least_span(axis, masks)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.set_ylabel("mask weight m (dimensionless)")
