"""Checks of a run's config that come before any work: one line each, naming key and value."""

import difflib
import inspect
import math
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from metamask_solo.checkpoints.reading import check_backbone_name
from metamask_solo.data.datasets import check_folders
from metamask_solo.errors import UserError
from metamask_solo.hosts import (
    DATASETS,
    LARGE_CROPS,
    LINEAR_OPTIMIZER_KEYS,
    METHODS,
    OPTIMIZERS,
    SIZED_BACKBONES,
    SMALL_CROPS,
    Length,
    check_sizes,
)
from metamask_solo.hosts.stem import KEY as STEM_KEY
from metamask_solo.hosts.stem import SMALL, STEMS
from metamask_solo.training.config_keys import check_keys
from metamask_solo.training.sampling import workers_of
from metamask_solo.training.trainer_checks import check_trainer

PRETRAIN_SCHEDULERS = ("none", "warmup_cosine", "cosine", "step")
LINEAR_SCHEDULERS = (*PRETRAIN_SCHEDULERS, "reduce")
OPTIMIZER_KEYS = (
    "name",
    "batch_size",
    "lr",
    "weight_decay",
    "classifier_lr",
    "exclude_bias_n_norm_wd",
    "kwargs",
)
SCHEDULER_KEYS = (
    "name",
    "warmup_epochs",
    "warmup_start_lr",
    "min_lr",
    "interval",
    "lr_decay_steps",
)
NOT_TRAINABLE = ("base", "linear")
TAUS = {"base": 0.99, "final": 1.0}
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


# what may be left out, and what it must be where it is given
MAPPINGS = (
    "backbone",
    "backbone.kwargs",
    "method_kwargs",
    "momentum",
    "data",
    "optimizer",
    "optimizer.kwargs",
    "scheduler",
    "checkpoint",
    "auto_resume",
    "knn_eval",
    "wandb",
    "performance",
)
SWITCHES = (
    "data.no_labels",
    "data.exif_orientation",
    "data.persistent_workers",
    "checkpoint.enabled",
    "checkpoint.keep_prev",
    "auto_resume.enabled",
    "knn_eval.enabled",
    "wandb.enabled",
    "wandb.offline",
    "momentum.classifier",
    "performance.disable_channel_last",
    "optimizer.exclude_bias_n_norm_wd",
    "performance.compile",
    "sync_batchnorm",
    "fold_at_end",
    "finetune",
    "auto_augment",
)
TEXTS = (
    "data.format",
    "data.val_path",
    "checkpoint.dir",
    "resume_from_checkpoint",
    "wandb.entity",
    "wandb.project",
)
COUNTS = (
    "checkpoint.frequency",
    "accumulate_grad_batches",
    "auto_resume.max_hours",
    "knn_eval.k",
    "num_nodes",
)
MOST_DEVICES = 1024
# least, most
NUMBERS = {
    "scheduler.warmup_epochs": (0.0, math.inf),
    "scheduler.warmup_start_lr": (0.0, math.inf),
    "scheduler.min_lr": (0.0, math.inf),
    "optimizer.layer_decay": (0.0, 1.0),
    "momentum.base_tau": (0.0, 1.0),
    "momentum.final_tau": (0.0, 1.0),
    "data.fraction": (-1.0, 1.0),
}
AUGMENTATION_NUMBERS = {
    "rrc": ("crop_min_scale", "crop_max_scale"),
    "color_jitter": ("prob", "brightness", "contrast", "saturation", "hue"),
    "grayscale": ("prob",),
    "gaussian_blur": ("prob",),
    "solarization": ("prob",),
    "equalization": ("prob",),
    "horizontal_flip": ("prob",),
}
AT_MOST_ONE = ("prob", "crop_min_scale", "crop_max_scale")


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
    check_keys(cfg, "pretrain")
    _check_shared(cfg, PRETRAIN_SCHEDULERS)
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
            value = pipeline[key]
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 10_000:
                raise UserError(
                    f"augmentations[{i}].{key}={value}: must be an integer from 1 to 10000"
                )
        _check_augmentation(cfg, f"augmentations[{i}]")
    _check_crops(cfg, method)
    _check_image_size(cfg, "augmentations.0.crop_size", pipelines[0].crop_size)
    taus = [OmegaConf.select(cfg, f"momentum.{k}_tau", default=d) for k, d in TAUS.items()]
    if taus[0] > taus[1]:
        raise UserError(f"momentum.base_tau={taus[0]}: must be at most final_tau={taus[1]}")
    check_folders(cfg, labels=not cfg.data.get("no_labels", False))
    if cfg.data.get("val_path") is not None:
        _number(cfg, "optimizer.classifier_lr", 0.0)


