"""The figures of a report, and what all figures share.

Colours of Okabe and Ito (2008), and never colour alone.
"""

import io
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from metamask_solo.analysis.measure_checkpoint import Measures
from metamask_solo.analysis.measures import Array, IntArray
from metamask_solo.analysis.subsets import RATES, SUBSET_PROBES, SubsetCurves
from metamask_solo.atomic_files import atomic_write

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#666666"
# one look for each checkpoint, in this order
LOOKS = list(zip((BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK), "os^DvXP", strict=True))
STYLES = ("-", "--", "-.", ":")
LINES = {"plain": "-", "masked": "--"}
PANEL = 4.6  # inches
LETTER = 0.075  # inches, of a legend
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
    "text.parse_math": False,  # a dollar sign in a name is no mathematics
}
INFORMATION = {
    "class": "variance explained by\nthe class (η², 0 to 1)",
    "photograph": "variance explained by the\nbackground photograph (η², 0 to 1)",
    "deviation": "standard deviation\n(feature units)",
}
MOST_IN_LEGEND = 20  # classes
LONGEST_NAME = 30  # of a class, in letters


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


def curve_look(number: int, count: int) -> dict[str, Any]:
    """How one of ``count`` curves is drawn; later ones are thinner, so that none hides another."""
    colour, marker = LOOKS[number % len(LOOKS)]
    style = STYLES[number // len(LOOKS) % len(STYLES)]
    width = 1.4 + 1.4 * (count - 1 - number) / max(1, count - 1)
    look = {"color": colour, "linestyle": style, "linewidth": width}
    return {**look, "marker": marker, "markersize": 2 + 2 * width}


def grid(
    rows: int, columns: int, width: float = PANEL, height: float = PANEL - 0.7
) -> tuple[Figure, Any]:
    """A figure and its (rows, columns) array of axes. No pyplot: nothing global is touched."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def legend_below(figure: Figure, columns: int) -> None:
    """One legend for all panels, in which a label stands once."""
    handles: dict[str, Any] = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        widest = LETTER * (6 + max(map(len, handles)))
        columns = max(1, min(columns, len(handles), int(figure.get_figwidth() / widest)))
        where: dict[str, Any] = {"loc": "outside lower center", "ncols": columns}
        length = 4 if columns == 1 else 2  # of a handle; there is room to tell a dashed line
        figure.legend(list(handles.values()), list(handles), handlelength=length, **where)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file; the same bytes every time."""
    content = io.BytesIO()
    dpi = STYLE["savefig.dpi"]
    figure.savefig(content, format="png", dpi=dpi, metadata={"Software": None})
    return content.getvalue()


def draw_figures(checkpoints: Sequence[Measures]) -> dict[str, bytes]:
    """All figures that these measures allow, by name, as PNG files; the same bytes every time."""
    figures = {}
    with matplotlib.rc_context(STYLE):
        for name, (measure, draw) in FIGURES.items():
            if drawn := [one for one in checkpoints if getattr(one, measure) is not None]:
                figures[name] = png(draw(drawn))
    return figures


def draw_mask_history(axis: Axes, history: pd.DataFrame) -> None:
    """A mask over training: all dimensions, their middle half, median and start.

    Args:
        history: a row of weights for each time.
    """
    low, quarter, middle, upper, high = np.quantile(history, [0, 0.25, 0.5, 0.75, 1], axis=1)
    band: dict[str, Any] = {"color": SKY, "linewidth": 0}
    axis.fill_between(history.index, low, high, alpha=0.35, label="mask: all dimensions", **band)
    axis.fill_between(history.index, quarter, upper, alpha=0.8, label="mask: middle half", **band)
    axis.plot(history.index, middle, color=BLUE, label="mask: median")
    start = float(history.iloc[0].mean())
    axis.axhline(start, color=GREY, linestyle=":", linewidth=1.1, label="mask: start")
    least_span(axis, history.to_numpy())
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.set_ylabel("mask weight m (dimensionless)")


def correlation_figure(checkpoints: Sequence[Any]) -> Figure:
    """|correlation| of every pair of dimensions, one panel for each checkpoint."""
    measured = [(one.name, one.redundancy["plain"]) for one in checkpoints]
    columns = min(3, len(measured))
    width = 3.5 if columns > 1 else 4.6  # beside one panel alone stands the colour bar, too
    figure, axes = grid(-(-len(measured) // columns), columns, width, height=3.8)
    norm = PowerNorm(0.5, 0, 1)  # most correlations are small: spread them
    for axis, (name, redundancy) in zip(axes.flat, measured, strict=False):
        matrix = np.abs(redundancy.correlation)
        order = _cluster(matrix)
        image = axis.imshow(
            matrix[np.ix_(order, order)], cmap="cividis", norm=norm, interpolation="antialiased"
        )
        axis.grid(False)
        energy = redundancy.off_diagonal_energy
        axis.set_title(f"{wrapped(name, 22)}\noff-diagonal energy {energy:.4f}")
        axis.set(xlabel="dimension (clustered order)", ylabel="dimension (clustered order)")
    for axis in axes.flat[len(measured) :]:
        axis.set_visible(False)
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label("|correlation|\n(0 to 1, square-root scale)")
    bar.set_ticks([0, 0.02, 0.1, 0.25, 0.5, 0.75, 1])
    return figure


def _cluster(correlation: Array) -> Any:
    """An order of the dimensions that puts correlated ones side by side."""
    if len(correlation) < 3:
        return np.arange(len(correlation))
    distance = 1 - (correlation + correlation.T) / 2
    np.fill_diagonal(distance, 0)
    return hierarchy.leaves_list(hierarchy.linkage(squareform(distance, checks=False), "average"))


def spectrum_figure(checkpoints: Sequence[Any]) -> Figure:
    """The singular values of plain and masked features."""
    curves = sum(len(one.redundancy) for one in checkpoints)
    figure, axes = grid(1, 1, width=7, height=PANEL - 0.9 + 0.19 * curves)  # with a legend below
    axis = axes[0, 0]
    for number, one in enumerate(checkpoints):
        for version, redundancy in one.redundancy.items():
            singular = redundancy.singular_values
            relative = singular / max(singular[0], np.finfo(float).tiny)
            # the lines of plain and masked features may coincide
            alpha = 0.4 if version == "plain" and one.mask is not None else 1.0
            look = curve_look(number, len(checkpoints))
            look |= {"linestyle": LINES[version], "alpha": alpha}
            label = f"{one.name}, {version}: RankMe {redundancy.rankme:.1f}"
            ranks = np.flatnonzero(relative > 1e-6)
            axis.plot(ranks + 1, relative[ranks], label=label, markevery=0.12, **look)
    axis.set(yscale="log", xlabel="rank k of the singular value (count)", ylabel="σₖ / σ₁ (ratio)")
    axis.yaxis.set_major_formatter("{x:g}")  # the usual one writes powers as mathematics
    legend_below(figure, columns=1)
    return figure


def subsets_figure(checkpoints: Sequence[Any]) -> Figure:
    """Accuracy against the share of dimensions kept: a row for each checkpoint."""
    figure, axes = grid(len(checkpoints), 2, height=3.7)
    for one, row in zip(checkpoints, axes, strict=True):
        for (probe, title), axis in zip(SUBSET_PROBES.items(), row, strict=True):
            _subset_panel(axis, one.subsets[probe])
            axis.set_ylabel(f"{title} accuracy\n(% of val images)")
            axis.set_title(wrapped(one.name))
    for column in axes.T:  # the same scale for all checkpoints
        limits = np.array([axis.get_ylim() for axis in column])
        for axis in column:
            axis.set_ylim(limits.min(), limits.max())
    legend_below(figure, columns=3)
    return figure


def _subset_panel(axis: Axes, curves: SubsetCurves) -> None:
    draws, rates = curves.draws, np.array(RATES)
    low, high = np.quantile(draws, [0.05, 0.95], axis=0)
    middle = "random dimensions: middle 90 % of draws"
    axis.fill_between(rates, low, high, color=SKY, alpha=0.4, linewidth=0, label=middle)
    axis.plot(rates, draws.mean(0), color=BLUE, marker="o", label="random dimensions: mean")
    draw, rate = np.nonzero(draws > curves.full)
    crosses: dict[str, Any] = {"s": 16, "marker": "x", "linewidths": 0.9, "zorder": 5}
    label = "random draw better than all dimensions"
    axis.scatter(rates[rate], draws[draw, rate], color=VERMILION, label=label, **crosses)
    label = "all dimensions, plain"
    axis.axhline(curves.full, color=BLACK, linestyle="--", linewidth=1.1, label=label)
    if curves.top is not None and curves.bottom is not None:
        axis.plot(rates, curves.top, "^-.", color=GREEN, label="largest mask weights kept")
        axis.plot(rates, curves.bottom, "v:", color=PURPLE, label="smallest mask weights kept")
    axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axis.set_xlabel("share of dimensions kept (%)")
    wins = axis.secondary_xaxis("top")
    wins.set_ticks(rates, [f"{share:.0%}" for share in curves.share_beating_full], fontsize=8)
    wins.tick_params(length=0)
    wins.set_xlabel("random draws better than all dimensions (%)", fontsize=8.5)


def mask_figure(checkpoints: Sequence[Any]) -> Figure:
    """Histogram of the mask, and the mask over training."""
    figure, axes = grid(len(checkpoints), 2, height=3.6)
    for one, (histogram, over_time) in zip(checkpoints, axes, strict=True):
        name, mask, history = wrapped(one.name), one.mask, one.history
        histogram.hist(mask, bins=40, color=SKY, edgecolor=BLUE, linewidth=0.6)
        least_span(histogram, mask, along="x")
        histogram.set(xlabel="mask weight m (dimensionless)", ylabel="number of dimensions (count)")
        histogram.xaxis.set_major_locator(MaxNLocator(6))
        histogram.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        histogram.set_title(f"{name}\nat the end: {mask.min():.4f} to {mask.max():.4f}")
        over_time.set_title(f"{name}\nover training")
        if history is not None:
            draw_mask_history(over_time, history)
            over_time.set_xlabel("optimiser step (count)")
            start = float(history.iloc[0].mean())
            histogram.axvline(start, color=GREY, linestyle=":", linewidth=1.1)
        else:
            centred: dict[str, Any] = {"ha": "center", "transform": over_time.transAxes}
            over_time.text(0.5, 0.5, "no history in the checkpoint", **centred)
            over_time.set_axis_off()
    legend_below(figure, columns=4)
    return figure


def information_figure(checkpoints: Sequence[Any]) -> Figure:
    """Mask weight of each dimension against what it tells."""
    kinds = list(checkpoints[0].information.index)
    figure, axes = grid(len(checkpoints), len(kinds), width=4)
    for one, row in zip(checkpoints, axes, strict=True):
        weights = one.dimensions.weight
        for kind, axis in zip(kinds, row, strict=True):
            axis.scatter(weights, one.dimensions[kind], s=9, alpha=0.5, color=BLUE, linewidths=0)
            least_span(axis, weights, along="x")
            axis.set_xlabel(f"mask weight |m| ({weights.min():.4f} to {weights.max():.4f})")
            axis.set_ylabel(INFORMATION[kind])
            axis.set_ylim(bottom=0)
            axis.xaxis.set_major_locator(MaxNLocator(4))
            of = one.information.loc[kind]
            title = f"ρ = {of.rho:+.2f} (95 % interval {of.low:+.2f} to {of.high:+.2f})"
            title = title.replace("-", "\N{MINUS SIGN}")
            title = "ρ not defined: constant" if math.isnan(of.rho) else title
            axis.set_title(f"{wrapped(one.name)}\n{title}", fontsize=9.5)
    return figure


def bounds_figure(checkpoints: Sequence[Any]) -> Figure:
    """The bounds of the cross-entropy: one bar for plain, one for masked features."""
    table = pd.concat({one.name: one.bounds for one in checkpoints})
    figure, axes = grid(1, 1, width=8, height=1.6 + 0.42 * len(table))
    axis = axes[0, 0]
    for position, ((_, version), of) in enumerate(table.iterrows()):  # type: ignore[misc]
        colour = BLUE if version == "plain" else VERMILION
        axis.plot([of.lower, of.upper], [position] * 2, "|-", color=colour, markersize=11)
        axis.plot(of.cross_entropy, position, "D", color=colour)
    axis.set_yticks(range(len(table)), [wrapped(", ".join(row), 40) for row in table.index])
    axis.set_ylim(len(table) - 0.4, -0.6)
    axis.axvline(math.log(table.classes.iloc[0]), color=GREY, linestyle=":", linewidth=1.2)
    axis.set_xlabel("cross-entropy of the mean classifier (nats)\ndotted: guessing, log C")
    return figure


# what a checkpoint must have to be drawn, and the function that draws those that have it
FIGURES: dict[str, tuple[str, Callable[[Sequence[Any]], Figure]]] = {
    "correlation": ("redundancy", correlation_figure),
    "spectrum": ("redundancy", spectrum_figure),
    "subsets": ("subsets", subsets_figure),
    "mask": ("mask", mask_figure),
    "information": ("dimensions", information_figure),
    "bounds": ("bounds", bounds_figure),
}


def draw_scatter(
    points: Array, labels: IntArray, classes: Sequence[str], title: str, out: Path
) -> None:
    """Writes a scatter plot of (N, 2) points, coloured by class where there are ``classes``.

    With few classes it has a legend, with many a colour bar. A class has the same colour whichever
    others are drawn.
    """
    few = len(classes) <= MOST_IN_LEGEND
    name, last = ("tab10", 9) if len(classes) <= 10 else ("tab20", 19)
    name, last = (name, last) if few else ("turbo", len(classes) - 1)
    look: Any = {"s": max(2.0, min(30.0, 20_000 / len(points))), "alpha": 0.7}
    with matplotlib.rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(8, 7), layout="constrained")
        axes = figure.add_subplot()
        look |= {"c": labels.clip(0), "cmap": name, "vmin": 0, "vmax": last}
        drawn = axes.scatter(points[:, 0], points[:, 1], **look)
        if classes and few:
            colours = drawn.to_rgba(np.arange(len(classes)))
            dots = [Line2D([], [], marker="o", linestyle="", color=colour) for colour in colours]
            # a number first: matplotlib leaves out a label that begins with an underscore
            names = [f"{label} {name}" for label, name in enumerate(classes)]
            names = [n if len(n) <= LONGEST_NAME else f"{n[: LONGEST_NAME - 1]}…" for n in names]
            axes.legend(dots, names, title="class", loc="center left", bbox_to_anchor=(1, 0.5))
        elif classes:
            figure.colorbar(drawn, label="class (in alphabetical order)")
        axes.set(xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2")
        axes.set_title("\n".join(wrapped(line, 60) for line in title.splitlines()), fontsize=10)
        with atomic_write(out) as temporary:
            figure.savefig(temporary, format=out.suffix[1:], dpi=150)
