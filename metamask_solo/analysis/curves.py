"""The curves of runs: what they logged while training, side by side."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from omegaconf import DictConfig

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


@dataclass(frozen=True)
class Run:
    """What a run logged.

    Attributes:
        label: name in a figure.
        config: its args.json, or None.
        curves: the columns of ``PANELS`` that it logged, by epoch (from 1); NaN where the logged
            value is no finite number.
        masks: a row of D weights for each epoch (from 0, the start), or None.
    """

    label: str
    folder: Path
    config: DictConfig | None
    curves: dict[str, pd.Series]
    masks: pd.DataFrame | None


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """The curves of runs, each given by its folder or a checkpoint in it.

    Raises:
        UserError: there is no such run, or it logged nothing.
    """
    runs = [_read_run(Path(path)) for path in paths]
    labels = run_labels([(run.label, run.config, run.folder) for run in runs])
    return [replace(run, label=label) for run, label in zip(runs, labels, strict=True)]


def _read_run(path: Path) -> Run:
    folder = path if path.is_dir() else path.parent
    if not path.exists():
        raise UserError(f"{path}: no such run")
    rows = pd.DataFrame(read_metrics(folder))
    if rows.empty:
        raise UserError(
            f"{folder}: no metrics were logged (logs/version_*/metrics.csv or metrics.csv)"
        )
    config, masks = config_beside(folder), None
    if any(folder.glob("*.ckpt")):
        masks = mask_and_history(read_checkpoint(folder))[1]
        masks = None if masks is None else masks.reset_index(drop=True)
    curves = {column: _curve(rows, column) for column, *_ in PANELS}
    curves = {column: curve for column, curve in curves.items() if not curve.empty}
    name = None if config is None else config.get("name")
    return Run(str(name or folder.resolve().name), folder, config, curves, masks)


def _curve(rows: pd.DataFrame, column: str) -> pd.Series:
    """The last value of each epoch that logged one."""
    logged = rows.reindex(columns=["epoch", column])
    logged = logged[logged[column].fillna("") != ""].apply(pd.to_numeric, errors="coerce")
    logged = logged.dropna(subset="epoch").drop_duplicates("epoch", keep="last")
    curve = logged.set_index(logged.epoch.astype(int) + 1)[column].astype(float)
    return curve.where(np.isfinite)


def draw_curves(runs: Sequence[Run]) -> bytes:
    """A PNG file with a panel for each measure that a run logged; the same bytes every time."""
    panels = [panel for panel in PANELS if any(panel[0] in run.curves for run in runs)]
    masked = [(run.label, run.masks) for run in runs if run.masks is not None]
    count = len(panels) + len(masked)
    if not count:
        raise UserError("the runs logged nothing of what is drawn")
    with matplotlib.rc_context(STYLE):
        columns = min(COLUMNS, count)
        figure, axes = grid(-(-count // columns), columns, height=3.7)
        for (column, title, unit), axis in zip(panels, axes.flat, strict=False):
            _draw_panel(axis, runs, column)
            axis.set(ylabel=unit, title=title)
        for (label, masks), axis in zip(masked, axes.flat[len(panels) :], strict=False):
            draw_mask_history(axis, masks)
            last = masks.iloc[-1]
            spread = f"{last.min():.4f} to {last.max():.4f}"
            axis.set_title(f"{wrapped('mask of ' + label)}\nat the end: {spread}")
        for axis in axes.flat:
            axis.set_xlabel("epoch")
            axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        for axis in axes.flat[count:]:
            axis.set_visible(False)
        legend_below(figure, columns=4)
        return png(figure)


def _draw_panel(axis: Axes, runs: Sequence[Run], column: str) -> None:
    """A line for each run; it breaks where a value is no finite number."""
    for number, run in enumerate(runs):
        if (curve := run.curves.get(column)) is None:
            continue
        gap = np.r_[True, curve.isna(), True]
        marked = (gap[:-2] & gap[2:]) | (np.arange(len(curve)) % -(-len(curve) // MARKS) == 0)
        marks, look = np.flatnonzero(marked).tolist(), curve_look(number, len(runs))
        axis.plot(curve.index, curve, label=run.label, markevery=marks, **look)