def _check_optimization(
    cfg: DictConfig, schedulers: tuple[str, ...], more_keys: tuple[str, ...] = ()
) -> None:
    """Names, and keys that this release reads: another one would be ignored without a word."""
    optimizer = _required(cfg, "optimizer.name", str)
    if optimizer not in OPTIMIZERS:
        raise UserError(f"optimizer.name={optimizer}: allowed are {', '.join(OPTIMIZERS)}")
    scheduler = _required(cfg, "scheduler.name", str)
    if scheduler not in schedulers:
        raise UserError(f"scheduler.name={scheduler}: allowed are {', '.join(schedulers)}")
    arguments = inspect.signature(OPTIMIZERS[optimizer].__init__).parameters
    own = [name for name in arguments if name not in ("self", "params", "lr", "weight_decay")]
    for section, known in {
        "optimizer": [*OPTIMIZER_KEYS, *more_keys],
        "scheduler": list(SCHEDULER_KEYS),
        "optimizer.kwargs": own,
    }.items():
        for key, value in (OmegaConf.select(cfg, section) or {}).items():
            if key not in known:
                near = difflib.get_close_matches(str(key), known, 1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise UserError(
                    f"{section}.{key}={value}: unknown; {hint}allowed are {', '.join(known)}"
                )
    interval = OmegaConf.select(cfg, "scheduler.interval")
    if interval not in (None, "step", "epoch"):
        raise UserError(f"scheduler.interval={interval}: must be step or epoch")


def check_optimization(model: Any, cfg: DictConfig, loader: Any) -> None:
    """Builds optimiser and schedule of a model, as its run will, and drops them."""
    if hasattr(model, "build_optimizers"):  # else the method has its own way to make them
        steps = math.ceil(len(loader) / (cfg.accumulate_grad_batches or 1))
        model.build_optimizers(Length(steps * cfg.max_epochs, steps))


def check_first_step(model: Any, cfg: DictConfig, loader: Any) -> None:
    """What the first steps of a pretraining need, without data."""
    check_optimization(model, cfg, loader)
    limit = cfg.get("limit_train_batches")
    batches = len(loader)
    if isinstance(limit, float) and limit <= 1:
        batches = int(batches * limit)
    elif isinstance(limit, int):
        batches = min(batches, limit)
    check_sizes(model, cfg.optimizer.batch_size, len(cfg.devices) * cfg.num_nodes, batches)


def _check_crops(cfg: DictConfig, method: str) -> None:
    """Crops that a method ignores, or that end its first step with a traceback, are refused."""
    if not METHODS[method].__module__.startswith("solo."):
        return  # what another method takes, it says itself
    sizes = [pipeline.crop_size for pipeline in cfg.augmentations]
    crops = [pipeline.num_crops for pipeline in cfg.augmentations]
    large = sum(n for n, size in zip(crops, sizes, strict=True) if size == sizes[0])
    least, most = LARGE_CROPS.get(method, (2, 2))
    if not least <= large <= most:
        wanted = f"{least}" if least == most else f"at least {least}"
        raise UserError(
            f"augmentations: {large} crops of {sizes[0]} pixels; {method} needs {wanted} of the "
            "first pipeline's size"
        )
    small = next((i for i, size in enumerate(sizes) if size != sizes[0]), None)
    if small is None:
        return
    if method not in SMALL_CROPS:
        raise UserError(
            f"augmentations.{small}.crop_size={sizes[small]}: {method} uses no crops of another "
            f"size than {sizes[0]}, the first; methods that do: {', '.join(SMALL_CROPS)}"
        )
    backbone = cfg.backbone.name
    dynamic = OmegaConf.select(cfg, "backbone.kwargs.dynamic_img_size", default=False)
    if backbone.startswith(SIZED_BACKBONES) and not dynamic:
        raise UserError(
            f"augmentations.{small}.crop_size={sizes[small]}: {backbone} takes one size of images; "
            "give crops of one size, or another backbone"
        )


def _check_image_size(cfg: DictConfig, key: str, size: int) -> None:
    """Patches must fill the image: a ViT would leave a border unseen, or refuse it at the end."""
    if not cfg.backbone.name.startswith(SIZED_BACKBONES):
        return
    patch = 4 if cfg.backbone.name.startswith("swin") else 16
    patch = OmegaConf.select(cfg, "backbone.kwargs.patch_size", default=patch)
    if isinstance(patch, int) and patch > 0 and size % patch:
        raise UserError(
            f"{key}={size}: must be a multiple of the patches of {cfg.backbone.name}, {patch}"
        )


def check_linear_config(cfg: DictConfig) -> None:
    """Raises UserError for the first thing in a linear or fine-tuning config that cannot work."""
    check_keys(cfg, "linear")
    _check_shared(cfg, LINEAR_SCHEDULERS, LINEAR_OPTIMIZER_KEYS)
    _required(cfg, "pretrained_feature_extractor", str)
    _required(cfg, "data.val_path", str)
    for key in ("mixup", "cutmix", "label_smoothing"):
        if OmegaConf.select(cfg, key) is not None:
            _number(cfg, key, 0.0)
    if any(cfg.get(key) for key in ("mixup", "cutmix")) and cfg.optimizer.batch_size % 2:
        raise UserError(
            f"optimizer.batch_size={cfg.optimizer.batch_size}: must be even, mixup and cutmix mix "
            "pairs of images"
        )
    check_folders(cfg)


def _check_augmentation(cfg: DictConfig, prefix: str) -> None:
    for part, names in AUGMENTATION_NUMBERS.items():
        if not OmegaConf.is_dict(OmegaConf.select(cfg, f"{prefix}.{part}")):
            raise UserError(f"{prefix}.{part}: must be a mapping with {', '.join(names)}")
        for name in names:
            key = f"{prefix}.{part}.{name}"
            if OmegaConf.select(cfg, key) is not None or name == "prob":
                most = 0.5 if name == "hue" else 1.0 if name in AT_MOST_ONE else math.inf
                _number(cfg, key, 0.0, most)
    _switch(cfg, f"{prefix}.rrc.enabled", required=True)
    for name in ("mean", "std"):
        values = OmegaConf.select(cfg, f"{prefix}.{name}")
        if values is None:
            continue
        good = OmegaConf.is_list(values) and len(values) == 3
        if not good or not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
            raise UserError(f"{prefix}.{name}={values}: must be a list of three numbers")
        if name == "std" and min(values) <= 0:
            raise UserError(f"{prefix}.std={values}: must be above 0, images are divided by it")


def _switch(cfg: DictConfig, key: str, required: bool = False) -> None:
    value = OmegaConf.select(cfg, key)
    if not isinstance(value, bool) and (required or value is not None):
        raise UserError(f"{key}={value}: must be true or false")


def _check_shared(
    cfg: DictConfig, schedulers: tuple[str, ...], more_keys: tuple[str, ...] = ()
) -> None:
    for key in MAPPINGS:
        value = OmegaConf.select(cfg, key)
        if value is not None and not OmegaConf.is_dict(value):
            raise UserError(f"{key}={value}: must be a mapping of settings")
    for key in SWITCHES:
        _switch(cfg, key)
    for key in TEXTS:
        if OmegaConf.select(cfg, key) is not None:
            _required(cfg, key, str)
    for key, (least, most) in NUMBERS.items():
        if OmegaConf.select(cfg, key) is not None:
            _number(cfg, key, least, most)
    share = OmegaConf.select(cfg, "data.fraction")
    if share is not None and share != -1 and not 0 < share < 1:
        raise UserError(
            f"data.fraction={share}: must be a number above 0 and below 1, or -1 for all images"
        )
    _required(cfg, "name", str)
    _required(cfg, "backbone.name", str)
    check_backbone_name(cfg)
    _check_stem(cfg)
    dataset = _required(cfg, "data.dataset", str)
    if dataset not in DATASETS:
        raise UserError(f"data.dataset={dataset}: allowed are {', '.join(DATASETS)}")
    _required(cfg, "data.train_path", str)
    _check_optimization(cfg, schedulers, more_keys)
    _number(cfg, "optimizer.lr", 0.0)
    _number(cfg, "optimizer.weight_decay", 0.0)
    for key, least in (("optimizer.batch_size", 2), ("max_epochs", 1)):
        value = _required(cfg, key, int)
        if value < least:
            raise UserError(f"{key}={value}: must be an integer of at least {least}")
    steps = OmegaConf.select(cfg, "scheduler.lr_decay_steps")
    listed = OmegaConf.is_list(steps) and all(isinstance(step, int) for step in steps)
    if not listed and (cfg.scheduler.name == "step" or steps is not None):
        raise UserError(f"scheduler.lr_decay_steps={steps}: must be a list of epochs")
    for key in COUNTS:
        value = OmegaConf.select(cfg, key, default=1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{key}={value}: must be an integer of at least 1")
    seed = OmegaConf.select(cfg, "seed", default=5)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise UserError(f"seed={seed}: must be an integer of at least 0 and below 2^32")
    cfg.devices = _devices(cfg)
    OmegaConf.update(cfg, "data.num_workers", workers_of(cfg), force_add=True)
    check_trainer(cfg)


def _check_stem(cfg: DictConfig) -> None:
    given = OmegaConf.select(cfg, STEM_KEY)
    if given is not None and given not in STEMS:
        raise UserError(f"{STEM_KEY}={given}: allowed are {', '.join(STEMS)}, or null")
    if given == SMALL and not cfg.backbone.name.startswith("resnet"):
        raise UserError(f"{STEM_KEY}={given}: only a ResNet has one, not {cfg.backbone.name}")


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


def _required(cfg: DictConfig, key: str, kind: type) -> Any:
    try:
        value = OmegaConf.select(cfg, key, throw_on_missing=True)
    except Exception as error:
        raise UserError(f"{key}: missing; give it a value") from error
    if value is None:
        raise UserError(f"{key}: missing; give it a value")
    if isinstance(value, str) and "\0" in value:
        raise UserError(f"{key}={value!r}: must not hold a null character")
    if not isinstance(value, kind) or isinstance(value, bool):
        words = {str: "text", int: "an integer"}[kind]
        raise UserError(f"{key}={value!r}: must be {words}")
    return value


def _number(cfg: DictConfig, key: str, least: float, most: float = math.inf) -> float:
    value = OmegaConf.select(cfg, key, default=None)
    if isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
        try:
            value = float(value)
            OmegaConf.update(cfg, key, value)
        except ValueError:
            pass
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or not least <= value <= most:
        bounds = f"of at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
        raise UserError(f"{key}={value}: must be a number {bounds}")
    return float(value)
