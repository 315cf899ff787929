"""The curves of runs: what they logged while training, side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from omegaconf import DictConfig

from metamask_solo.analysis.drawing import (
    BLUE,
    GREY,
    LOOKS,
    SKY,
    STYLE,
    least_span,
    note_of_coinciding,
    plain_text,
    png,
    wrapped,
)
from metamask_solo.checkpoints.reading import read_checkpoint
from metamask_solo.errors import UserError
from metamask_solo.training.resume import read_metrics

# column of metrics.csv, title of the panel, unit
REDUNDANCY = "train_barlow_loss_epoch"
PANELS = (
    ("train_nce_loss_epoch", "contrastive loss (NT-Xent)", "nats"),
    (REDUNDANCY, "redundancy loss (Barlow Twins)", "without the weight scale_loss"),
    ("train_vicreg_loss_epoch", "VICReg's loss", "as weighed in training"),
    ("train_neg_cos_sim_epoch", "negative cosine similarity", "−1 to 1"),
    ("train_loss_epoch", "training loss", "nats"),
    ("val_knn_acc1", "online kNN", "% of validation images"),
    ("val_acc1", "online classifier or probe", "% of validation images"),
    ("train_rankme", "RankMe of the backbone's features", "directions in use"),
)
STYLES = ("-", "--", "-.", ":")
COLUMNS = 3


@dataclass(frozen=True)
class Run:
    """What a run logged: rows of its metrics, and its masks (epochs × D) where it has any."""

    name: str
    rows: list[dict[str, str]]
    masks: np.ndarray | None


def read_run(path: str | Path, number: int) -> Run:
    """The curves of a run's folder, or of the folder that a checkpoint lies in.

    Args:
        number: puts runs of one name apart.

    Raises:
        UserError: there is no such run, or it logged nothing.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if not path.exists():
        raise UserError(f"{path}: no such run")
    rows = read_metrics(folder)
    if not rows:
        raise UserError(f"{folder}: no metrics were logged (logs/version_*/metrics.csv)")
    name, masks = folder.name, None
    if any(folder.glob("*.ckpt")):
        checkpoint = read_checkpoint(folder)
        config = checkpoint.config
        if config is not None:
            name = str(config.get("name") or name)
            rows = [_unweighted(row, config) for row in rows]
        history = checkpoint.raw.get("metamask", {}).get("history")
        if history is not None:
            masks = history["mask"].double().numpy()
    return Run(f"{number}: {plain_text(name, 40)}", rows, masks)


def _unweighted(row: dict[str, str], config: DictConfig) -> dict[str, str]:
    """The redundancy loss without its weight, by which methods differ: curves to compare."""
    if not row.get(REDUNDANCY):
        return row
    usual = 0.024 if config.get("method") == "barlow_twins" else 1.0
    weight = config.get("method_kwargs", {}).get("scale_loss", usual)
    return {**row, REDUNDANCY: str(float(row[REDUNDANCY]) / (weight or 1.0))}


def draw_curves(runs: Sequence[Run]) -> bytes:
    """A PNG file with a panel for each measure that a run logged; the same bytes every time."""
    panels = [panel for panel in PANELS if any(_points(run, panel[0])[0] for run in runs)]
    masked = [run for run in runs if run.masks is not None]
    count = len(panels) + len(masked)
    if not count:
        raise UserError("the runs logged nothing of what is drawn")
    with matplotlib.rc_context(STYLE):
        columns = min(COLUMNS, count)
        rows = -(-count // columns)
        figure = Figure(figsize=(4.6 * columns, 3.5 * rows + 0.5), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for (column, title, unit), axis in zip(panels, axes, strict=False):
            _draw_panel(axis, runs, column, title, unit)
        spreads = axes[len(panels) : count]
        for run, axis in zip(masked, spreads, strict=True):
            _draw_spread(axis, run)
        for axis in axes[count:]:
            axis.set_visible(False)
        handles: dict[str, Any] = {}
        for axis in axes[:count]:
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        if handles:
            figure.legend(
                handles.values(),
                handles.keys(),
                loc="outside lower center",
                ncols=min(4, len(handles)),
            )
        return png(figure)


def _points(run: Run, column: str) -> tuple[list[int], list[float]]:
    """Epochs from 1, and the values that are finite."""
    rows = [(int(row["epoch"]) + 1, float(row[column])) for row in run.rows if row.get(column)]
    kept = {epoch: value for epoch, value in rows if np.isfinite(value)}
    return list(kept), list(kept.values())


def _draw_panel(axis: Axes, runs: Sequence[Run], column: str, title: str, unit: str) -> None:
    looks = zip(runs, cycle(LOOKS), cycle(STYLES), strict=False)
    for run, (colour, marker), style in looks:
        epochs, values = _points(run, column)
        if epochs:
            markevery = max(1, len(epochs) // 12)
            axis.plot(
                epochs,
                values,
                style,
                color=colour,
                marker=marker,
                markevery=markevery,
                markersize=4,
                label=run.name,
            )
    axis.set(xlabel="epoch", ylabel=unit, title=title + note_of_coinciding(axis))
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _draw_spread(axis: Axes, run: Run) -> None:
    masks = run.masks
    assert masks is not None
    epochs = np.arange(len(masks))
    low, quarter, middle, upper, high = np.quantile(masks, [0, 0.25, 0.5, 0.75, 1], axis=1)
    axis.fill_between(
        epochs, low, high, color=SKY, alpha=0.35, linewidth=0, label="mask: all dimensions"
    )
    axis.fill_between(
        epochs, quarter, upper, color=SKY, alpha=0.8, linewidth=0, label="mask: middle half"
    )
    axis.plot(epochs, middle, color=BLUE, label="mask: median")
    start = float(masks[0].mean())
    axis.axhline(start, color=GREY, linestyle=":", linewidth=1, label="mask: start")
    least_span(axis, masks)
    axis.set(xlabel="epoch", ylabel="mask weight m")
    spread = f"{masks[-1].min():.4f} to {masks[-1].max():.4f}"
    axis.set_title(f"{wrapped('mask of ' + run.name)}\nat the end: {spread}")
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
