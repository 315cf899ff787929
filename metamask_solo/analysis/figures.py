"""The figures of a report."""

import math
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from metamask_solo.analysis.drawing import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    LOOKS,
    PANEL,
    PURPLE,
    SKY,
    STYLE,
    VERMILION,
    coinciding,
    grid,
    least_span,
    note_of_coinciding,
    png,
    wrapped,
)
from metamask_solo.analysis.mask_figures import information_figure, mask_figure
from metamask_solo.analysis.measures import Array
from metamask_solo.analysis.records import PROBES
from metamask_solo.analysis.study import Study

LINES = {"plain": "-", "masked": "--"}


def draw_figures(studies: Sequence[Study]) -> dict[str, bytes]:
    """All figures that these studies allow, by name, as PNG files; the same bytes every time."""
    drawn = {}
    with matplotlib.rc_context(STYLE):
        for name, draw in FIGURES.items():
            figure = draw(studies)
            if figure is not None:
                drawn[name] = png(figure)
    return drawn


def correlation_figure(studies: Sequence[Study]) -> Figure:
    """|correlation| of every pair of dimensions, one panel for each checkpoint."""
    columns = min(3, len(studies))
    rows = -(-len(studies) // columns)
    width = 3.5 if columns > 1 else 4.6  # beside one panel alone stands the colour bar, too
    lines = max(wrapped(study.name, 22).count("\n") for study in studies)
    figure, axes = grid(rows, columns, width, height=3.4 + 0.18 * lines)
    norm = PowerNorm(0.5, 0, 1)  # most correlations are small: spread them
    for axis, study in zip(axes.flat, studies, strict=False):
        matrix = np.abs(study.correlation)
        order = _cluster(matrix)
        image = axis.imshow(
            matrix[np.ix_(order, order)], cmap="cividis", norm=norm, interpolation="antialiased"
        )
        axis.grid(False)
        energy = study.numbers.redundancy.plain.off_diagonal_energy
        axis.set_title(f"{wrapped(study.name, 22)}\noff-diagonal energy {energy:.4f}")
        axis.set_xlabel("dimension (clustered order)")
        axis.set_ylabel("dimension (clustered order)")
    for axis in axes.flat[len(studies) :]:
        axis.set_visible(False)
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label("|correlation|\n(0 to 1, square-root scale)")
    bar.set_ticks([0, 0.02, 0.1, 0.25, 0.5, 0.75, 1])
    return figure


def spectrum_figure(studies: Sequence[Study]) -> Figure:
    """How much of the pairs is correlated, and the singular values."""
    curves = sum(len(one.numbers.redundancy.items()) for one in studies)
    figure, axes = grid(1, 2, height=PANEL - 0.9 + 0.19 * curves)  # with a legend below
    pairs, spectrum = axes[0]
    thresholds = np.linspace(0, 1, 201)
    for study, (colour, marker) in zip(studies, cycle(LOOKS), strict=False):
        matrix = study.correlation
        values = np.sort(np.abs(matrix[np.triu_indices_from(matrix, 1)]))
        above = 1 - np.searchsorted(values, thresholds, side="right") / max(1, len(values))
        shown = above > 0
        pairs.plot(
            thresholds[shown],
            above[shown],
            color=colour,
            marker=marker,
            markevery=0.12,
            label=study.name,
        )
        for version, found in study.numbers.redundancy.items():
            singular = np.array(found.singular_values)
            relative = singular / max(singular[0], np.finfo(float).tiny)
            shown = relative > 1e-6
            spectrum.plot(
                np.arange(1, len(singular) + 1)[shown],
                relative[shown],
                color=colour,
                linestyle=LINES[version],
                marker=marker,
                markevery=0.12,
                label=f"{study.name}, {version}: RankMe {found.rankme:.1f}",
                gid=f"{study.name.partition(':')[0]}, {version}",
            )
    pairs.set_yscale("log")
    pairs.set_xlim(0, 1)
    pairs.set_xlabel("threshold x (|correlation|, 0 to 1)")
    pairs.set_ylabel("share of pairs above x (0 to 1)")
    pairs.set_title("redundancy of pairs (plain features)" + note_of_coinciding(pairs))
    spectrum.set_yscale("log")
    spectrum.set_xlabel("rank k of the singular value (count)")
    spectrum.set_ylabel("σ$_k$ / σ$_1$ (ratio)")
    spectrum.set_title("singular value spectrum")
    for curve, earlier in coinciding(spectrum).items():
        curve.set_label(f"{curve.get_label()} (coincides with {earlier.get_gid()})")
    handles = spectrum.get_legend_handles_labels()
    # long enough to tell a dashed line
    figure.legend(*handles, loc="outside lower center", ncols=1, handlelength=4)
    return figure


def subsets_figure(studies: Sequence[Study]) -> Figure | None:
    """Accuracy against the share of dimensions kept: a row for each checkpoint."""
    if studies[0].numbers.subsets is None:
        return None
    figure, axes = grid(len(studies), 2, height=3.7)
    for study, row in zip(studies, axes, strict=True):
        for probe, axis in zip(PROBES, row, strict=True):
            _subset_panel(axis, study, probe)
    for column in axes.T:
        bottom = min(axis.get_ylim()[0] for axis in column)
        top = max(axis.get_ylim()[1] for axis in column)
        for axis in column:  # the same scale for all checkpoints
            axis.set_ylim(bottom, top)
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    return figure


def _subset_panel(axis: Axes, study: Study, probe: str) -> None:
    subsets = study.numbers.subsets
    assert subsets is not None  # all have labels, or none
    found, rates = subsets.curves[probe], np.array(subsets.rates)
    axis.fill_between(
        rates,
        found.quantile_05,
        found.quantile_95,
        color=SKY,
        alpha=0.4,
        linewidth=0,
        label="random dimensions: middle 90 % of draws",
    )
    axis.plot(rates, found.mean, color=BLUE, marker="o", label="random dimensions: mean")
    draws = np.array(found.draws)
    beating = draws > found.full
    axis.scatter(
        np.broadcast_to(rates, draws.shape)[beating],
        draws[beating],
        s=16,
        color=VERMILION,
        marker="x",
        linewidths=0.9,
        zorder=5,
        label="random draw better than all dimensions",
    )
    axis.axhline(
        found.full, color=BLACK, linestyle="--", linewidth=1.1, label="all dimensions, plain"
    )
    references = subsets.references or {}
    for (name, accuracy), line in zip(references.items(), (":", (0, (5, 1, 1, 1))), strict=False):
        axis.axhline(accuracy[probe], color=GREY, linestyle=line, linewidth=1.1, label=name)
    if found.top_by_mask is not None and found.bottom_by_mask is not None:
        axis.plot(
            rates,
            found.top_by_mask,
            color=GREEN,
            marker="^",
            linestyle="-.",
            label="largest mask weights kept",
        )
        axis.plot(
            rates,
            found.bottom_by_mask,
            color=PURPLE,
            marker="v",
            linestyle=":",
            label="smallest mask weights kept",
        )
    axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axis.set_xlabel("share of dimensions kept (%)")
    axis.set_ylabel(f"{PROBES[probe]} accuracy\n(% of val images)")
    axis.set_title(wrapped(study.name))
    wins = axis.secondary_xaxis("top")
    wins.set_ticks(rates, [f"{share:.0%}" for share in found.share_beating_full], fontsize=8)
    wins.tick_params(length=0)
    wins.set_xlabel("random draws better than all dimensions (%)", fontsize=8.5)


def differences_figure(studies: Sequence[Study]) -> Figure | None:
    """What the mask adds to each accuracy, with its interval; None without masks or labels."""
    rows = [
        (study.name, PROBES[probe], accuracy.difference)
        for study in studies
        for probe, accuracy in (study.numbers.accuracy or {}).items()
        if accuracy.difference is not None
    ]
    if not rows:
        return None
    figure, axes = grid(1, 1, width=8, height=1.5 + 0.42 * len(rows))
    axis = axes[0, 0]
    axis.axvline(0, color=GREY, linestyle="--", linewidth=1.1)
    for position, (_, probe, found) in enumerate(rows):
        colour, marker = (BLUE, "o") if probe == PROBES["knn"] else (VERMILION, "s")
        mean, low, high = (100 * each for each in (found.mean, found.low, found.high))
        axis.plot([low, high], [position] * 2, color=colour)
        axis.plot(mean, position, color=colour, marker=marker)
    least_span(axis, np.array([[100 * found.low, 100 * found.high] for *_, found in rows]), 2, "x")
    axis.set_yticks(range(len(rows)), [f"{wrapped(name, 34)}, {probe}" for name, probe, _ in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlabel("masked minus plain features\n(percentage points, 95 % interval)")
    return figure


def bracket_figure(studies: Sequence[Study]) -> Figure | None:
    """The bracket around the cross-entropy: one bar for plain, one for masked features."""
    bars = [
        (study.name, version, found)
        for study in studies
        if study.numbers.bracket is not None
        for version, found in study.numbers.bracket.items()
    ]
    if not bars:
        return None
    figure, axes = grid(1, 1, width=8, height=1.6 + 0.42 * len(bars))
    axis = axes[0, 0]
    colours = {"plain": BLUE, "masked": VERMILION}
    for position, (_, version, found) in enumerate(bars):
        axis.plot(
            [found.lower, found.upper],
            [position] * 2,
            color=colours[version],
            linestyle=LINES[version],
            marker="|",
            markersize=13,
            markeredgewidth=2,
        )
        axis.plot(found.cross_entropy, position, color=BLACK, marker="D", markersize=5)
    axis.set_yticks(
        range(len(bars)), [f"{wrapped(name, 34)}, {version}" for name, version, _ in bars]
    )
    axis.set_ylim(len(bars) - 0.4, -0.6)
    widths = axis.secondary_yaxis("right")
    widths.set_ticks(range(len(bars)), [f"{found.width:.3f}" for *_, found in bars])
    widths.tick_params(length=0)
    widths.set_ylabel("width (nats)")
    axis.set_xlabel("cross-entropy of the mean classifier (nats)")
    guess = math.log(bars[0][2].classes)
    axis.axvline(guess, color=GREY, linestyle=":", linewidth=1.2)
    handles = [
        Line2D([], [], color=colour, linestyle=LINES[version], label=f"bracket, {version} features")
        for version, colour in colours.items()
        if any(found_version == version for _, found_version, _ in bars)
    ]
    handles.append(
        Line2D([], [], color=BLACK, marker="D", linestyle="none", label="measured cross-entropy")
    )
    handles.append(Line2D([], [], color=GREY, linestyle=":", label="guessing: log C"))
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def _cluster(correlation: Array) -> Any:
    """An order of the dimensions that puts correlated ones side by side."""
    if len(correlation) < 3:
        return np.arange(len(correlation))
    distance = 1 - (correlation + correlation.T) / 2
    np.fill_diagonal(distance, 0)
    return hierarchy.leaves_list(hierarchy.linkage(squareform(distance, checks=False), "average"))


FIGURES: dict[str, Callable[[Sequence[Study]], Figure | None]] = {
    "correlation": correlation_figure,
    "spectrum": spectrum_figure,
    "subsets": subsets_figure,
    "differences": differences_figure,
    "mask": mask_figure,
    "information": information_figure,
    "bracket": bracket_figure,
}
