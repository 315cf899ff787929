"""One home of resuming: which runs are the same run, where a stopped one goes on, its files."""

import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from metamask_solo.atomic_files import atomic_write
from metamask_solo.checkpoints.reading import load_raw, newest_whole
from metamask_solo.data.datasets import is_first_process
from metamask_solo.errors import RunStopped, UserError
from metamask_solo.hosts import METHODS
from metamask_solo.hosts.shared import process_count

# Set by a command: what the images are, the code of `imports`, and what the checkpoint holds that a
# run starts from.
STARTED_FROM = "started_from"
# All that decides the result of a run. What is missing here says where the run is written, how it
# is logged, or how fast its images are read.
DECISIVE = (
    *("method", "method_kwargs", "momentum", "backbone", "augmentations", "seed", STARTED_FROM),
    *("optimizer", "scheduler", "max_epochs", "max_steps", "max_time", "min_epochs", "min_steps"),
    *("data.dataset", "data.fraction", "data.no_labels", "data.augmentations"),
    *("data.background", "data.exif_orientation"),
    *("precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm"),
    *("limit_train_batches", "sync_batchnorm", "deterministic", "strategy", "performance"),
    *("knn_eval", "limit_val_batches", "val_check_interval", "check_val_every_n_epoch"),
    *("finetune", "masked", "auto_augment", "label_smoothing", "mixup", "cutmix", "scale_features"),
    *("imports", "callbacks"),
)
# What a checkpoint goes on with, whatever the file says: its optimiser and schedule, always, with
# the factor of their rates; the length of a cosine; and what a position inside an epoch counts in.
IMAGES = f"{STARTED_FROM}.images"
PLAN = ("method", "backbone.name", "optimizer", "scheduler", "accumulate_grad_batches")
LENGTH = (
    *("max_epochs", "max_steps", "limit_train_batches", "processes"),
    *("data.dataset", "data.train_path", "data.fraction", "data.no_labels", IMAGES),
)
WITHIN_AN_EPOCH = ("processes", "seed")

FINISHED = "finished.json"  # written when a run ended as planned
LOCK = "running.lock"  # held by the process that writes into a run's folder, and gone with it
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
        note: where the last validation is older than the weights, after which step it was.
        stopped: a signal that came when there was nothing left to stop.
    """

    folder: Path
    checkpoint: Path | None
    metrics: dict[str, float]
    seconds_per_epoch: float
    note: str = ""
    stopped: RunStopped | None = None

    def __str__(self) -> str:
        """The last line that a command prints: the checkpoint, and the validation metrics."""
        parts = [f"checkpoint: {self.checkpoint}"] if self.checkpoint else []
        metrics = sorted(self.metrics.items())
        parts += [f"{k}={v:.4f}" for k, v in metrics if k.startswith("val_")]
        return "  ".join([*parts, *filter(None, [self.note])])


def run_identity(cfg: DictConfig) -> dict[str, Any]:
    """What decides the result of a run: equal for two configs of the same run, and only then.

    Args:
        cfg: a completed config, or a run's args.json. The images and the checkpoint that a run
            starts from count where their digests are in it: see :func:`identify`.

    Returns:
        Dotted key to plain value; ``processes`` is the number of devices of all nodes, and
        ``results_version`` the number of the method that goes up when its results change.
    """
    identity = _values(cfg, (*DECISIVE, "processes"))
    if cfg.get("method") is not None:
        identity["results_version"] = getattr(METHODS.get(cfg.method), "results_version", 1)
    return identity


def _values(cfg: DictConfig, keys: tuple[str, ...]) -> dict[str, Any]:
    """Dotted keys to plain values of all that stands at and below some keys of a config."""
    values: dict[str, Any] = {}
    for key in keys:
        if key == "processes":
            values[key] = process_count(cfg)
            continue
        value = OmegaConf.select(cfg, key, default=None)
        values |= _flat(OmegaConf.to_container(value) if OmegaConf.is_config(value) else value, key)
    return values


def _flat(value: Any, key: str) -> dict[str, Any]:
    """Dotted keys to the values of a nested one; null is as good as a key that is missing."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for name, below in items for k, v in _flat(below, f"{key}.{name}").items()}
    return {} if value is None else {key: value}


