"""Checks of a run's config that come before any work: one line each, naming key and value."""

import math
from typing import Any

from omegaconf import DictConfig, OmegaConf

from metamask_solo.checkpoints import check_backbone_name
from metamask_solo.errors import UserError
from metamask_solo.features import check_class_folders
from metamask_solo.hosts import DATASETS, METHODS

OPTIMIZERS = ("sgd", "lars", "adam", "adamw")
NOT_TRAINABLE = ("base", "linear", "mae")
AUGMENTATION_KEYS = (
    "rrc",
    "color_jitter",
    "grayscale",
    "gaussian_blur",
    "solarization",
    "equalization",
    "horizontal_flip",
    "crop_size",
    "num_crops",
)


def check_pretrain_config(cfg: DictConfig) -> None:
    """Raises UserError for the first thing in a pretraining config that cannot work."""
    _check_shared(cfg)
    method = _required(cfg, "method", str)
    trainable = sorted(set(METHODS) - set(NOT_TRAINABLE))
    if method not in trainable:
        raise UserError(f"method={method}: allowed are {', '.join(trainable)}")
    pipelines = OmegaConf.select(cfg, "augmentations", default=None)
    if not OmegaConf.is_list(pipelines) or not pipelines:
        raise UserError(f"augmentations={pipelines}: must be a list of augmentation pipelines")
    for i, pipeline in enumerate(pipelines):
        for key in AUGMENTATION_KEYS:
            if not OmegaConf.is_dict(pipeline) or key not in pipeline:
                raise UserError(f"augmentations[{i}].{key}: missing")
        for key in ("crop_size", "num_crops"):
            if not isinstance(pipeline[key], int) or pipeline[key] < 1:
                raise UserError(f"augmentations[{i}].{key}={pipeline[key]}: must be at least 1")
    if cfg.data.dataset == "custom" and cfg.data.get("format", "image_folder") == "image_folder":
        if not cfg.data.get("no_labels", False):
            check_class_folders(cfg.data.train_path, "data.train_path")
        if cfg.data.get("val_path") is not None:
            check_class_folders(cfg.data.val_path, "data.val_path")
    if cfg.data.get("val_path") is not None:
        _number(cfg, "optimizer.classifier_lr", 0.0)


def check_linear_config(cfg: DictConfig) -> None:
    """Raises UserError for the first thing in a linear or fine-tuning config that cannot work."""
    _check_shared(cfg)
    _required(cfg, "pretrained_feature_extractor", str)
    _required(cfg, "data.val_path", str)
    if cfg.data.dataset == "custom" and cfg.data.get("format", "image_folder") == "image_folder":
        for key in ("train_path", "val_path"):
            check_class_folders(cfg.data[key], f"data.{key}")


def _check_shared(cfg: DictConfig) -> None:
    _required(cfg, "name", str)
    _required(cfg, "backbone.name", str)
    check_backbone_name(cfg)
    dataset = _required(cfg, "data.dataset", str)
    if dataset not in DATASETS:
        raise UserError(f"data.dataset={dataset}: allowed are {', '.join(DATASETS)}")
    _required(cfg, "data.train_path", str)
    workers = OmegaConf.select(cfg, "data.num_workers", default=4)
    if not isinstance(workers, int) or workers < 0:
        raise UserError(f"data.num_workers={workers}: must be an integer of at least 0")
    OmegaConf.update(cfg, "data.num_workers", workers, force_add=True)
    optimizer = _required(cfg, "optimizer.name", str)
    if optimizer not in OPTIMIZERS:
        raise UserError(f"optimizer.name={optimizer}: allowed are {', '.join(OPTIMIZERS)}")
    _number(cfg, "optimizer.lr", 0.0)
    _number(cfg, "optimizer.weight_decay", 0.0)
    for key, least in (("optimizer.batch_size", 2), ("max_epochs", 1)):
        value = _required(cfg, key, int)
        if value < least:
            raise UserError(f"{key}={value}: must be an integer of at least {least}")
    _required(cfg, "scheduler.name", str)
    for key in ("checkpoint.frequency", "accumulate_grad_batches", "auto_resume.max_hours"):
        value = OmegaConf.select(cfg, key, default=1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{key}={value}: must be an integer of at least 1")
    seed = OmegaConf.select(cfg, "seed", default=5)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise UserError(f"seed={seed}: must be an integer of at least 0 and below 2^32")
    devices = cfg.setdefault("devices", "1")
    if not isinstance(devices, str) and not OmegaConf.is_list(devices):
        raise UserError(f"devices={devices}: must be a list such as [0, 1], or text such as '2'")


def _required(cfg: DictConfig, key: str, kind: type) -> Any:
    try:
        value = OmegaConf.select(cfg, key, throw_on_missing=True)
    except Exception as error:
        raise UserError(f"{key}: missing; give it a value") from error
    if value is None:
        raise UserError(f"{key}: missing; give it a value")
    if not isinstance(value, kind) or isinstance(value, bool):
        words = {str: "text", int: "an integer"}[kind]
        raise UserError(f"{key}={value!r}: must be {words}")
    return value


def _number(cfg: DictConfig, key: str, least: float) -> float:
    value = OmegaConf.select(cfg, key, default=None)
    if isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
        try:
            value = float(value)
            OmegaConf.update(cfg, key, value)
        except ValueError:
            pass
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or value < least:
        raise UserError(f"{key}={value}: must be a number of at least {least:g}")
    return float(value)
