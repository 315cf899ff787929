"""The figures of a report, and what all figures share.

Colours of Okabe and Ito (2008), and never colour alone.
"""

import io
import math
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from metamask_solo.analysis.measure_checkpoint import PROBES, Measures, Subsets
from metamask_solo.analysis.measures import Array, IntArray
from metamask_solo.analysis.subsets import SUBSET_PROBES

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
STYLES = ("-", "--", "-.", ":")
LINES = {"plain": "-", "masked": "--"}
PANEL = 4.6  # inches
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
INFORMATION = {
    "class": "variance explained by\nthe class (η², 0 to 1)",
    "photograph": "variance explained by the\nbackground photograph (η², 0 to 1)",
    "colour": "variance explained by the\nbackground's mean colour (R², 0 to 1)",
    "deviation": "standard deviation\n(feature units)",
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


def curve_look(number: int, count: int) -> dict[str, Any]:
    """How one of ``count`` curves is drawn; later ones are thinner, so that none hides another."""
    colour, marker = LOOKS[number % len(LOOKS)]
    style = STYLES[number // len(LOOKS) % len(STYLES)]
    width = 1.4 + 1.4 * (count - 1 - number) / max(1, count - 1)
    size = 2 + 2 * width
    look = {"color": colour, "linestyle": style, "linewidth": width}
    return {**look, "marker": marker, "markersize": size}


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
        place: dict[str, Any] = {"loc": "outside lower center", "ncols": min(columns, len(handles))}
        figure.legend(list(handles.values()), list(handles), **place)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file; the same bytes every time."""
    content = io.BytesIO()
    dpi = STYLE["savefig.dpi"]
    figure.savefig(content, format="png", dpi=dpi, metadata={"Software": None})
    return content.getvalue()


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


def draw_figures(checkpoints: Sequence[Measures]) -> dict[str, bytes]:
    """All figures that these measures allow, by name, as PNG files; the same bytes every time."""
    drawn = {}
    with matplotlib.rc_context(STYLE):
        for name, draw in FIGURES.items():
            if (figure := draw(checkpoints)) is not None:
                drawn[name] = png(figure)
    return drawn


def correlation_figure(checkpoints: Sequence[Measures]) -> Figure | None:
    """|correlation| of every pair of dimensions, one panel for each checkpoint."""
    measured = [(one.name, one.redundancy["plain"]) for one in checkpoints if one.redundancy]
    if not measured:
        return None
    columns = min(3, len(measured))
    width = 3.5 if columns > 1 else 4.6  # beside one panel alone stands the colour bar, too
    lines = max(wrapped(name, 22).count("\n") for name, _ in measured)
    figure, axes = grid(-(-len(measured) // columns), columns, width, height=3.4 + 0.18 * lines)
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


def spectrum_figure(checkpoints: Sequence[Measures]) -> Figure | None:
    """How much of the pairs is correlated, and the singular values."""
    measured = [(one.name, one.redundancy) for one in checkpoints if one.redundancy]
    if not measured:
        return None
    curves = sum(len(versions) for _, versions in measured)
    figure, axes = grid(1, 2, height=PANEL - 0.9 + 0.19 * curves)  # with a legend below
    pairs, spectrum = axes[0]
    thresholds = np.linspace(0, 1, 201)
    for number, (name, versions) in enumerate(measured):
        look = curve_look(number, len(measured)) | {"markevery": 0.12}
        matrix = versions["plain"].correlation
        values = np.sort(np.abs(matrix[np.triu_indices_from(matrix, 1)]))
        above = 1 - np.searchsorted(values, thresholds, side="right") / max(1, len(values))
        shown = above > 0
        pairs.plot(thresholds[shown], above[shown], label=name, **look)
        for version, redundancy in versions.items():
            singular = redundancy.singular_values
            relative = singular / max(singular[0], np.finfo(float).tiny)
            shown = relative > 1e-6
            spectrum.plot(
                np.arange(1, len(singular) + 1)[shown],
                relative[shown],
                label=f"{name}, {version}: RankMe {redundancy.rankme:.1f}",
                **look | {"linestyle": LINES[version]},
            )
    pairs.set(yscale="log", xlim=(0, 1), xlabel="threshold x (|correlation|, 0 to 1)")
    pairs.set_ylabel("share of pairs above x (0 to 1)")
    pairs.set_title("redundancy of pairs (plain features)")
    spectrum.set(yscale="log", xlabel="rank k of the singular value (count)")
    spectrum.set_ylabel("σ$_k$ / σ$_1$ (ratio)")
    spectrum.set_title("singular value spectrum")
    handles = spectrum.get_legend_handles_labels()
    # long enough to tell a dashed line
    figure.legend(*handles, loc="outside lower center", ncols=1, handlelength=4)
    return figure


def subsets_figure(checkpoints: Sequence[Measures]) -> Figure | None:
    """Accuracy against the share of dimensions kept: a row for each checkpoint."""
    measured = [(one.name, one.subsets) for one in checkpoints if one.subsets is not None]
    if not measured:
        return None
    figure, axes = grid(len(measured), 2, height=3.7)
    for (name, subsets), row in zip(measured, axes, strict=True):
        for (probe, title), axis in zip(SUBSET_PROBES.items(), row, strict=True):
            _subset_panel(axis, subsets, probe)
            axis.set_ylabel(f"{title} accuracy\n(% of val images)")
            axis.set_title(wrapped(name))
    for column in axes.T:  # the same scale for all checkpoints
        limits = np.array([axis.get_ylim() for axis in column])
        for axis in column:
            axis.set_ylim(limits.min(), limits.max())
    legend_below(figure, columns=3)
    return figure


def _subset_panel(axis: Axes, subsets: Subsets, probe: str) -> None:
    curves, rates = subsets.curves[probe], np.array(subsets.rates)
    draws, full = curves.draws, curves.full
    low, high = np.quantile(draws, [0.05, 0.95], axis=0)
    middle = "random dimensions: middle 90 % of draws"
    axis.fill_between(rates, low, high, color=SKY, alpha=0.4, linewidth=0, label=middle)
    axis.plot(rates, draws.mean(0), color=BLUE, marker="o", label="random dimensions: mean")
    better = draws > full
    axis.scatter(
        np.broadcast_to(rates, draws.shape)[better],
        draws[better],
        s=16,
        color=VERMILION,
        marker="x",
        linewidths=0.9,
        zorder=5,
        label="random draw better than all dimensions",
    )
    axis.axhline(full, color=BLACK, linestyle="--", linewidth=1.1, label="all dimensions, plain")
    lines = (":", (0, (5, 1, 1, 1)))
    for (name, accuracy), line in zip(subsets.untrained.items(), lines, strict=False):
        axis.axhline(accuracy[probe], color=GREY, linestyle=line, linewidth=1.1, label=name)
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


def _intervals_figure(
    rows: Sequence[tuple[str, float, float, float]], looks: Sequence[tuple[str, str]]
) -> tuple[Figure, Axes]:
    """A named row for each interval, from the top down.

    Args:
        rows: name, ends of the interval, and the value that it belongs to.
        looks: colour and marker of each row.
    """
    figure, axes = grid(1, 1, width=8, height=1.6 + 0.42 * len(rows))
    axis = axes[0, 0]
    for position, ((_, low, high, value), (colour, marker)) in enumerate(
        zip(rows, looks, strict=True)
    ):
        axis.plot([low, high], [position] * 2, "|-", color=colour, markersize=11)
        axis.plot(value, position, marker, color=colour)
    axis.set_yticks(range(len(rows)), [wrapped(name, 40) for name, *_ in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    return figure, axis


def differences_figure(checkpoints: Sequence[Measures]) -> Figure | None:
    """What the mask adds to each accuracy, with its interval; None without masks or labels."""
    gains = [
        (one.name, probe, 100 * np.array(accuracy.difference))
        for one in checkpoints
        for probe, accuracy in (one.accuracy or {}).items()
        if accuracy.difference is not None
    ]
    if not gains:
        return None
    figure, axis = _intervals_figure(
        [(f"{name}, {PROBES[probe]}", low, high, mean) for name, probe, (mean, low, high) in gains],
        [(BLUE, "o") if probe == "knn" else (VERMILION, "s") for _, probe, _ in gains],
    )
    axis.axvline(0, color=GREY, linestyle="--", linewidth=1.1)
    least_span(axis, np.array([gain for *_, gain in gains]), 2, "x")
    axis.set_xlabel("masked minus plain features\n(percentage points, 95 % interval)")
    return figure


def mask_figure(checkpoints: Sequence[Measures]) -> Figure | None:
    """Histogram of the mask, and its way over training; None without any mask."""
    masks = [(one.name, one.mask) for one in checkpoints if one.mask is not None]
    if not masks:
        return None
    figure, axes = grid(len(masks), 2, height=3.6)
    for (name, mask), (histogram, way) in zip(masks, axes, strict=True):
        values = mask.values
        histogram.hist(values, bins=40, color=SKY, edgecolor=BLUE, linewidth=0.6)
        least_span(histogram, values, along="x")
        histogram.set(xlabel="mask weight m (dimensionless)")
        histogram.set_ylabel("number of dimensions (count)")
        histogram.xaxis.set_major_locator(MaxNLocator(6))
        histogram.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        spread = f"{values.min():.4f} to {values.max():.4f}"
        histogram.set_title(f"{wrapped(name)}\nat the end: {spread}")
        way.set_title(f"{wrapped(name)}\nover training")
        if mask.history:
            steps = np.array([row["step"] for row in mask.history])
            draw_mask_history(way, steps, mask.masks)
            way.set_xlabel("optimiser step (count)")
            start = float(mask.masks[0].mean())
            histogram.axvline(start, color=GREY, linestyle=":", linewidth=1.1)
        else:
            missing: dict[str, Any] = {"ha": "center", "transform": way.transAxes}
            way.text(0.5, 0.5, "no history in the checkpoint", **missing)
            way.set_axis_off()
    legend_below(figure, columns=4)
    return figure


def information_figure(checkpoints: Sequence[Measures]) -> Figure | None:
    """Mask weight of each dimension against what it tells; None if no mask ranks them."""
    masked = [
        (one.name, one.mask)
        for one in checkpoints
        if one.mask is not None and one.mask.information and np.ptp(np.abs(one.mask.values)) > 0
    ]
    if not masked:
        return None
    kinds = list(masked[0][1].information)
    figure, axes = grid(len(masked) * -(-len(kinds) // 2), 2)
    for axis in axes.flat:
        axis.set_visible(False)
    for (name, mask), row in zip(masked, axes.reshape(len(masked), -1), strict=True):
        weights = np.abs(mask.values)
        for kind, axis in zip(kinds, row, strict=False):
            axis.set_visible(True)
            axis.scatter(
                weights, mask.information[kind].values, s=9, alpha=0.5, color=BLUE, linewidths=0
            )
            least_span(axis, weights, along="x")
            axis.set_xlabel(f"mask weight |m| ({weights.min():.4f} to {weights.max():.4f})")
            axis.set_ylabel(INFORMATION[kind])
            axis.set_ylim(bottom=0)
            axis.xaxis.set_major_locator(MaxNLocator(4))
            rank, title = mask.information[kind].rank_correlation, "ρ not defined: constant"
            if rank is not None:
                interval = f"95 % interval {rank.low:+.2f} to {rank.high:+.2f}"
                title = f"ρ = {rank.rho:+.2f} ({interval}), p = {rank.p_value:.4f}"
            title = title.replace("-0.", "\N{MINUS SIGN}0.")
            axis.set_title(f"{wrapped(name)}\n{title}", fontsize=9.5)
    return figure


def bounds_figure(checkpoints: Sequence[Measures]) -> Figure | None:
    """The bounds of the cross-entropy: one bar for plain, one for masked features."""
    bars = [(c.name, version, of) for c in checkpoints for version, of in (c.bounds or {}).items()]
    if not bars:
        return None
    figure, axis = _intervals_figure(
        [
            (f"{name}, {version}", of.lower, of.upper, of.cross_entropy)
            for name, version, of in bars
        ],
        [(BLUE, "D") if version == "plain" else (VERMILION, "D") for _, version, _ in bars],
    )
    guess = math.log(bars[0][2].classes)
    axis.axvline(guess, color=GREY, linestyle=":", linewidth=1.2)
    axis.set_xlabel("cross-entropy of the mean classifier (nats)\ndotted: guessing, log C")
    widths = axis.secondary_yaxis("right")
    widths.set_ticks(range(len(bars)), [f"{of.width:.3f}" for *_, of in bars])
    widths.tick_params(length=0)
    widths.set_ylabel("width (nats)")
    return figure


FIGURES: dict[str, Callable[[Sequence[Measures]], Figure | None]] = {
    "correlation": correlation_figure,
    "spectrum": spectrum_figure,
    "subsets": subsets_figure,
    "differences": differences_figure,
    "mask": mask_figure,
    "information": information_figure,
    "bounds": bounds_figure,
}
