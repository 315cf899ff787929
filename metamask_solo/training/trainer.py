"""Running Lightning's trainer from a config: loggers, checkpoints, resuming."""

import importlib.util
import inspect
import json
import time
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
from metamask_solo.checkpoints.reading import load_raw, newest_whole
from metamask_solo.data.loaders import loader_failure
from metamask_solo.errors import RunStopped, UserError
from metamask_solo.hosts import HostState, pl
from metamask_solo.training.callbacks import (
    Checkpointer,
    FiniteLoss,
    Interruption,
    SafeCheckpointIO,
    logged_metrics,
)
from metamask_solo.training.compiling import CompiledBackbone, compiler_failed
from metamask_solo.training.progress import progress_callbacks
from metamask_solo.training.resume import (
    FINISHED,
    FitResult,
    age,
    checkpoint_to_resume,
    identify,
    merge_metrics,
    new_folder,
    running,
)
from metamask_solo.training.sampling import trains_on_gpu

PROFILERS = {
    "simple": pl.profilers.SimpleProfiler,
    "advanced": pl.profilers.AdvancedProfiler,
    "pytorch": pl.profilers.PyTorchProfiler,
}
NULL_IS_A_VALUE = ("check_val_every_n_epoch",)


@contextmanager
def _torch_as_before() -> Iterator[None]:
    """Undoes what ``deterministic`` and ``benchmark`` set: the next job says its own."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark


@_torch_as_before()
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
    dry = bool(cfg.get("fast_dev_run"))  # leaves nothing behind, as Lightning has it
    if cfg.resume_from_checkpoint is not None and Path(cfg.resume_from_checkpoint).is_dir():
        cfg.resume_from_checkpoint = str(newest_whole(Path(cfg.resume_from_checkpoint)))
    identify(cfg)
    resume = None if dry else checkpoint_to_resume(cfg, root)
    if resume is not None and hasattr(model, "check_resumable"):
        model.check_resumable(load_raw(resume))  # before anything is written
    # a checkpoint from elsewhere starts a run of its own
    continued = resume if resume and resume.parent.parent == root else None
    named = cfg.resume_from_checkpoint
    if continued is not None and named is not None and Path(named) == continued:
        # named or found by itself, the run is the one that it was
        cfg.resume_from_checkpoint = None
        identify(cfg)
    folder = continued.parent if continued else new_folder(root)
    checkpointer = Checkpointer(cfg, folder) if cfg.checkpoint.enabled and not dry else None
    if checkpointer is not None:
        checkpointer.last = continued
    timer = pl.callbacks.Timer(duration=_duration(cfg))
    interruption = Interruption(checkpointer, train_loader)
    # first: from the moment that args.json tells of a run, a signal must find its handler
    all_callbacks = [interruption, *callbacks, timer]
    if not dry:
        all_callbacks.append(pl.callbacks.LearningRateMonitor("step"))
    if OmegaConf.select(cfg, "performance.compile", default=False):
        all_callbacks.append(CompiledBackbone())
    all_callbacks += progress_callbacks(cfg)
    all_callbacks += [FiniteLoss(checkpointer), *([checkpointer] if checkpointer else [])]
    all_callbacks.append(HostState())  # behind what restores random states
    profiler = _profiler(cfg, folder)
    loggers = [] if dry else _loggers(cfg, folder)
    trainer = build_trainer(cfg, loggers, all_callbacks, profiler)
    started = time.monotonic()
    with running(folder) if _writes(trainer, dry) else nullcontext():
        _train(trainer, model, train_loader, val_loader, resume, interruption)
        metrics = logged_metrics(trainer)
        if not metrics and checkpointer is not None:  # killed after its last checkpoint
            metrics = checkpointer.metrics
        seconds = timer.time_elapsed("train") or time.monotonic() - started
        seconds /= max(1, trainer.current_epoch)
        last = checkpointer.last if checkpointer else None
        if checkpointer is not None and last == continued:
            # of a strategy whose processes are copies of this one, which itself does not train
            last = max(folder.glob("*-ep=*.ckpt"), key=age, default=last)
        result = FitResult(folder, last, metrics, seconds)
        if _writes(trainer, dry):
            if checkpointer is not None:
                checkpointer.last = last
                checkpointer.tidy()
            merge_metrics(folder)
            with atomic_write(folder / FINISHED) as path:
                path.write_text(json.dumps({"metrics": metrics, "seconds_per_epoch": seconds}))
            _report_profile(profiler, folder)
    if interruption.received is not None:
        result.stopped = interruption.report(f"came when the run was finished: {folder}")
    return result


def _writes(trainer: Any, dry: bool) -> bool:
    return trainer.is_global_zero and not dry


def _train(
    trainer: Any,
    model: Any,
    train_loader: DataLoader[Any],
    val_loader: DataLoader[Any] | None,
    resume: Path | None,
    interruption: Interruption,
) -> None:
    """Lightning's fit, with one line for whatever ends it early."""
    # SafeCheckpointIO needs no telling, but Lightning else says that it reads anything
    tellable = "weights_only" in inspect.signature(trainer.fit).parameters
    safely = {"weights_only": True} if tellable else {}
    failed = True
    try:
        with warnings.catch_warnings():
            # its loader goes on where it stopped, in a way that Lightning cannot know
            warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that")
            trainer.fit(model, train_loader, val_loader, ckpt_path=resume, **safely)
        failed = False
    except pl.utilities.exceptions.SIGTERMException as error:
        raise interruption.report() from error
    except SystemExit as error:  # how Lightning ends after Ctrl-C
        raise KeyboardInterrupt from error
    except pl.utilities.exceptions.MisconfigurationException as error:
        raise UserError(_first_line(error)) from error
    except ProcessRaisedException as error:  # its text is the traceback of the other process
        raise _same_error(str(error)) from error
    except RuntimeError as error:
        if compiler_failed(error):
            raise UserError(
                f"performance.compile=True: this machine cannot compile ({_first_line(error)})"
            ) from error
        if "loading state_dict" in str(error):
            reason = str(error).splitlines()[1].strip()
            raise UserError(f"{resume}: does not fit this config ({reason})") from error
        if (failure := loader_failure(error)) is not None:
            raise failure from error
        raise
    except (UserError, OSError):
        raise
    except (TypeError, ValueError) as error:
        if "loaded state dict" in str(error):  # of an optimiser
            raise UserError(f"{resume}: does not fit this config ({_first_line(error)})") from error
        if not _raised_by_lightning(error):
            raise
        raise UserError(f"trainer: {_first_line(error)}") from error
    finally:
        interruption.restore()
        _close_wandb(trainer, failed)
    if trainer.interrupted:
        raise KeyboardInterrupt


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def _same_error(trace: str) -> Exception:
    """The error with which a process of a spawning strategy ended, from its traceback."""
    name, _, message = trace.strip().splitlines()[-1].partition(": ")
    if name.endswith(".UserError"):
        return UserError(message)
    return RunStopped(f"a process of the run failed: {name.rpartition('.')[2]}: {message}")


