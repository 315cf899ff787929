"""The figures of a benchmark, in the style of those of the analysis."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from metamask_solo.analysis.figures import BLUE, GREY, LOOKS, STYLE, VERMILION, png
from metamask_solo.benchmark.file import BenchmarkFile
from metamask_solo.benchmark.rows import Row, group
from metamask_solo.benchmark.statistics import best_settings, compare, mean_and_deviation

T = TypeVar("T")
AXIS = {
    "knn": "kNN accuracy (% of validation images)",
    "linear": "linear accuracy (% of validation images)",
    "rankme": "RankMe (directions in use; no accuracy)",
}
DIFFERENCE = {
    "knn": "difference of kNN accuracy\n(percentage points)",
    "linear": "difference of linear accuracy\n(percentage points)",
    "rankme": "difference of RankMe\n(directions in use; no accuracy)",
}


def draw_figures(benchmark: BenchmarkFile, rows: Sequence[Row]) -> dict[str, bytes]:
    """PNG files by name; of a search, one setting of each method in all but the first."""
    groups = group(rows)
    if not groups:
        return {}
    chosen = best_settings(rows, benchmark.measured) if benchmark.searched else groups
    figures: dict[str, Figure | None] = {
        "accuracy": accuracy_figure(benchmark, groups),
        "time": time_figure(benchmark, chosen),
        "curves": curves_figure(chosen),
    }
    if not benchmark.searched:
        figures["differences"] = differences_figure(benchmark, groups)
    return {name: png(figure) for name, figure in figures.items() if figure is not None}


def _styled(draw: Callable[..., T]) -> Callable[..., T]:
    def styled(*arguments: Any) -> T:
        with matplotlib.rc_context(STYLE):
            return draw(*arguments)

    return styled


@_styled
def accuracy_figure(benchmark: BenchmarkFile, groups: dict[str, list[Row]]) -> Figure:
    """Mean and standard deviation of each variant, and every seed."""
    names = list(groups)
    height = 1.4 + 0.32 * len(names)
    figure = Figure(figsize=(4.2 * len(benchmark.measured) + 1.5, height), layout="constrained")
    axes = figure.subplots(1, len(benchmark.measured), squeeze=False, sharey=True)[0]
    for axis, metric in zip(axes, benchmark.measured, strict=True):
        for place, name in enumerate(names):
            values = [row.metrics[metric] for row in groups[name]]
            mean, deviation = mean_and_deviation(values)
            colour, marker = _look(place)
            axis.plot(values, [place] * len(values), "|", color=GREY, markersize=9)
            axis.errorbar(
                mean, place, xerr=deviation, color=colour, marker=marker, capsize=4, linestyle=""
            )
        axis.set_xlabel(AXIS[metric])
        axis.grid(axis="y", visible=False)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    handles = [
        Line2D([], [], color="black", marker="o", label="mean ± standard deviation"),
        Line2D([], [], color=GREY, marker="|", linestyle="", markersize=9, label="one seed"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


@_styled
def differences_figure(benchmark: BenchmarkFile, groups: dict[str, list[Row]]) -> Figure | None:
    """The paired differences with their corrected intervals; None where nothing is compared."""
    pairs = [pair for pair in benchmark.pairs if set(pair) <= set(groups)]
    family = compare(pairs, groups, benchmark.measured)
    if not family:
        return None
    names = list(dict.fromkeys(f"{found.one} − {found.other}" for found in family))
    size = (4.2 * len(benchmark.measured) + 2, 1.6 + 0.32 * len(names))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(benchmark.measured), squeeze=False, sharey=True)[0]
    for axis, metric in zip(axes, benchmark.measured, strict=True):
        axis.axvline(0, color=GREY, linestyle="--", linewidth=1.1)
        for found in family:
            if found.metric == metric:
                place = names.index(f"{found.one} − {found.other}")
                colour = VERMILION if found.clear else BLUE
                if found.interval is not None:
                    axis.plot(found.interval, [place] * 2, color=colour)
                axis.plot(found.mean, place, "s" if found.clear else "o", color=colour)
        axis.set_xlabel(DIFFERENCE[metric])
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    handles = [
        Line2D([], [], color=BLUE, marker="o", label="mean and corrected interval"),
        Line2D([], [], color=VERMILION, marker="s", label="the same where p < 0.05 (Holm)"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


@_styled
def time_figure(benchmark: BenchmarkFile, groups: dict[str, list[Row]]) -> Figure:
    """What the accuracy costs: training and online validation, all epochs."""
    metric = benchmark.measured[0]
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axis = figure.subplots()
    for place, (name, rows) in enumerate(groups.items()):
        seconds = [row.seconds_per_epoch for row in rows if row.seconds_per_epoch is not None]
        if len(seconds) < len(rows):
            continue  # a reference, which was not trained
        colour, marker = _look(place)
        minutes = [s * (row.epochs or 0) / 60 for s, row in zip(seconds, rows, strict=True)]
        x, x_deviation = mean_and_deviation(minutes)
        y, y_deviation = mean_and_deviation([row.metrics[metric] for row in rows])
        axis.errorbar(
            x,
            y,
            xerr=x_deviation,
            yerr=y_deviation,
            color=colour,
            marker=marker,
            capsize=3,
            linestyle="",
            label=name,
        )
    axis.set_xlim(left=0)
    axis.set_xlabel("training time of a run (minutes)")
    axis.set_ylabel(AXIS[metric])
    if axis.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper")
    return figure


@_styled
def curves_figure(groups: dict[str, list[Row]]) -> Figure:
    """The kNN accuracy during training: mean over the seeds, and one standard deviation."""
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axis = figure.subplots()
    for place, (name, rows) in enumerate(groups.items()):
        points = pd.DataFrame(
            [point for row in rows for point in row.curve], columns=["epoch", "knn"]
        )
        if points.empty:
            continue
        spread = points.groupby("epoch").knn.agg(["mean", "std"]).fillna(0.0)
        colour, marker = _look(place)
        low, high = spread["mean"] - spread["std"], spread["mean"] + spread["std"]
        axis.fill_between(spread.index, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.plot(
            spread.index, spread["mean"], color=colour, marker=marker, markersize=4, label=name
        )
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("epoch (count)")
    axis.set_ylabel("online kNN accuracy (% of validation images)")
    if axis.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper")
    else:
        axis.text(0.5, 0.5, "no online kNN was logged", ha="center", transform=axis.transAxes)
    return figure


def _look(place: int) -> tuple[str, str]:
    """Colour and marker; after seven of each, other pairs of them."""
    count = len(LOOKS)
    return LOOKS[place % count][0], LOOKS[(place + place // count) % count][1]
