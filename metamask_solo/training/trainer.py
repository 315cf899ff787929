"""Running Lightning's trainer from a config: loggers, checkpoints, resuming, and how a run ends."""

import importlib.util
import inspect
import json
import logging
import re
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch.multiprocessing import ProcessRaisedException
from torch.utils.data import DataLoader

from metamask_solo.atomic_files import atomic_write
from metamask_solo.checkpoints.reading import load_raw
from metamask_solo.data.datasets import say, write_fingerprints
from metamask_solo.data.loaders import loader_failure
from metamask_solo.errors import RunStopped, UserError
from metamask_solo.hosts import HostState, pl
from metamask_solo.hosts.shared import process_count
from metamask_solo.training.callbacks import (
    Bar,
    Checkpointer,
    FiniteLoss,
    Forecast,
    Interruption,
    LastMetrics,
    SafeCheckpointIO,
    configured_callbacks,
)
from metamask_solo.training.config import first_line, one_line, trainer_arguments
from metamask_solo.training.resume import (
    FINISHED,
    FitResult,
    age,
    merge_metrics,
    position,
    running,
    starting_point,
)
from metamask_solo.training.sampling import trains_on_gpu

# A user can do nothing about these: they are of the libraries, or of how this package uses them.
OF_NO_USE = (
    r"LeafSpec|torch\.jit\.|eval mode|weights_only|across ranks is zero|the logging interval|"
    r"not empty|FLOP|lr_scheduler\.step\(\)|Importing from timm|torch\.cuda\.amp|You're resuming|"
    r"Tip:|litlogger|litmodels|available|Trainer\.fit. stopped|no .val_dataloader|gpu backend|"
    r"Automatic Mixed Precision|worker processes"
)


@contextmanager
def quiet(pattern: str = OF_NO_USE) -> Iterator[None]:
    """Leaves out warnings, and what Lightning says, in which a pattern is found."""
    loggers = [
        logging.getLogger(name)
        for name in list(logging.root.manager.loggerDict)
        if name.startswith(("lightning", "pytorch_lightning"))
    ]

    def useful(record: logging.LogRecord) -> bool:
        return re.search(pattern, record.getMessage()) is None

    for logger in loggers:
        logger.addFilter(useful)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=f".*({pattern})")
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(useful)


@contextmanager
def torch_as_before() -> Iterator[None]:
    """Undoes what ``deterministic`` and ``benchmark`` set: the next job says its own."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark


@contextmanager
def signals_as_before() -> Iterator[None]:
    """Gives signals their handlers back, which Lightning does not do after every error."""
    names = [name for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
    before = {getattr(signal, name): signal.getsignal(getattr(signal, name)) for name in names}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():  # no other may
            for number, handler in before.items():
                if handler is not None:  # else it is of no Python
                    signal.signal(number, handler)


@torch_as_before()
@signals_as_before()
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
        callbacks: Lightning callbacks beside those of every run and those of the config.

    Raises:
        UserError: a folder, an image or the checkpoint to resume from cannot be used.
        RunStopped: a signal ended the run, or its loss or weights are no longer finite.
    """
    _note_double_counting(val_loader, cfg)
    root = Path(cfg.checkpoint.dir) / kind
    dry = bool(cfg.get("fast_dev_run"))  # leaves nothing behind, as Lightning has it
    resume, folder = (None, root / "dry") if dry else starting_point(cfg, root)
    if resume is not None and hasattr(model, "check_resumable"):
        model.check_resumable(load_raw(resume))  # before anything is written
    saves = cfg.checkpoint.enabled and not dry
    checkpointer = Checkpointer(cfg, folder, resume) if saves else None
    interruption = Interruption(checkpointer, train_loader)
    # first: from the moment that args.json tells of a run, a signal must find its handler;
    # last: what is saved must be whole
    all_callbacks = [interruption, *callbacks, Forecast(), *configured_callbacks(cfg)]
    if not dry:
        all_callbacks.append(pl.callbacks.LearningRateMonitor("step"))
    last_metrics = LastMetrics()
    all_callbacks += [FiniteLoss(checkpointer), last_metrics]
    all_callbacks += [checkpointer] if checkpointer else []
    all_callbacks.append(HostState())  # behind what restores random states
    loggers = [] if dry else _loggers(cfg, folder)
    trainer = build_trainer(cfg, loggers, all_callbacks, None if dry else folder)
    *_, timer = (c for c in trainer.callbacks if isinstance(c, pl.callbacks.Timer))
    started = time.monotonic()
    writes = trainer.is_global_zero and not dry
    with running(folder) if writes else nullcontext():
        if writes and checkpointer is not None:  # before the first checkpoint
            started_from = [resume, cfg.get("pretrained_feature_extractor")]
            sources = [Path(path).parent for path in started_from if path]
            write_fingerprints(train_loader.dataset, folder, *sources)
        _train(trainer, model, train_loader, val_loader, resume, interruption, cfg)
        # of some strategies this process trains in copies of itself, and their checkpoints tell
        last = max(folder.glob("*-ep=*.ckpt"), key=age, default=None) if saves else None
        seconds, epochs = timer.time_elapsed("train"), trainer.current_epoch
        if not seconds and last is not None:
            state = load_raw(last)
            seconds = state["callbacks"][timer.state_key]["time_elapsed"]["train"]
            epochs, _ = position(state)
        elif not seconds:
            seconds, epochs = time.monotonic() - started, cfg.max_epochs
        seconds /= max(1, epochs)
        metrics, note = last_metrics.of(trainer), last_metrics.note(trainer)
        result = FitResult(folder, last, metrics, seconds, note)
        if writes:
            if checkpointer is not None:
                checkpointer.last = last
                checkpointer.tidy()
            merge_metrics(folder)
            with atomic_write(folder / FINISHED) as path:
                summary = {"metrics": metrics, "seconds_per_epoch": seconds, "note": note}
                path.write_text(json.dumps(summary))
            if cfg.get("profiler") is not None:
                print(f"{trainer.profiler.summary()}profile: {folder}")
    if interruption.received is not None:
        result.stopped = interruption.report(f"came after the run had finished: {folder}")
    return result