def identify(cfg: DictConfig, *datasets: Any) -> None:
    """Writes into the config what the run starts from: other content makes another run.

    Args:
        cfg: a config; ``resume_from_checkpoint`` and ``pretrained_feature_extractor`` name files.
            A run's folder becomes the newest whole checkpoint in it.
        datasets: training and validation images, None for none.

    Raises:
        UserError: the named checkpoint lacks something, or the run cannot go on from it.
    """
    digests = dict(cfg.get(STARTED_FROM) or {})
    digests["images"] = digest_of_images(datasets)
    OmegaConf.update(cfg, STARTED_FROM, digests, force_add=True)
    if cfg.get("resume_from_checkpoint"):
        named = Path(cfg.resume_from_checkpoint)
        named = newest_whole(named) if named.is_dir() else named
        _check_continuation(cfg, named)
        cfg.resume_from_checkpoint = str(named)
    for key in ("pretrained_feature_extractor", "resume_from_checkpoint"):
        if cfg.get(key) is not None and Path(cfg[key]).is_file():
            digests[key] = hashlib.sha256(Path(cfg[key]).read_bytes()).hexdigest()
    OmegaConf.update(cfg, STARTED_FROM, digests, force_add=True)


def digest_of_images(datasets: Any) -> str:
    """A SHA-256 of content and labels of images, in their order.

    Of more than ``MOST_COMPARED`` images, names stand for the content. torchvision's files are
    always the same.
    """
    digest = hashlib.sha256()
    for dataset in filter(None, datasets):
        content = dataset.fingerprints.tobytes()
        if not content:
            names = [name.removeprefix(dataset.root) for name in dataset.files]
            content = "\n".join(names).encode(errors="surrogateescape")
        digest.update(json.dumps([hashlib.sha256(content).hexdigest(), dataset.targets]).encode())
    return digest.hexdigest()


def finished_run(cfg: DictConfig, kind: str) -> FitResult | None:
    """A finished run that is the same one, or None.

    Args:
        cfg: a completed and identified config.
        kind: folder below ``checkpoint.dir``.
    """
    for folder in _newest_first(Path(cfg.checkpoint.dir) / kind):
        checkpoints = sorted(folder.glob("*.ckpt"), key=age)
        if (folder / FINISHED).exists() and checkpoints and _difference(cfg, folder) is None:
            summary = json.loads((folder / FINISHED).read_text())
            return FitResult(folder, checkpoints[-1], **summary)
    return None


def starting_point(cfg: DictConfig, root: Path) -> tuple[Path | None, Path]:
    """The checkpoint at which training goes on, or None, and the run's folder.

    It is that of the same run that was stopped, or else the named one, at which a new run begins.
    Of a run that began at the named checkpoint and was stopped, what it did since is not lost.

    Args:
        cfg: a completed and identified config.
        root: the folder that holds the folders of such runs.

    Raises:
        UserError: the same run is still going.
    """
    named = cfg.resume_from_checkpoint
    resume = _stopped_run(cfg, root, quiet=named is not None) if cfg.auto_resume.enabled else None
    if resume is not None:
        return resume, resume.parent
    return Path(named) if named is not None else None, _new_folder(root)


def _new_folder(root: Path) -> Path:
    """Not made yet, and named as solo-learn does without W&B.

    Processes that Lightning starts inherit the name. Those of torchrun or Slurm have other names,
    until the first process tells them its own.
    """
    name = "METAMASK_SOLO_RUN"
    if name not in os.environ or int(os.environ.get("LOCAL_RANK", 0)) == 0:
        os.environ[name] = secrets.token_hex(4)
    return root / f"offline-{os.environ[name]}"


