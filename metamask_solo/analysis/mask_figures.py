"""The figures of a mask: how far it spread, and what the dimensions that it damps tell."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from metamask_solo.analysis.drawing import (
    BLUE,
    GREEN,
    PURPLE,
    SKY,
    VERMILION,
    grid,
    least_span,
    wrapped,
)
from metamask_solo.analysis.measures import Array, IntArray
from metamask_solo.analysis.study import Study, ranking_mask

INFORMATION = {
    "class": "variance explained by\nthe class (η², 0 to 1)",
    "photograph": "variance explained by the\nbackground photograph (η², 0 to 1)",
    "colour": "variance explained by the\nbackground's mean colour (R², 0 to 1)",
    "deviation": "standard deviation\n(feature units)",
}


def mask_figure(studies: Sequence[Study]) -> Figure | None:
    """Histogram of the mask, and its way over training; None without any mask."""
    masked = [study for study in studies if study.mask is not None]
    if not masked:
        return None
    figure, axes = grid(len(masked), 2, height=3.6)
    for study, (histogram, trajectory) in zip(masked, axes, strict=True):
        mask = study.mask
        assert mask is not None
        histogram.hist(mask, bins=40, color=SKY, edgecolor=BLUE, linewidth=0.6)
        least_span(histogram, mask, along="x")
        spread = f"{mask.min():.4f} to {mask.max():.4f}"
        histogram.set_xlabel("mask weight m (dimensionless)")
        histogram.set_ylabel("number of dimensions (count)")
        histogram.xaxis.set_major_locator(MaxNLocator(6))
        histogram.set_title(f"{wrapped(study.name)}\nat the end: {spread}")
        trajectory.set_title(f"{wrapped(study.name)}\nover training")
        if study.history is None:
            trajectory.text(
                0.5,
                0.5,
                "no history in the checkpoint",
                ha="center",
                transform=trajectory.transAxes,
            )
            trajectory.set_axis_off()
        else:
            histogram.axvline(
                float(study.history[1][0].mean()),
                color=VERMILION,
                linestyle="--",
                label="mean at the start",
            )
            histogram.margins(y=0.3)  # room for the legend above the bars
            histogram.legend(loc="upper right")
            _trajectory_panel(trajectory, *study.history)
    return figure


def _trajectory_panel(axis: Axes, steps: IntArray, masks: Array) -> None:
    low, lower, middle, upper, high = np.quantile(masks, [0.05, 0.25, 0.5, 0.75, 0.95], axis=1)
    axis.fill_between(steps, low, high, color=SKY, alpha=0.3, linewidth=0, label="middle 90 %")
    axis.fill_between(steps, lower, upper, color=SKY, alpha=0.7, linewidth=0, label="middle 50 %")
    axis.plot(steps, middle, color=BLUE, marker="o", markersize=3.5, label="median")
    axis.plot(steps, masks.max(axis=1), color=GREEN, linestyle="-.", label="largest")
    axis.plot(steps, masks.min(axis=1), color=PURPLE, linestyle=":", label="smallest")
    least_span(axis, masks)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.set_xlabel("optimiser step (count)")
    axis.set_ylabel("mask weight m (dimensionless)")
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))  # inside, it would hide a line


def information_figure(studies: Sequence[Study]) -> Figure | None:
    """Mask weight of each dimension against what it tells; None if no mask ranks them."""
    masked = [
        (study.name, study.mask, study.numbers.mask)
        for study in studies
        if study.mask is not None
        and study.numbers.mask is not None
        and ranking_mask(study.mask) is not None
    ]
    if not masked:
        return None
    kinds = list(masked[0][2].information)
    figure, axes = grid(len(masked) * -(-len(kinds) // 2), 2)
    for axis in axes.flat:
        axis.set_visible(False)
    for (name, mask, of), row in zip(masked, axes.reshape(len(masked), -1), strict=True):
        for kind, axis in zip(kinds, row, strict=False):
            axis.set_visible(True)
            found = of.information[kind]
            axis.scatter(np.abs(mask), found.values, s=9, alpha=0.5, color=BLUE, linewidths=0)
            weights = np.abs(mask)
            least_span(axis, weights, along="x")
            axis.set_xlabel(f"mask weight |m| ({weights.min():.4f} to {weights.max():.4f})")
            axis.set_ylabel(INFORMATION[kind])
            axis.set_ylim(bottom=0)
            axis.xaxis.set_major_locator(MaxNLocator(4))
            rank = found.rank_correlation
            title = "ρ not defined: constant"
            if rank is not None:
                title = (
                    f"ρ = {rank.rho:+.2f} (95 % interval {rank.low:+.2f} to "
                    f"{rank.high:+.2f}), p = {rank.p_value:.4f}"
                )
            title = title.replace("-0.", "\N{MINUS SIGN}0.")
            axis.set_title(f"{wrapped(name)}\n{title}", fontsize=9.5)
    return figure
