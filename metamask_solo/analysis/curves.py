"""The curves of runs: what they logged while training, side by side."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from omegaconf import DictConfig, OmegaConf

from metamask_solo.analysis.figures import (
    STYLE,
    curve_look,
    draw_mask_history,
    grid,
    legend_below,
    png,
    wrapped,
)
from metamask_solo.analysis.loading import run_labels
from metamask_solo.checkpoints.reading import config_beside, read_checkpoint
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
COLUMNS = 3  # of panels
MARKS = 12  # on a curve


@dataclass(frozen=True)
class Run:
    """What a run logged.

    Attributes:
        label: name in a figure.
        config: its args.json, or None.
        curves: for each column of ``PANELS``, the values by epoch (from 1); NaN where the logged
            value is no finite number.
        masks: the masks of all epochs, shape (epochs, D), or None.
    """

    label: str
    folder: Path
    config: DictConfig | None
    curves: dict[str, pd.Series]
    masks: np.ndarray | None


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
    table = read_metrics(folder)
    if not len(table):
        raise UserError(
            f"{folder}: no metrics were logged (logs/version_*/metrics.csv or metrics.csv)"
        )
    config, masks = config_beside(folder), None
    if any(folder.glob("*.ckpt")):
        history = read_checkpoint(folder).raw.get("metamask", {}).get("history")
        masks = None if history is None else history["mask"].double().numpy()
    curves = {column: _curve(table, column) for column, *_ in PANELS}
    if config is not None:  # without the weight by which methods differ, so that they compare
        usual = 0.024 if config.get("method") == "barlow_twins" else 1.0
        weight = OmegaConf.select(config, "method_kwargs.scale_loss", default=usual)
        curves[REDUNDANCY] = curves[REDUNDANCY] / (weight or 1.0)
    name = folder.resolve().name if config is None else config.get("name")
    return Run(str(name or folder.resolve().name), folder, config, curves, masks)


def _curve(table: pd.DataFrame, column: str) -> pd.Series:
    """The last value of each epoch that logged one."""
    logged = table.reindex(columns=["epoch", column]).dropna(subset=column)
    logged = logged.apply(pd.to_numeric, errors="coerce").dropna(subset="epoch")
    curve = logged.set_index("epoch")[column].astype(float)
    curve.index = curve.index.astype(int) + 1
    return curve[~curve.index.duplicated(keep="last")].where(np.isfinite)


def draw_curves(runs: Sequence[Run]) -> bytes:
    """A PNG file with a panel for each measure that a run logged; the same bytes every time."""
    panels = [panel for panel in PANELS if any(run.curves[panel[0]].any() for run in runs)]
    masked = [run for run in runs if run.masks is not None]
    count = len(panels) + len(masked)
    if not count:
        raise UserError("the runs logged nothing of what is drawn")
    with matplotlib.rc_context(STYLE):
        columns = min(COLUMNS, count)
        figure, axes = grid(-(-count // columns), columns, height=3.7)
        for (column, title, unit), axis in zip(panels, axes.flat, strict=False):
            _draw_panel(axis, runs, column)
            axis.set(ylabel=unit, title=title)
        for run, axis in zip(masked, axes.flat[len(panels) :], strict=False):
            masks = run.masks
            assert masks is not None
            draw_mask_history(axis, np.arange(len(masks)), masks)
            spread = f"{masks[-1].min():.4f} to {masks[-1].max():.4f}"
            axis.set_title(f"{wrapped('mask of ' + run.label)}\nat the end: {spread}")
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
        curve = run.curves[column]
        if curve.empty:
            continue
        gap = np.r_[True, curve.isna(), True]
        marked = (gap[:-2] & gap[2:]) | (np.arange(len(curve)) % -(-len(curve) // MARKS) == 0)
        marks, look = np.flatnonzero(marked).tolist(), curve_look(number, len(runs))
        axis.plot(curve.index, curve, label=run.label, markevery=marks, **look)
