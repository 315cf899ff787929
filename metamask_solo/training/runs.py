"""Run folders: what lies in them, which one is continued, and the metrics that were logged."""

import csv
import json
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from metamask_solo.atomic_files import atomic_write
from metamask_solo.checkpoints.reading import load_raw
from metamask_solo.errors import UserError
from metamask_solo.training.callbacks import position

# what a run must share with a checkpoint for auto_resume to continue it; solo-learn's list, and
# what else would make it another run
SHOULD_MATCH = (
    "name",
    "backbone",
    "method",
    "method_kwargs",
    "data.dataset",
    "data.train_path",
    "max_epochs",
    "optimizer",
    "scheduler",
    "momentum",
    "augmentations",
    "seed",
    "pretrained_feature_extractor",
    "finetune",
)


# written into a run's folder when it ended as planned
FINISHED = "finished.json"


# what a checkpoint holds from which training can go on; one with weights only lacks some
TRAINING_STATE = ("state_dict", "loops", "optimizer_states", "lr_schedulers", "callbacks")


@dataclass
class FitResult:
    """What a run left behind.

    Attributes:
        folder: the run's folder.
        checkpoint: its last checkpoint, None where checkpoints are off.
        metrics: the last value of everything logged.
        seconds_per_epoch: training and validation, interruptions not counted.
    """

    folder: Path
    checkpoint: Path | None
    metrics: dict[str, float]
    seconds_per_epoch: float

    def __str__(self) -> str:
        """The last line that a command prints: the checkpoint, and the validation metrics."""
        parts = [f"checkpoint: {self.checkpoint}"] if self.checkpoint else []
        metrics = sorted(self.metrics.items())
        return "  ".join([*parts, *(f"{k}={v:.4f}" for k, v in metrics if k.startswith("val_"))])


def finished_run(cfg: DictConfig, kind: str) -> FitResult | None:
    """A finished run of the same config, or None."""
    for summary in sorted((Path(cfg.checkpoint.dir) / kind).glob(f"*/{FINISHED}")):
        checkpoints = sorted(summary.parent.glob("*.ckpt"), key=lambda p: p.stat().st_mtime)
        if checkpoints and _same_run(cfg, summary.parent / "args.json"):
            content = json.loads(summary.read_text())
            return FitResult(summary.parent, checkpoints[-1], **content)
    return None


def new_folder(root: Path) -> Path:
    """A new run's folder, not made yet, named as solo-learn does without W&B.

    Processes that Lightning starts inherit the name. Those of torchrun or Slurm have other names,
    until the first process tells them its own.
    """
    name = "METAMASK_SOLO_RUN"
    if name not in os.environ or int(os.environ.get("LOCAL_RANK", 0)) == 0:
        os.environ[name] = secrets.token_hex(4)
    return root / f"offline-{os.environ[name]}"


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"checkpoint.dir={folder.parents[1]}: cannot be written ({error.strerror})"
        ) from error


def checkpoint_to_resume(cfg: DictConfig, root: Path) -> Path | None:
    if cfg.resume_from_checkpoint is not None:
        path = Path(cfg.resume_from_checkpoint)
        lacking = [key for key in TRAINING_STATE if key not in load_raw(path)]
        if lacking:
            raise UserError(f"{path}: training cannot go on from it, it has no {lacking[0]}")
        return path
    if not cfg.auto_resume.enabled or not root.is_dir():
        return None
    oldest = time.time() - cfg.auto_resume.max_hours * 3600
    candidates = [p for p in root.glob("*/*.ckpt") if p.stat().st_mtime > oldest]
    for path in sorted(candidates, key=lambda p: p.stat().st_mtime, reverse=True):
        if not _same_run(cfg, path.parent / "args.json"):
            continue
        try:
            state = load_raw(path)
        except UserError as error:
            print(f"auto_resume: skipped: {error}")
            continue
        if any(key not in state for key in TRAINING_STATE):  # a folded checkpoint: weights only
            continue
        finished = (path.parent / FINISHED).exists()
        if not finished or position(state)[0] < cfg.max_epochs:
            return path
    return None


def _same_run(cfg: DictConfig, args: Path) -> bool:
    try:
        other = OmegaConf.create(json.loads(args.read_text()))
    except (OSError, json.JSONDecodeError):
        return False
    return all(
        _plain(OmegaConf.select(cfg, key, default=None))
        == _plain(OmegaConf.select(other, key, default=None))
        for key in SHOULD_MATCH
    )


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def read_metrics(folder: Path) -> list[dict[str, str]]:
    """The logged rows of a run in order; of a resumed one, without the rows that it repeated."""
    rows: list[dict[str, str]] = []
    versions = sorted((folder / "logs").glob("version_*"), key=lambda p: int(p.name.split("_")[1]))
    for version in versions:
        path = version / "metrics.csv"
        if not path.is_file():
            continue
        with path.open(newline="") as file:
            part = list(csv.DictReader(file))
        if part:
            first = int(part[0]["step"])
            rows = [row for row in rows if int(row["step"]) < first] + part
    return rows


def merge_metrics(folder: Path) -> None:
    rows = read_metrics(folder)
    if not rows:
        return
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_write(folder / "metrics.csv") as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