def _note_double_counting(val_loader: DataLoader[Any] | None, cfg: DictConfig) -> None:
    """Says where Lightning repeats validation images, so that all processes have as many."""
    images: Any = [] if val_loader is None else val_loader.dataset
    processes = process_count(cfg)
    if len(images) % processes and cfg.get("limit_val_batches") != 0:
        say(f"validation: {len(images)} images on {processes} processes: some are counted twice")


def _train(
    trainer: Any,
    model: Any,
    train_loader: DataLoader[Any],
    val_loader: DataLoader[Any] | None,
    resume: Path | None,
    interruption: Interruption,
    cfg: DictConfig,
) -> None:
    """Lightning's fit, with one line for whatever ends it early."""
    # SafeCheckpointIO needs no such argument, but Lightning else says that it reads anything
    takes_it = "weights_only" in inspect.signature(trainer.fit).parameters
    safely = {"weights_only": True} if takes_it else {}
    failed = True
    try:
        trainer.fit(model, train_loader, val_loader, ckpt_path=resume, **safely)
        failed = False
    except pl.utilities.exceptions.SIGTERMException as error:
        raise interruption.report() from error
    except SystemExit as error:  # how Lightning ends after Ctrl-C
        raise KeyboardInterrupt from error
    except ProcessRaisedException as error:  # its text is the traceback of the other process
        raise _same_error(str(error)) from error
    except (UserError, RunStopped, OSError):
        raise
    except torch.OutOfMemoryError as error:
        raise RunStopped(
            f"optimizer.batch_size={train_loader.batch_size}: the GPU has too little memory; use "
            "a smaller one, or precision=bf16-mixed"
        ) from error
    except Exception as error:
        if line := _line_of(error, resume, cfg):
            raise UserError(line) from error
        raise
    finally:
        for logger in trainer.loggers:  # the next job of a sweep would else go on in its run
            if trainer.is_global_zero and isinstance(logger, pl.loggers.WandbLogger):
                logger.experiment.finish(exit_code=int(failed))
    if trainer.interrupted:
        raise KeyboardInterrupt


def _line_of(error: Exception, resume: Path | None, cfg: DictConfig) -> str | None:
    """One line for an error that a setting, the data or a checkpoint causes; None for a bug."""
    first, *more = str(error).strip().splitlines() or [""]
    if "loading state_dict" in first or "loaded state dict" in first:  # of model, of optimiser
        return f"{resume}: does not fit this config ({[first, *more[:1]][-1].strip()})"
    if isinstance(error, RuntimeError) and (failure := loader_failure(error)) is not None:
        return str(failure)
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    module = frame.f_globals.get("__name__", "")
    lightning = module.startswith(("lightning", "pytorch_lightning"))
    return _trainer_line(error, cfg) if lightning else None


