"""Running Lightning's trainer from a config: loggers, checkpoints, resuming."""

import csv
import importlib.util
import inspect
import json
import os
import random
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader, Dataset, Sampler

from metamask_solo.checkpoints import load_raw
from metamask_solo.errors import UserError
from metamask_solo.files import atomic_write
from metamask_solo.hosts import pl

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
    "seed",
    "pretrained_feature_extractor",
    "finetune",
)
# written into a run's folder when it ended as planned
FINISHED = "finished.json"


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


class EpochShuffle(Sampler[int]):
    """Shuffles by (seed, epoch) alone, so that a resumed run sees the batches it would have seen.

    The loader must draw its workers' seeds from ``generator`` as well.
    """

    def __init__(self, dataset: Any, seed: int):
        self.size = len(dataset)
        self.seed = seed
        self.generator = torch.Generator()
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch_seed = self.seed * 1_000_003 + epoch
        self.generator.manual_seed(self.epoch_seed)

    def __iter__(self) -> Iterator[int]:
        # a generator of its own: how much of the other was drawn must not decide the order
        generator = torch.Generator().manual_seed(self.epoch_seed)
        return iter(torch.randperm(self.size, generator=generator).tolist())

    def __len__(self) -> int:
        return self.size


def training_loader(dataset: Dataset[Any], cfg: DictConfig) -> DataLoader[Any]:
    """The shuffled training loader of a config."""
    sampler = EpochShuffle(dataset, cfg.seed)
    if len(sampler) < cfg.optimizer.batch_size:
        raise UserError(
            f"optimizer.batch_size={cfg.optimizer.batch_size}: the training data have only "
            f"{len(sampler)} images"
        )
    return DataLoader(
        dataset,
        batch_size=cfg.optimizer.batch_size,
        sampler=sampler,
        generator=sampler.generator,
        num_workers=cfg.data.num_workers,
        pin_memory=torch.cuda.is_available(),
        drop_last=True,
    )


class Checkpointer(pl.Callback):  # type: ignore[name-defined]
    """Saves where solo-learn does, but never half a file, and always the last epoch.

    A file is written under a temporary name and then renamed; the one before it is removed only
    after that (``keep_prev`` keeps it). Random states go into it too.
    """

    def __init__(self, cfg: DictConfig, folder: Path):
        self.cfg = cfg
        self.folder = folder
        self.last: Path | None = None
        self._random: dict[str, Any] | None = None

    def on_train_start(self, trainer: Any, model: Any) -> None:
        if self._random is not None:
            _set_random_state(self._random)
            self._random = None
        if trainer.is_global_zero:
            config = OmegaConf.to_container(self.cfg, resolve=True)
            with atomic_write(self.folder / "args.json") as path:
                path.write_text(json.dumps(config, indent=1))

    def on_train_epoch_end(self, trainer: Any, model: Any) -> None:
        epoch = trainer.current_epoch
        last = trainer.max_epochs is not None and epoch + 1 >= trainer.max_epochs
        if last or epoch % self.cfg.checkpoint.frequency == 0:
            self.save(trainer)

    def save(self, trainer: Any) -> None:
        name = f"{self.cfg.name}-{self.folder.name}-ep={trainer.current_epoch}.ckpt"
        path = self.folder / name.replace("/", "-")
        # every process takes part in saving, one of them writes
        if trainer.is_global_zero:
            with atomic_write(path) as temporary:
                trainer.save_checkpoint(temporary)
            if self.last is not None and self.last != path and not self.cfg.checkpoint.keep_prev:
                self.last.unlink(missing_ok=True)
        else:
            trainer.save_checkpoint(path)
        self.last = path

    def on_save_checkpoint(self, trainer: Any, model: Any, checkpoint: dict[str, Any]) -> None:
        # solo-learn gives a schedule with a fixed rate in it (SimSiam's) another get_lr; pickled,
        # it would drag the whole optimiser into the file, and no safe reader could open it
        for state in checkpoint.get("lr_schedulers", []):
            state.pop("get_lr", None)

    def state_dict(self) -> dict[str, Any]:
        return {"random": _random_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._random = state["random"]


def _random_state() -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()  # type: ignore[misc]
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))


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
    """
    root = Path(cfg.checkpoint.dir) / kind
    resume = _checkpoint_to_resume(cfg, root)
    folder = resume.parent if resume and resume.parent.parent == root else _new_folder(root)
    checkpointer = Checkpointer(cfg, folder)
    if resume is not None:
        epoch = load_raw(resume).get("epoch", -1) + 1
        train_loader.sampler.set_epoch(epoch)  # type: ignore[union-attr, attr-defined]
        checkpointer.last = resume if resume.parent == folder else None
        print(f"resuming from {resume} (epoch {epoch})")
    loggers = _loggers(model, cfg, folder)
    timer = pl.callbacks.Timer()
    all_callbacks = [*callbacks, timer, pl.callbacks.LearningRateMonitor("step")]
    if cfg.checkpoint.enabled:
        all_callbacks.append(checkpointer)
    trainer = _trainer(cfg, loggers, all_callbacks)
    try:
        trainer.fit(model, train_loader, val_loader, ckpt_path=resume, weights_only=True)
    except pl.utilities.exceptions.MisconfigurationException as error:
        raise UserError(str(error).splitlines()[0]) from error
    if trainer.interrupted:
        raise KeyboardInterrupt
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    seconds = timer.time_elapsed("train") / max(1, trainer.current_epoch)
    result = FitResult(folder, checkpointer.last, metrics, seconds)
    if trainer.is_global_zero:
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


def _trainer(cfg: DictConfig, loggers: list[Any], callbacks: list[Any]) -> Any:
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
        enable_checkpointing=False,
        log_every_n_steps=arguments.get("log_every_n_steps", 10),
    )
    try:
        return pl.Trainer(**arguments)
    except (pl.utilities.exceptions.MisconfigurationException, ValueError, TypeError) as error:
        raise UserError(f"trainer: {str(error).splitlines()[0]}") from error


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
    """A run's folder, named as solo-learn does without W&B; the same in every process."""
    name = os.environ.setdefault("METAMASK_SOLO_RUN", secrets.token_hex(4))
    # one process may run several fits (a sweep): take the next free name after the first
    folder = root / f"offline-{name}"
    if int(os.environ.get("LOCAL_RANK", 0)) == 0 and folder.exists():
        os.environ["METAMASK_SOLO_RUN"] = secrets.token_hex(4)
        folder = root / f"offline-{os.environ['METAMASK_SOLO_RUN']}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _checkpoint_to_resume(cfg: DictConfig, root: Path) -> Path | None:
    if cfg.resume_from_checkpoint is not None:
        path = Path(cfg.resume_from_checkpoint)
        load_raw(path)
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
        if "loops" not in state:  # a folded checkpoint: weights only
            continue
        if state["epoch"] + 1 < cfg.max_epochs:
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
