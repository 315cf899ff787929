"""The figures of a benchmark, from its results."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from metamask_solo.analysis.figures import BLUE, GREY, LOOKS, STYLE, VERMILION, png
from metamask_solo.benchmark.results import best_settings, same_methods
from metamask_solo.benchmark.schema import LABEL_FREE, NAMES, UNTRAINED_NAMES, BenchmarkFile
from metamask_solo.benchmark.statistics import compare

FIGURES = {"accuracy", "differences", "curves"}


def draw_figures(benchmark: BenchmarkFile, rows: pd.DataFrame) -> dict[str, bytes]:
    """PNG files by name; of a search, the curves of each method's best setting."""
    runs = rows[rows.status == "finished"]
    if runs.empty:
        return {}
    measures = benchmark.measured
    with matplotlib.rc_context(STYLE):
        figures = {"accuracy": accuracy_figure(runs, measures)}
        if benchmark.searched:
            runs = runs[runs.variant.isin(best_settings(runs, measures).variant)]
        else:
            pairs = benchmark.pairs({*runs.method}, same_methods(runs))
            family = compare(runs, pairs, measures)
            if len(family):
                figures["differences"] = differences_figure(family)
        if "curve" in runs and runs.curve.str.contains(" ").any():  # of two epochs or more
            figures["curves"] = curves_figure(runs)
        return {name: png(figure) for name, figure in figures.items()}


def accuracy_figure(runs: pd.DataFrame, measures: Sequence[str]) -> Figure:
    """Mean and standard deviation of each method, and every seed; a panel for each measure."""
    variants = list(runs.variant.unique())
    figure, axes = _panels(len(measures), [UNTRAINED_NAMES.get(name, name) for name in variants])
    for axis, measure in zip(axes, measures, strict=True):
        for line, name in enumerate(variants):
            values = runs.loc[runs.variant == name, measure].dropna()
            colour, marker = _look(line)
            axis.plot(values, [line] * len(values), "|", color=GREY, markersize=9)
            look: dict[str, Any] = {"color": colour, "marker": marker, "capsize": 4}
            axis.errorbar(
                values.mean(),
                line,
                xerr=values.std() if len(values) > 1 else 0,
                linestyle="",
                **look,
            )
        axis.set_xlabel(_axis(measure, "accuracy"))
    handles = [
        Line2D([], [], color="black", marker="o", label="mean ± standard deviation"),
        Line2D([], [], color=GREY, marker="|", linestyle="", markersize=9, label="one seed"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def differences_figure(family: pd.DataFrame) -> Figure:
    """The comparisons with their corrected intervals; a panel for each measure."""
    names = family.method + " − " + family.baseline
    order = list(names.unique())
    measures = list(family.measure.unique())
    figure, axes = _panels(len(measures), order)
    for axis, measure in zip(axes, measures, strict=True):
        axis.axvline(0, color=GREY, linestyle="--", linewidth=1.1)
        for name, line in zip(names, family.itertuples(), strict=True):
            if line.measure == measure:
                colour, marker = (VERMILION, "s") if line.clear else (BLUE, "o")
                height = order.index(name)
                axis.plot([line.low, line.high], [height] * 2, color=colour)
                axis.plot(line.difference, height, marker, color=colour)
        axis.set_xlabel(_axis(measure, "difference"))
    handles = [
        Line2D([], [], color=BLUE, marker="o", label="difference and corrected interval"),
        Line2D([], [], color=VERMILION, marker="s", label="a clear difference"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def curves_figure(runs: pd.DataFrame) -> Figure:
    """The online kNN accuracy while training: mean over the seeds, and one standard deviation."""
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axis = figure.subplots()
    for line, (name, lines) in enumerate(runs.groupby("variant", sort=False)):
        points = [point.split(":") for curve in lines.curve for point in curve.split()]
        table = pd.DataFrame(points, columns=["epoch", "accuracy"]).astype(float)
        if table.empty:
            continue
        spread = table.groupby("epoch").accuracy.agg(["mean", "std"]).fillna(0.0)
        colour, marker = _look(line)
        low, high = spread["mean"] - spread["std"], spread["mean"] + spread["std"]
        axis.fill_between(spread.index, low, high, color=colour, alpha=0.15, linewidth=0)
        look: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4}
        axis.plot(spread.index, spread["mean"], label=str(name), **look)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("epoch (count)")
    axis.set_ylabel("online kNN accuracy (% of validation images)")
    figure.legend(loc="outside right upper")
    return figure


def _panels(count: int, names: Sequence[str]) -> tuple[Figure, list[Any]]:
    """Panels side by side with a line for each name, the first on top."""
    size = (4.2 * count + 2, 1.6 + 0.32 * len(names))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, count, squeeze=False, sharey=True)[0]
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    return figure, list(axes)


def _axis(measure: str, what: str) -> str:
    if measure in LABEL_FREE:
        return f"{NAMES[measure]}, {what} (directions in use)"
    unit = "% of validation images" if what == "accuracy" else "percentage points"
    return f"{NAMES[measure]}, {what} ({unit})"


def _look(line: int) -> tuple[str, str]:
    """Colour and marker; after seven of each, other pairs of them."""
    count = len(LOOKS)
    return LOOKS[line % count][0], LOOKS[(line + line // count) % count][1]