def _stopped_run(cfg: DictConfig, root: Path, quiet: bool) -> Path | None:
    """The last whole checkpoint of the newest unfinished run that is the same one."""
    hours = cfg.auto_resume.max_hours
    oldest = time.time() - hours * 3600
    different = ""
    for folder in _newest_first(root):
        if (folder / FINISHED).exists():
            continue
        key = _difference(cfg, folder)
        if key is not None:
            config = _args(folder) or DictConfig({})
            if not different and config.get("name") == cfg.name:
                key = key.removeprefix(f"{STARTED_FROM}.")
                different = f"auto_resume: {folder} is another run, {key} differs"
            continue
        if is_first_process():
            with running(folder):  # refused where it is still going
                pass
        for path in sorted(folder.glob("*.ckpt"), key=age, reverse=True):
            if path.stat().st_mtime <= oldest:
                print(f"auto_resume: {path} is older than auto_resume.max_hours={hours}")
                break
            try:
                state = load_raw(path)
            except UserError as error:
                print(f"auto_resume: skipped: {error}")
                continue
            if all(part in state for part in TRAINING_STATE):  # a folded one has weights only
                return path
    if different and not quiet:
        print(different)
    return None


def _newest_first(root: Path) -> list[Path]:
    def written(folder: Path) -> float:
        return max(p.stat().st_mtime for p in (folder / "args.json", *folder.glob("*.ckpt")))

    return sorted((path.parent for path in root.glob("*/args.json")), key=written, reverse=True)


def age(path: Path) -> tuple[int, float]:
    """Sorts checkpoints from the oldest to the newest: by epoch, then by the time of the file.

    Copying a file changes its time.
    """
    epoch = re.search(r"-ep=(\d+)\.ckpt$", path.name)
    return (int(epoch[1]) if epoch else -1, path.stat().st_mtime)


def _args(folder: Path) -> DictConfig | None:
    """The config in a run's folder; None where it cannot be read."""
    try:
        config = OmegaConf.create(json.loads((folder / "args.json").read_text()))
    except (OSError, ValueError):
        return None
    return config if isinstance(config, DictConfig) else None


def _difference(cfg: DictConfig, folder: Path) -> str | None:
    """The first key in which the run in a folder is another one; None for the same run."""
    config = _args(folder)
    if config is None:
        return "args.json"
    return _first_difference(*(json.loads(json.dumps(run_identity(c))) for c in (cfg, config)))


def _first_difference(one: Mapping[str, Any], two: Mapping[str, Any]) -> str | None:
    """The shortest key with different values, of which the name of a thing is one."""
    different = [key for key in sorted({*one, *two}) if one.get(key) != two.get(key)]
    return min(different, key=len, default=None)


def write_args(cfg: DictConfig, folder: Path) -> None:
    """Writes a run's config into its folder."""
    with atomic_write(folder / "args.json") as path:
        path.write_text(json.dumps(OmegaConf.to_container(cfg, resolve=True), indent=1))


