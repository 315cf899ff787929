"""Running Lightning's trainer from a config: loggers, checkpoints, resuming."""

import csv
import importlib.util
import inspect
import json
import os
import secrets
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from metamask_solo.atomic_files import atomic_write
from metamask_solo.checkpoints.reading import load_raw
from metamask_solo.data.images import ReadableImages
from metamask_solo.errors import UserError
from metamask_solo.hosts import pl
from metamask_solo.training.callbacks import (
    Checkpointer,
    FiniteLoss,
    Interruption,
    SafeCheckpointIO,
    logged_metrics,
    position,
)

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


class EpochShuffle(DistributedSampler[int]):
    """Shuffles by (seed, epoch) alone, so that a resumed run sees the batches it would have seen.

    The loader must draw its workers' seeds from ``generator`` as well. With several processes,
    each gets its own share of the same order. It is a DistributedSampler so that Lightning does
    not put one around it, which would hide ``skip``.

    Attributes:
        skip: how many images of this epoch this process has seen already.
    """

    def __init__(self, dataset: Any, seed: int):
        # the processes are not there yet: their number is asked for when an epoch starts
        super().__init__(dataset, num_replicas=1, rank=0, seed=seed)
        self.size = len(dataset)
        self.generator = torch.Generator()
        self.start_at(0, 0)

    def start_at(self, epoch: int, skip: int) -> None:
        """Makes the next iteration that of ``epoch``, without its first ``skip`` images."""
        self.epoch, self.skip = epoch, skip
        self.epoch_seed = self.seed * 1_000_003 + epoch
        self.generator.manual_seed(self.epoch_seed)

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.start_at(epoch, self.skip if epoch == self.epoch else 0)

    def __iter__(self) -> Iterator[int]:
        # a generator of its own: how much of the other was drawn must not decide the order
        generator = torch.Generator().manual_seed(self.epoch_seed)
        order = torch.randperm(self.size, generator=generator).tolist()
        processes, rank = _processes()
        return iter(order[: self.size - self.size % processes][rank::processes][self.skip :])

    def __len__(self) -> int:
        return self.size // _processes()[0]