def _same_error(trace: str) -> Exception:
    """The error with which a process of a spawning strategy ended, from its traceback."""
    name, _, message = trace.strip().splitlines()[-1].partition(": ")
    if name.endswith(".UserError"):
        return UserError(message)
    return RunStopped(f"a process of the run failed: {name.rpartition('.')[2]}: {message}")


def build_trainer(
    cfg: DictConfig, loggers: list[Any], callbacks: list[Any], folder: Path | None = None
) -> Any:
    """Lightning's trainer with whatever of the config it takes.

    Args:
        cfg: a checked config.
        loggers: none to log nothing.
        callbacks: beside a timer and a progress bar, where none of them is one.
        folder: the run's: where a profiler writes, and Lightning in Slurm.

    Raises:
        UserError: Lightning refuses a value, or this machine lacks what it asks for.
    """
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    # null means Lightning's default, but for the one setting in which it is a value of its own
    arguments = {
        name: values[name]
        for name in trainer_arguments() & values.keys()
        if values[name] is not None or name == "check_val_every_n_epoch"
    }
    if not trains_on_gpu(arguments):  # [0, 1] names GPUs; the CPU takes a number
        arguments["devices"] = len(values["devices"])
    if arguments.get("strategy") == "ddp":
        arguments["strategy"] = pl.strategies.DDPStrategy(find_unused_parameters=False)
    show = arguments.pop("enable_progress_bar", True)
    max_time = arguments.pop("max_time", None)
    with one_line(f"max_time={max_time}"):
        timer = pl.callbacks.Timer(max_time)
    try:
        has_bar = any(isinstance(c, pl.callbacks.ProgressBar) for c in callbacks)
        callbacks = [*callbacks, timer, *([Bar()] if show and not has_bar else [])]
        arguments |= {
            "logger": loggers or False,
            "callbacks": callbacks,
            "plugins": [SafeCheckpointIO()],
            "enable_progress_bar": show,
            "enable_checkpointing": any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks),
            "log_every_n_steps": arguments.get("log_every_n_steps", 10),
            "default_root_dir": folder,
        }
        trainer = pl.Trainer(**arguments)
    except Exception as error:  # whatever it does with a value of the wrong type
        raise UserError(_trainer_line(error, cfg)) from error
    if folder is not None and "profiler" in arguments:
        trainer.profiler.dirpath, trainer.profiler.filename = folder, "profile"
    on_cpu = trainer.strategy.root_device.type == "cpu"
    parallel = isinstance(trainer.strategy, pl.strategies.ParallelStrategy)  # also of one process
    if arguments.get("sync_batchnorm") and on_cpu and parallel:
        raise UserError("sync_batchnorm=True: needs GPUs; processes on the CPU cannot do it")
    return trainer


def _trainer_line(error: Exception, cfg: DictConfig) -> str:
    """What Lightning says of an argument, behind the argument's name where it names one.

    Of several, it is the first one that the file set.
    """
    line = first_line(error)
    words = re.findall(r"\w+", line.lower())
    named = [name for name in trainer_arguments() if name in words]
    asked = {name: cfg[name] for name in named if cfg.get(name) is not None}
    kind = "accelerator" if "backend" in line else "trainer"
    key = min(asked or named, key=words.index, default=kind)
    return f"{key}={asked[key]}: {line}" if key in asked else f"{key}: {line}"


def _loggers(cfg: DictConfig, folder: Path) -> list[Any]:
    loggers: list[Any] = [pl.loggers.CSVLogger(folder, name="logs")]
    if importlib.util.find_spec("tensorboard") is not None:
        loggers.append(pl.loggers.TensorBoardLogger(folder, name="tensorboard"))
    if cfg.wandb.enabled:
        logger = pl.loggers.WandbLogger(
            name=cfg.name,
            project=cfg.wandb.project,
            entity=cfg.wandb.entity,
            offline=cfg.wandb.offline,
            id=folder.name,
            resume="allow",
        )
        logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
        loggers.append(logger)
    return loggers
