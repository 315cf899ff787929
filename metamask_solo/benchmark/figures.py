"""The figures of a benchmark, in the style of those of the analysis."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from metamask_solo.analysis.figures import GREY, LOOKS, STYLE
from metamask_solo.benchmark.plan import Subject
from metamask_solo.benchmark.rows import Row, group
from metamask_solo.benchmark.statistics import best_settings, mean_and_deviation
from metamask_solo.checkpoints.reading import read_checkpoint
from metamask_solo.training.runs import read_metrics

T = TypeVar("T")
AXIS = {
    "knn": "kNN accuracy (% of validation images)",
    "linear": "linear accuracy (% of validation images)",
    "rankme": "RankMe (directions in use; no accuracy)",
}


def draw_figures(plan: Subject, rows: Sequence[Row]) -> dict[str, bytes]:
    """PNG files by name; of a search, one setting of each method in all but the first."""
    groups = group(rows)
    if not groups:
        return {}
    chosen = best_settings(rows, plan.evaluations[0]) if plan.searched else groups
    figures = {
        "accuracy": accuracy_figure(plan, groups),
        "time": time_figure(plan, chosen),
        "curves": curves_figure(chosen),
    }
    drawn = {}
    for name, figure in figures.items():
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=150, metadata={"Software": None})
        drawn[name] = content.getvalue()
    return drawn


def _styled(draw: Callable[..., T]) -> Callable[..., T]:
    def styled(*arguments: Any) -> T:
        with matplotlib.rc_context(STYLE):
            return draw(*arguments)

    return styled


@_styled
def accuracy_figure(plan: Subject, groups: dict[str, list[Row]]) -> Figure:
    """Mean and standard deviation of each variant, and every seed."""
    names = list(groups)
    height = 1.4 + 0.32 * len(names)
    figure = Figure(figsize=(4.2 * len(plan.evaluations) + 1.5, height), layout="constrained")
    axes = figure.subplots(1, len(plan.evaluations), squeeze=False, sharey=True)[0]
    for axis, metric in zip(axes, plan.evaluations, strict=True):
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
def time_figure(plan: Subject, groups: dict[str, list[Row]]) -> Figure:
    """What the accuracy costs: training and online validation, all epochs."""
    metric = plan.evaluations[0]
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
        axis.text(0.5, 0.5, "knn_eval is off", ha="center", transform=axis.transAxes)
    return figure


@_styled
def losses_and_mask(runs: dict[str, Path]) -> bytes:
    """The demo's PNG: both losses of three runs over the epochs, and the mask of ``metamask``.

    Args:
        runs: the folder of each method's run; one of them is ``metamask``.
    """
    colours = dict(zip(runs, ("#0072B2", "#D55E00", "#009E73"), strict=True))
    styles = dict(zip(runs, ("-", "--", ":"), strict=True))
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    checkpoints = {method: read_checkpoint(folder) for method, folder in runs.items()}
    for axis, column, title, unit in (
        (axes[0], "train_nce_loss_epoch", "contrastive loss (NT-Xent)", None),
        # the methods weigh it differently: without the weight, the curves can be compared
        (axes[1], "train_barlow_loss_epoch", "redundancy loss (Barlow Twins)", "scale_loss"),
    ):
        for method, folder in runs.items():
            rows = [r for r in read_metrics(folder) if r.get(column)]
            if rows:
                config = checkpoints[method].config
                assert config is not None  # a run's folder holds its config
                scale = config.method_kwargs[unit] if unit else 1
                axis.plot(
                    [int(r["epoch"]) + 1 for r in rows],
                    [float(r[column]) / scale for r in rows],
                    styles[method],
                    color=colours[method],
                    marker="o",
                    markersize=3,
                    label=method,
                )
        axis.set(xlabel="epoch", ylabel=f"{title} / {unit}" if unit else title, title=title)
        axis.legend()
    history = checkpoints["metamask"].raw["metamask"]["history"]["mask"].numpy()
    epochs = np.arange(len(history))
    low, quarter, middle, upper, high = np.quantile(history, (0, 0.25, 0.5, 0.75, 1), axis=1)
    axes[2].fill_between(epochs, low, high, color="#0072B2", alpha=0.2, label="all dimensions")
    axes[2].fill_between(epochs, quarter, upper, color="#0072B2", alpha=0.4, label="middle half")
    axes[2].plot(epochs, middle, color="#0072B2", label="median")
    axes[2].set(xlabel="epoch", ylabel="mask weight m", title="the mask of MetaMask over time")
    axes[2].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150, metadata={"Software": None})
    return content.getvalue()


def _look(place: int) -> tuple[str, str]:
    """Colour and marker; after seven of each, other pairs of them."""
    count = len(LOOKS)
    return LOOKS[place % count][0], LOOKS[(place + place // count) % count][1]