def _processes() -> tuple[int, int]:
    """Number of processes of this run, and which one this is."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return 1, 0


def training_loader(dataset: Dataset[Any], cfg: DictConfig) -> DataLoader[Any]:
    """The shuffled training loader of a config."""
    sampler = EpochShuffle(dataset, cfg.seed)
    processes = len(cfg.devices) * cfg.num_nodes
    if len(sampler) // processes < cfg.optimizer.batch_size:
        share = f", to be shared by {processes} processes" if processes > 1 else ""
        raise UserError(
            f"optimizer.batch_size={cfg.optimizer.batch_size}: the training data have only "
            f"{len(sampler)} images{share}"
        )
    return DataLoader(
        ReadableImages(dataset),
        batch_size=cfg.optimizer.batch_size,
        sampler=sampler,
        generator=sampler.generator,
        num_workers=cfg.data.num_workers,
        pin_memory=torch.cuda.is_available(),
        drop_last=True,
    )


def fit(
    model: Any,
    cfg: DictConfig,
    train_loader: DataLoader[Any],
    val_loader: DataLoader[Any] | None,
    kind: str,
    callbacks: tuple[Any, ...] = (),
) -> FitResult:
    """Trains a model as the config says, continuing an earlier run where it asks for that.

    Args:
        model: the Lightning module.
        cfg: a completed config.
        kind: folder below ``checkpoint.dir``: the method's name, or ``linear``.
        callbacks: more Lightning callbacks.

    Raises:
        UserError: a folder, an image or the checkpoint to resume from cannot be used.
        RunStopped: a signal ended the run, or its loss or weights are no longer finite.
    """
    root = Path(cfg.checkpoint.dir) / kind
    resume = _checkpoint_to_resume(cfg, root)
    # a checkpoint from elsewhere starts a run of its own
    continued = resume if resume and resume.parent.parent == root else None
    folder = continued.parent if continued else _new_folder(root)
    checkpointer = Checkpointer(cfg, folder) if cfg.checkpoint.enabled else None
    if checkpointer is not None:
        checkpointer.last = continued
    timer = pl.callbacks.Timer()
    interruption = Interruption(checkpointer, train_loader)
    # first: from the moment that args.json tells of a run, a signal must find its handler
    all_callbacks = [interruption, *callbacks, timer, pl.callbacks.LearningRateMonitor("step")]
    all_callbacks += [FiniteLoss(checkpointer), *([checkpointer] if checkpointer else [])]
    trainer = build_trainer(cfg, _loggers(model, cfg, folder), all_callbacks)
    if trainer.is_global_zero and continued is None:
        _make_folder(folder)
    # SafeCheckpointIO needs no telling, but Lightning else says that it reads anything
    tellable = "weights_only" in inspect.signature(trainer.fit).parameters
    safely = {"weights_only": True} if tellable else {}
    try:
        with warnings.catch_warnings():
            # its loader goes on where it stopped, in a way that Lightning cannot know
            warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that")
            trainer.fit(model, train_loader, val_loader, ckpt_path=resume, **safely)
    except pl.utilities.exceptions.SIGTERMException as error:
        raise interruption.report() from error
    except SystemExit as error:  # how Lightning ends after Ctrl-C
        raise KeyboardInterrupt from error
    except pl.utilities.exceptions.MisconfigurationException as error:
        raise UserError(str(error).splitlines()[0]) from error
    except RuntimeError as error:
        if "loading state_dict" not in str(error):
            raise
        reason = str(error).splitlines()[1].strip()
        raise UserError(f"{resume}: does not fit this config ({reason})") from error
    if trainer.interrupted:
        raise KeyboardInterrupt
    metrics = logged_metrics(trainer)
    if not metrics and checkpointer is not None:  # killed after its last checkpoint
        metrics = checkpointer.metrics
    seconds = timer.time_elapsed("train") / max(1, trainer.current_epoch)
    result = FitResult(folder, checkpointer.last if checkpointer else None, metrics, seconds)
    if trainer.is_global_zero:
        if checkpointer is not None:
            checkpointer.tidy()
        _merge_metrics(folder)
        with atomic_write(folder / FINISHED) as path:
            path.write_text(json.dumps({"metrics": metrics, "seconds_per_epoch": seconds}))
    return result


def finished_run(cfg: DictConfig, kind: str) -> FitResult | None:
    """A finished run of the same config, or None."""
    for summary in sorted((Path(cfg.checkpoint.dir) / kind).glob(f"*/{FINISHED}")):
        checkpoints = sorted(summary.parent.glob("*.ckpt"), key=lambda p: p.stat().st_mtime)
        if checkpoints and _same_run(cfg, summary.parent / "args.json"):
            content = json.loads(summary.read_text())
            return FitResult(summary.parent, checkpoints[-1], **content)
    return None


def build_trainer(cfg: DictConfig, loggers: list[Any], callbacks: list[Any]) -> Any:
    """Lightning's trainer with whatever of the config it takes.

    Raises:
        UserError: Lightning refuses a value, or this machine lacks what it asks for.
    """
    values = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(values, dict)
    accepted = inspect.signature(pl.Trainer.__init__).parameters
    arguments = {name: values[name] for name in accepted if name in values}
    for key in [k for k, v in arguments.items() if v is None]:
        del arguments[key]
    on_gpu = torch.cuda.is_available() and arguments.get("accelerator") != "cpu"
    devices = arguments.get("devices")
    if not on_gpu and isinstance(devices, list):  # [0, 1] names GPUs; the CPU takes a number
        arguments["devices"] = len(devices)
    if arguments.get("strategy") == "ddp":
        arguments["strategy"] = pl.strategies.DDPStrategy(find_unused_parameters=False)
    arguments.update(
        logger=loggers,
        callbacks=callbacks,
        plugins=[SafeCheckpointIO()],
        enable_checkpointing=False,
        log_every_n_steps=arguments.get("log_every_n_steps", 10),
    )
    try:
        return pl.Trainer(**arguments)
    except Exception as error:  # whatever it does with a value of the wrong type
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"trainer: {reason[0]}") from error


def _loggers(model: Any, cfg: DictConfig, folder: Path) -> list[Any]:
    if cfg.wandb.enabled:
        logger = pl.loggers.WandbLogger(
            name=cfg.name,
            project=cfg.wandb.project,
            entity=cfg.wandb.entity,
            offline=cfg.wandb.offline,
            id=folder.name,
            resume="allow",
        )
        logger.log_hyperparams(_plain(cfg))
        return [logger]
    loggers: list[Any] = [pl.loggers.CSVLogger(folder, name="logs")]
    if importlib.util.find_spec("tensorboard") is not None:
        loggers.append(pl.loggers.TensorBoardLogger(folder, name="tensorboard"))
    return loggers


def _new_folder(root: Path) -> Path:
    """A new run's folder, not made yet, named as solo-learn does without W&B.

    Processes that Lightning starts inherit the name. Those of torchrun or Slurm have other names,
    until the first process tells them its own.
    """
    name = "METAMASK_SOLO_RUN"
    if name not in os.environ or int(os.environ.get("LOCAL_RANK", 0)) == 0:
        os.environ[name] = secrets.token_hex(4)
    return root / f"offline-{os.environ[name]}"


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"checkpoint.dir={folder.parents[1]}: cannot be written ({error.strerror})"
        ) from error


def _checkpoint_to_resume(cfg: DictConfig, root: Path) -> Path | None:
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


def _merge_metrics(folder: Path) -> None:
    rows = read_metrics(folder)
    if not rows:
        return
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_write(folder / "metrics.csv") as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
