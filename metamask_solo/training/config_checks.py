"""Checks of a run's config that come before any work: one line each, naming key and value."""

import inspect
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel

from metamask_solo.checkpoints.reading import check_backbone_name
from metamask_solo.data.loaders import check_folders
from metamask_solo.errors import UserError
from metamask_solo.hosts import METHODS, OPTIMIZERS, SMALL, STEM_KEY, refuse_known_faults
from metamask_solo.training.config_keys import check_keys
from metamask_solo.training.run_config import Pretraining, Probe, Run
from metamask_solo.training.sampling import workers_of
from metamask_solo.validation import unknown, validated

NOT_TRAINABLE = ("base", "linear")
MOST_DEVICES = 1024
R = TypeVar("R", bound=Run)


@contextmanager
def buildable() -> Iterator[None]:
    """Makes one line of whatever solo-learn, timm or torch say of a setting of theirs.

    Their own settings are not known here, and they refuse one with any exception.

    Raises:
        UserError: something in the block failed.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # an assertion of solo-learn often says nothing but what it asserts
        said = str(error).strip() or traceback.extract_tb(error.__traceback__)[-1].line or ""
        lines = said.splitlines() or [""]
        raise UserError(
            f"config: nothing can be built from it ({type(error).__name__}: {lines[0]})"
        ) from error


def check_pretrain_config(cfg: DictConfig) -> None:
    """Raises UserError for the first thing in a pretraining config that cannot work."""
    run = _checked(cfg, "pretrain", Pretraining)
    trainable = sorted(set(METHODS) - set(NOT_TRAINABLE))
    if run.method not in trainable:
        raise UserError(f"method={run.method}: allowed are {', '.join(trainable)}")
    base, final = run.momentum.base_tau, run.momentum.final_tau
    if base > final:
        raise UserError(f"momentum.base_tau={base}: must be at most final_tau={final}")
    check_folders(cfg, labels=not run.data.no_labels)
    if run.data.val_path is not None and run.optimizer.classifier_lr is None:
        raise UserError("optimizer.classifier_lr: missing; give it a number of at least 0")


def check_linear_config(cfg: DictConfig) -> None:
    """Raises UserError for the first thing in a linear or fine-tuning config that cannot work."""
    run = _checked(cfg, "linear", Probe)
    size = run.optimizer.batch_size
    if (run.mixup or run.cutmix) and size % 2:
        raise UserError(
            f"optimizer.batch_size={size}: must be even, mixup and cutmix mix pairs of images"
        )
    check_folders(cfg)


def _checked(cfg: DictConfig, command: str, model: type[R]) -> R:
    """The config against its model; what may be written in several ways is made one in it."""
    check_keys(cfg, command)
    given = OmegaConf.to_container(cfg, resolve=True)
    run = validated(model, given)
    for key, value in _numbers_of_texts(run, given):
        OmegaConf.update(cfg, key, value)
    check_backbone_name(cfg)
    if run.backbone.stem == SMALL and not run.backbone.name.startswith("resnet"):
        raise UserError(f"{STEM_KEY}={SMALL}: only a ResNet has one, not {run.backbone.name}")
    optimizer = OPTIMIZERS.get(run.optimizer.name)  # a missing one is refused as a fault
    arguments = inspect.signature(optimizer.__init__).parameters if optimizer else {}
    taken = [name for name in arguments if name not in ("self", "params", "lr", "weight_decay")]
    for key in run.optimizer.kwargs if optimizer else ():
        if key not in taken:
            raise unknown(f"optimizer.kwargs.{key}", [f"optimizer.kwargs.{n}" for n in taken])
    if run.scheduler.name == "step" and run.scheduler.lr_decay_steps is None:
        raise UserError("scheduler.lr_decay_steps: missing; give it a list of epochs")
    interval = run.val_check_interval
    if run.check_val_every_n_epoch is None and isinstance(interval, float | None):
        raise UserError(
            "check_val_every_n_epoch=null: needs a number of batches in val_check_interval, after "
            "which to validate"
        )
    cfg.devices = _devices(cfg)
    OmegaConf.update(cfg, "data.num_workers", workers_of(cfg), force_add=True)
    return run


def _numbers_of_texts(checked: Any, given: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Numbers that the file has as text: YAML 1.1 reads 1e-4 so."""
    if isinstance(given, str) and isinstance(checked, int | float):
        yield key, checked
    elif isinstance(given, dict) and isinstance(checked, BaseModel):
        for name in given.keys() & type(checked).model_fields.keys():
            yield from _numbers_of_texts(
                getattr(checked, name), given[name], f"{key}.{name}".lstrip(".")
            )
    elif isinstance(given, list) and isinstance(checked, list):
        for i, (own, item) in enumerate(zip(checked, given, strict=True)):
            yield from _numbers_of_texts(own, item, f"{key}.{i}")


def check_faults(model: Any, cfg: DictConfig, loader: Any, kind: str) -> None:
    """Refuses what solo-learn is known to do wrong with a completed config."""
    limit = cfg.get("limit_train_batches")
    batches = len(loader)
    if isinstance(limit, float) and limit <= 1:
        batches = int(batches * limit)
    elif isinstance(limit, int):
        batches = min(batches, limit)
    refuse_known_faults(cfg, kind, batches, model)


def _devices(cfg: DictConfig) -> list[int]:
    """``devices`` as a list.

    solo-learn scales the rates by its length, and would count the characters of a text. Where there
    is no GPU, only the length counts.
    """
    given = cfg.get("devices", 1)
    found: Any = OmegaConf.to_container(given) if OmegaConf.is_list(given) else given
    if found in ("auto", "-1", -1):
        found = max(1, torch.cuda.device_count()) if cfg.get("accelerator") != "cpu" else 1
    elif isinstance(found, str) and re.fullmatch(r"\d{1,4}", found):
        found = int(found)
    elif isinstance(found, str) and re.fullmatch(r"(\d{1,4},)+(\d{1,4})?", found):
        found = [int(number) for number in found.split(",") if number]  # "2," is the third GPU
    if isinstance(found, int) and not isinstance(found, bool) and 1 <= found <= MOST_DEVICES:
        return list(range(found))
    indices = isinstance(found, list) and all(type(i) is int and i >= 0 for i in found)
    if not indices or not found or len(set(found)) < len(found):
        raise UserError(
            f"devices={given}: must be a number such as 2, a list of GPUs such as [0, 1], or auto"
        )
    return list(found)
