"""Run folders: what lies in them, which one is continued, and the metrics that were logged."""

import csv
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from metamask_solo.atomic_files import atomic_write
from metamask_solo.checkpoints.reading import load_raw
from metamask_solo.data.datasets import is_folder
from metamask_solo.data.folders import find_images, say
from metamask_solo.data.reading import shown
from metamask_solo.errors import RunStopped, UserError

# What says only where a run is written, how it is logged, and which file it starts from, whose
# content is in STARTED_FROM. All else decides the result, and makes another run.
INDIFFERENT = (
    "auto_resume",
    "checkpoint",
    "data.num_workers",
    "data.persistent_workers",
    "debug_augmentations",
    "enable_model_summary",
    "enable_progress_bar",
    "fold_at_end",
    "log_every_n_steps",
    "pretrained_feature_extractor",
    "profiler",
    "resume_from_checkpoint",
    "wandb",
)
STARTED_FROM = "started_from"
IMAGES = "images"
# a folder of more images is known by their names alone: asking for the sizes would take long
MOST_SIZES = 100_000

# written into a run's folder when it ended as planned
FINISHED = "finished.json"


# held by the process that writes into a run's folder, and gone with it
LOCK = "running.lock"


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
        stopped: a signal that came when there was nothing left to stop.
    """

    folder: Path
    checkpoint: Path | None
    metrics: dict[str, float]
    seconds_per_epoch: float
    stopped: RunStopped | None = None

    def __str__(self) -> str:
        """The last line that a command prints: the checkpoint, and the validation metrics."""
        parts = [f"checkpoint: {self.checkpoint}"] if self.checkpoint else []
        metrics = sorted(self.metrics.items())
        return "  ".join([*parts, *(f"{k}={v:.4f}" for k, v in metrics if k.startswith("val_"))])


def finished_run(cfg: DictConfig, kind: str) -> FitResult | None:
    """A finished run of the same config, or None."""
    identify_start(cfg)
    for summary in sorted((Path(cfg.checkpoint.dir) / kind).glob(f"*/{FINISHED}")):
        checkpoints = sorted(summary.parent.glob("*.ckpt"), key=lambda p: p.stat().st_mtime)
        if checkpoints and _difference(cfg, summary.parent / "args.json") is None:
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
    """Makes a new run's folder; raises UserError where it cannot be written."""
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"checkpoint.dir={folder.parents[1]}: cannot be written ({error.strerror})"
        ) from error


def checkpoint_to_resume(cfg: DictConfig, root: Path) -> Path | None:
    """Where training goes on: in the same run that was stopped, or at the named checkpoint.

    Of a run that began at the named checkpoint and was stopped, what it did since is not lost.

    Raises:
        UserError: the named checkpoint lacks something, or the same run is still going.
    """
    named = cfg.resume_from_checkpoint
    if cfg.auto_resume.enabled and root.is_dir():
        stopped = _stopped_run(cfg, root, tell=named is None)
        if stopped is not None:
            return stopped
    if named is not None:
        path = Path(named)
        lacking = [key for key in TRAINING_STATE if key not in load_raw(path)]
        if lacking:
            raise UserError(f"{path}: training cannot go on from it, it has no {lacking[0]}")
        return path
    return None


def _stopped_run(cfg: DictConfig, root: Path, tell: bool) -> Path | None:
    """The last checkpoint of the newest unfinished run of the same config."""
    oldest = time.time() - cfg.auto_resume.max_hours * 3600
    differing = ""
    for folder in _newest_first(root):
        if (folder / FINISHED).exists():
            continue
        difference = _difference(cfg, folder / "args.json")
        if difference is not None:
            differing = differing or _told(cfg, folder, difference)
            continue
        if is_running(folder):
            raise UserError(
                f"{folder}: this run is still going; auto_resume.enabled=False starts another one"
            )
        # a number of the epoch says more than a file's time, which copying changes
        candidates = [p for p in folder.glob("*.ckpt") if p.stat().st_mtime > oldest]
        for path in sorted(candidates, key=age, reverse=True):
            try:
                state = load_raw(path)
            except UserError as error:
                print(f"auto_resume: skipped: {error}")
                continue
            if all(key in state for key in TRAINING_STATE):  # a folded one has weights only
                return path
    if differing and tell:
        print(differing)
    return None


def _newest_first(root: Path) -> list[Path]:
    times = {args.parent: args.stat().st_mtime for args in root.glob("*/args.json")}
    for path in root.glob("*/*.ckpt"):
        times[path.parent] = max(times.get(path.parent, 0.0), path.stat().st_mtime)
    return sorted(times, key=lambda folder: times[folder], reverse=True)


def age(path: Path) -> tuple[int, float]:
    """Sorts checkpoints from the oldest to the newest: by epoch, then by the time of the file."""
    epoch = re.search(r"-ep=(\d+)\.ckpt$", path.name)
    return (int(epoch[1]) if epoch else -1, path.stat().st_mtime)