def _raised_by_lightning(error: BaseException) -> bool:
    """Whether an error comes from Lightning's own checks, rather than from a model or a bug."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return module.partition(".")[0] in ("lightning", "lightning_fabric", "pytorch_lightning")


def _duration(cfg: DictConfig) -> Any:
    value = cfg.get("max_time")
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _profiler(cfg: DictConfig, folder: Path) -> Any:
    """The profiler that the config names, which writes into the run's folder."""
    name = cfg.get("profiler")
    if name is None:
        return None
    return PROFILERS[name](dirpath=folder, filename="profile")


def _report_profile(profiler: Any, folder: Path) -> None:
    if profiler is None:
        return
    report = profiler.summary()
    if report.strip():
        print(report)
    print(f"profile: {folder}")


def _close_wandb(trainer: Any, failed: bool) -> None:
    """Ends the run of Weights & Biases: the next job of a sweep would else go on in it."""
    for logger in trainer.loggers:
        if trainer.is_global_zero and isinstance(logger, pl.loggers.WandbLogger):
            logger.experiment.finish(exit_code=int(failed))


def build_trainer(
    cfg: DictConfig, loggers: list[Any], callbacks: list[Any], profiler: Any = None
) -> Any:
    """Lightning's trainer with whatever of the config it takes.

    Raises:
        UserError: Lightning refuses a value, or this machine lacks what it asks for.
    """
    values = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(values, dict)
    accepted = inspect.signature(pl.Trainer.__init__).parameters
    arguments = {name: values[name] for name in accepted if name in values}
    # null means Lightning's default, but for the one setting in which it is a value of its own
    arguments = {k: v for k, v in arguments.items() if v is not None or k in NULL_IS_A_VALUE}
    arguments.pop("max_time", None)  # the timer of the run's callbacks knows it
    on_gpu = trains_on_gpu(arguments)
    devices = arguments.get("devices")
    if not on_gpu and isinstance(devices, list):  # [0, 1] names GPUs; the CPU takes a number
        arguments["devices"] = len(devices)
    if arguments.get("strategy") == "ddp":
        arguments["strategy"] = pl.strategies.DDPStrategy(find_unused_parameters=False)
    arguments.update(
        logger=loggers or False,
        profiler=profiler,
        callbacks=callbacks,
        plugins=[SafeCheckpointIO()],
        enable_checkpointing=False,
        enable_model_summary=False,  # progress.py has its own
        log_every_n_steps=arguments.get("log_every_n_steps", 10),
    )
    try:
        trainer = pl.Trainer(**arguments)
    except Exception as error:  # whatever it does with a value of the wrong type
        raise UserError(f"trainer: {_first_line(error)}") from error
    on_cpu = trainer.strategy.root_device.type == "cpu"
    if arguments.get("sync_batchnorm") and on_cpu and trainer.world_size > 1:
        raise UserError("sync_batchnorm=True: needs GPUs; processes on the CPU cannot do it")
    return trainer


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