def _check_continuation(cfg: DictConfig, path: Path) -> None:
    """Raises UserError where a run of ``cfg`` cannot go on from a named checkpoint."""
    state = load_raw(path)
    if lacking := [key for key in TRAINING_STATE if key not in state]:
        raise UserError(f"{path}: training cannot go on from it, it has no {lacking[0]}")
    epochs, batches = position(state)
    # a ModelCheckpoint's lies at logs/version_N/checkpoints in the folder of its run
    folders = list(path.absolute().parents)[:4]
    earlier = next(filter(None, map(_args, folders)), None)
    if earlier is None:
        raise UserError(f"{path}: the args.json of its run is missing; copy it beside the file")
    keys = PLAN + (LENGTH if cfg.scheduler.name == "warmup_cosine" else ())
    keys += WITHIN_AN_EPOCH if batches else ()
    one, two = _values(cfg, keys), _values(earlier, keys)
    if IMAGES not in two:  # of one of solo-learn's own scripts
        one.pop(IMAGES, None)
    key = _first_difference(one, two)
    if key == IMAGES:
        raise UserError(
            "data: the images, of training or of validation, are not those of the checkpoint's "
            "run, which a run that continues it with warmup_cosine cannot change"
        )
    if key is not None:
        raise UserError(
            f"{key}={one.get(key)}: the run of the checkpoint has {two.get(key)}, which a run that "
            f"continues it cannot change{' (rates as scaled)' if key == 'optimizer.lr' else ''}"
        )
    if epochs >= cfg.max_epochs or 0 < (cfg.get("max_steps") or 0) <= state["global_step"]:
        key = "max_epochs" if epochs >= cfg.max_epochs else "max_steps"
        done = f"{epochs} epochs and {state['global_step']} steps"
        ended = "; its cosine has ended, so no run can go on from it"
        more = ended if cfg.scheduler.name == "warmup_cosine" else ""
        raise UserError(f"{key}={cfg[key]}: {path} already has {done}{more}")


def position(checkpoint: Mapping[str, Any]) -> tuple[int, int]:
    """Epochs that a checkpoint's run has behind it, and batches of the epoch it was in."""
    loops = checkpoint["loops"]["fit_loop"]
    epochs, batches = loops["epoch_progress"]["current"], loops["epoch_loop.batch_progress"]
    # a ModelCheckpoint that counts steps saves before Lightning counts the batch as completed
    processed = batches["current"]["processed"]
    in_batch = batches["current"]["completed"] < processed
    if epochs["started"] == epochs["processed"] or (in_batch and batches["is_last_batch"]):
        return epochs["started"], 0
    return epochs["processed"], processed


@contextmanager
def running(folder: Path) -> Iterator[None]:
    """Keeps a run's folder for this process, where the file system has locks.

    Raises:
        UserError: another process has it, or it cannot be made.
    """
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"checkpoint.dir={folder.parents[1]}: cannot be written ({error.strerror})"
        ) from error
    with suppress(OSError, NotImplementedError):
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise UserError(
                f"{folder}: this run is still going; auto_resume.enabled=False starts another one"
            ) from error
    try:
        yield
    finally:
        if lock.is_locked:
            (folder / LOCK).unlink(missing_ok=True)
            lock.release()


def read_metrics(folder: Path) -> pd.DataFrame:
    """What a run logged, a row for each time; of a resumed one, without what it repeated.

    It is that of logs/version_N/metrics.csv, or without these of metrics.csv in the folder. A row
    without a step has that of the row before it.

    Raises:
        UserError: a file is no table.
    """
    table = pd.DataFrame()
    logs = [path for path in folder.glob("logs/version_*/metrics.csv") if _number(path).isdecimal()]
    for path in sorted(logs, key=lambda log: int(_number(log))) or [folder / "metrics.csv"]:
        try:
            # a logged "nan" is no missing value
            part = pd.read_csv(path, encoding="utf-8-sig", keep_default_na=False, na_values=[""])
        except (FileNotFoundError, pd.errors.EmptyDataError):
            continue
        except (UnicodeDecodeError, pd.errors.ParserError) as error:
            raise UserError(f"{path}: not a table of metrics ({error})") from error
        if "step" in part and len(part):
            part["step"] = pd.to_numeric(part["step"], errors="coerce").ffill().bfill()
            if len(table):
                part = pd.concat([table[table["step"] < part["step"][0]], part], ignore_index=True)
            table = part
    return table


def _number(log: Path) -> str:
    return log.parent.name.removeprefix("version_")


def merge_metrics(folder: Path) -> None:
    """Writes ``metrics.csv``: the logged rows of a run and of all its continuations."""
    table = read_metrics(folder)
    if len(table):
        whole = {name: "Int64" for name in ("epoch", "step") if name in table}
        with atomic_write(folder / "metrics.csv") as path:
            table.astype(whole).to_csv(path, index=False)