def identify_images(cfg: DictConfig, *datasets: Any) -> None:
    """Writes into the config which images the run has: other ones make another run.

    Args:
        datasets: training and validation images; None for none.
    """
    OmegaConf.update(cfg, STARTED_FROM, {IMAGES: _digest(datasets)}, force_add=True)


def say_other_images(cfg: DictConfig) -> None:
    """A note where the folders of a run's config hold other images than the run had.

    A relative path, for instance, names another folder in another working directory.
    """
    known = OmegaConf.select(cfg, f"{STARTED_FROM}.{IMAGES}")
    drawn = cfg.data.get("fraction", -1) not in (-1, None)
    if known is None or drawn or cfg.data.get("no_labels", False) or not is_folder(cfg):
        return
    folders = [cfg.data.get("train_path"), cfg.data.get("val_path")]
    try:
        found = [folder and find_images(folder, "data") for folder in folders]
    except UserError:  # of the split that nobody asked for; the other's reader says it
        return
    if _digest(found) != known:
        places = " and ".join(shown(folder) for folder in folders if folder)
        say(f"data: the images in {places} are not those that the run had")


def _digest(datasets: Iterable[Any]) -> str:
    """A SHA-256 of names, sizes and labels."""
    digest = hashlib.sha256()
    for dataset in datasets:
        samples = getattr(dataset, "samples", None)  # torchvision's files are always the same
        if samples is None:
            samples = [("", -1)] * (0 if dataset is None else len(dataset))
        sized = len(samples) <= MOST_SIZES
        for path, label in samples:
            size = Path(path).stat().st_size if sized and path else ""
            digest.update(f"{path}\0{size}\0{label}\n".encode(errors="surrogateescape"))
        digest.update(b"\n")
    return digest.hexdigest()


def identify_start(cfg: DictConfig) -> None:
    """Writes into the config what the file that the run starts from holds: a SHA-256 of it.

    A file of the same name with other content makes another run.
    """
    images = OmegaConf.select(cfg, f"{STARTED_FROM}.{IMAGES}")
    found = {} if images is None else {IMAGES: images}
    for key in ("pretrained_feature_extractor", "resume_from_checkpoint"):
        path = cfg.get(key)
        if path is not None and Path(path).is_file():
            digest = hashlib.sha256()
            with Path(path).open("rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
            found[key] = digest.hexdigest()
    OmegaConf.update(cfg, STARTED_FROM, found or None, force_add=True)


def _difference(cfg: DictConfig, args: Path) -> str | None:
    """The first setting in which a run differs from that of an args.json; None for none."""
    try:
        other = json.loads(args.read_text())
    except (OSError, ValueError):
        return "args.json"
    own = json.loads(json.dumps(OmegaConf.to_container(cfg, resolve=True)))
    if not isinstance(other, dict):
        return "args.json"
    for values in (own, other):
        for key in INDIFFERENT:
            section, _, name = key.rpartition(".")
            below = values.get(section, {}) if section else values
            if isinstance(below, dict):
                below.pop(name, None)
    return _first_difference(own, other)


def _first_difference(one: Any, other: Any, key: str = "") -> str | None:
    if isinstance(one, dict) and isinstance(other, dict):
        for name in sorted(one.keys() | other.keys()):
            below = f"{key}.{name}".lstrip(".")
            if (one.get(name), name in one) != (other.get(name), name in other):
                return _first_difference(one.get(name), other.get(name), below) or below
        return None
    return None if one == other else key


def _told(cfg: DictConfig, folder: Path, key: str) -> str:
    """One line on a run of the same name that was stopped but is another one; else nothing."""
    try:
        other = OmegaConf.create(json.loads((folder / "args.json").read_text()))
    except (OSError, ValueError):
        return ""
    if OmegaConf.select(other, "name") != cfg.name or is_running(folder):
        return ""
    return f"auto_resume: {folder} is another run, {key} differs"


def is_running(folder: Path) -> bool:
    """Whether a process writes into a run's folder; one that was killed does not."""
    if not (folder / LOCK).exists() or not is_first_process():
        return False
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return True
    except (OSError, NotImplementedError):  # a file system without locks
        return False
    lock.release()
    return False


@contextmanager
def running(folder: Path) -> Iterator[None]:
    """Keeps a run's folder for this process.

    Raises:
        UserError: another process has it.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise UserError(f"{folder}: a run is still going in it") from error
    except (OSError, NotImplementedError):
        yield
        return
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()


def is_first_process() -> bool:
    """Whether this process is, as far as its environment tells, the first one of its run."""
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
    return int(next((os.environ[name] for name in names if name in os.environ), 0)) == 0


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
    """Writes ``metrics.csv``: the logged rows of a run and of all its continuations."""
    rows = read_metrics(folder)
    if not rows:
        return
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_write(folder / "metrics.csv") as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
