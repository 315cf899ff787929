"""Running Lightning's trainer from a config: loggers, checkpoints, resuming."""

import importlib.util
import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

from metamask_solo.atomic_files import atomic_write
from metamask_solo.checkpoints.reading import load_raw
from metamask_solo.data.images import loader_failure
from metamask_solo.errors import UserError
from metamask_solo.hosts import pl
from metamask_solo.training.callbacks import (
    Checkpointer,
    FiniteLoss,
    Interruption,
    SafeCheckpointIO,
    logged_metrics,
)
from metamask_solo.training.runs import (
    FINISHED,
    FitResult,
    checkpoint_to_resume,
    make_folder,
    merge_metrics,
    new_folder,
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
    resume = checkpoint_to_resume(cfg, root)
    if resume is not None and hasattr(model, "check_resumable"):
        model.check_resumable(load_raw(resume))  # before anything is written
    # a checkpoint from elsewhere starts a run of its own
    continued = resume if resume and resume.parent.parent == root else None
    folder = continued.parent if continued else new_folder(root)
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
        make_folder(folder)
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
        if (failure := loader_failure(error)) is not None:
            raise failure from error
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
        merge_metrics(folder)
        with atomic_write(folder / FINISHED) as path:
            path.write_text(json.dumps({"metrics": metrics, "seconds_per_epoch": seconds}))
    return result


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
        logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
        return [logger]
    loggers: list[Any] = [pl.loggers.CSVLogger(folder, name="logs")]
    if importlib.util.find_spec("tensorboard") is not None:
        loggers.append(pl.loggers.TensorBoardLogger(folder, name="tensorboard"))
    return loggers
