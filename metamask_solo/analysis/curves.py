"""The curves of runs: what they logged while training, side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from metamask_solo.analysis.figures import (
    STYLE,
    curve_look,
    draw_mask_history,
    grid,
    legend_below,
    png,
    wrapped,
)
from metamask_solo.analysis.loading import mask_and_history, run_labels
from metamask_solo.checkpoints.reading import config_beside, read_checkpoint
from metamask_solo.errors import UserError
from metamask_solo.training.resume import read_metrics

# column of metrics.csv, title of the panel, unit
PANELS = (
    ("train_nce_loss_epoch", "contrastive loss (NT-Xent)", "nats"),
    ("train_barlow_loss_epoch", "redundancy loss (Barlow Twins)", "as weighed in training"),
    ("train_vicreg_loss_epoch", "VICReg's loss", "as weighed in training"),
    ("train_neg_cos_sim_epoch", "negative cosine similarity", "−1 to 1"),
    ("train_loss_epoch", "training loss", "as weighed in training"),
    ("val_knn_acc1", "online kNN", "% of validation images"),
    ("val_acc1", "online classifier or probe", "% of validation images"),
    ("train_rankme", "RankMe of the backbone's features", "directions in use"),
)
COLUMNS = 3  # of panels
MARKS = 12  # on a curve


def draw_runs(paths: Sequence[Path]) -> bytes:
    """A PNG file with a panel for each measure that a run logged; the same bytes every time.

    Args:
        paths: of each run its folder, or a checkpoint in it.

    Raises:
        UserError: there is no such run, or it logged no finite number that is drawn.
    """
    folders = [path if path.is_dir() else path.parent for path in paths]
    metrics = [_metrics(path, folder) for path, folder in zip(paths, folders, strict=True)]
    runs = []
    for folder in folders:
        config, name = config_beside(folder), folder.resolve().name
        runs.append((str(config.get("name") or name) if config else name, config, folder))
    labels = run_labels(runs)
    panels = []
    for column, title, unit in PANELS:
        curves = [_curve(rows, column) for rows in metrics]
        if any(curve.notna().any() for curve in curves):
            panels.append((title, unit, curves))
    masks = [(label, *_mask_and_history(f)) for label, f in zip(labels, folders, strict=True)]
    masked = [(label, mask, history) for label, mask, history in masks if history is not None]
    count = len(panels) + len(masked)
    if not count:
        raise UserError("the runs logged no finite number of what is drawn")
    with matplotlib.rc_context(STYLE):
        columns = min(COLUMNS, count)
        figure, axes = grid(-(-count // columns), columns, height=3.7)
        for (title, unit, curves), axis in zip(panels, axes.flat, strict=False):
            _draw_panel(axis, labels, curves)
            axis.set(xlabel="epoch", ylabel=unit, title=title)
        for (label, mask, history), axis in zip(masked, axes.flat[len(panels) :], strict=False):
            draw_mask_history(axis, history)
            spread = f"{mask.min():.4f} to {mask.max():.4f}"
            axis.set_xlabel("optimiser step (count)")
            axis.set_title(f"{wrapped('mask of ' + label)}\nat the end: {spread}")
        for axis in axes.flat:
            axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        for axis in axes.flat[count:]:
            axis.set_visible(False)
        legend_below(figure, columns=4)
        return png(figure)


def _metrics(path: Path, folder: Path) -> pd.DataFrame:
    if not path.exists():
        raise UserError(f"{path}: no such run")
    rows = read_metrics(folder)
    if rows.empty:
        raise UserError(
            f"{folder}: no metrics were logged (logs/version_*/metrics.csv or metrics.csv)"
        )
    return rows


def _curve(rows: pd.DataFrame, column: str) -> pd.Series:
    """The last value of each epoch, from 1, that logged one; NaN for no finite number."""
    logged = rows.reindex(columns=["epoch", column]).dropna(subset=column)
    logged = logged.apply(pd.to_numeric, errors="coerce").dropna(subset="epoch")
    logged = logged.drop_duplicates("epoch", keep="last")
    curve = logged.set_index(logged.epoch.astype(int) + 1)[column].astype(float)
    return curve.where(np.isfinite)


def _mask_and_history(folder: Path) -> tuple[Any, pd.DataFrame | None]:
    if not any(folder.glob("*.ckpt")):
        return None, None
    return mask_and_history(read_checkpoint(folder))[:2]


def _draw_panel(axis: Axes, labels: Sequence[str], curves: Sequence[pd.Series]) -> None:
    """A line for each run, empty where it logged nothing, broken at what is no finite number."""
    for number, (label, curve) in enumerate(zip(labels, curves, strict=True)):
        gap = np.r_[True, curve.isna(), True]
        marked = (gap[:-2] & gap[2:]) | (np.arange(len(curve)) % -(-len(curve) // MARKS) == 0)
        marks, look = np.flatnonzero(marked).tolist(), curve_look(number, len(curves))
        axis.plot(curve.index, curve, label=label, markevery=marks, **look)
