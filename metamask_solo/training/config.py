# ruff: noqa: D101 - a class without a docstring is the section of its name
"""What a run's config may hold, and the checks that come before any work.

The models say types, ranges and defaults, for checks and help alike; the defaults are the host's,
which fills them in. What solo-learn, Lightning and torch check themselves, they check, and
:func:`one_line` makes one line of what they say. Nothing heavy is imported at the top: ``--help``
reads this.
"""

import hashlib
import importlib
import inspect
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from modulefinder import ModuleFinder
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator

from metamask_solo.errors import UserError
from metamask_solo.validation import Settings, fields, shown, unknown, validated

SCALED = "scaled by images a step / 256"
ACCUMULATED = "times accumulate_grad_batches"
Path = Annotated[str, AfterValidator(os.path.expanduser)]
Probability = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Colour = Annotated[list[float], Field(min_length=3, max_length=3)]
Whole = dict[str, Any]


def _fraction(value: float) -> float:
    if value != -1 and not 0 < value < 1:
        raise ValueError("must be above 0 and below 1, or -1 for all images")
    return value


def _devices(value: Any) -> list[int]:
    """A list: solo-learn scales the rates by its length. Without a GPU only the length counts."""
    if isinstance(value, str) and re.fullmatch(r"(\d{1,4},)+(\d{1,4})?", value):
        value = [int(number) for number in value.split(",") if number]  # "2," is the third GPU
    elif isinstance(value, str) and re.fullmatch(r"-1|\d{1,4}", value):
        value = int(value)
    if value in ("auto", -1):
        import torch

        value = max(1, torch.cuda.device_count())
    if type(value) is int and 1 <= value <= 1024:
        value = list(range(value))
    indices = isinstance(value, list) and all(type(i) is int and i >= 0 for i in value)
    if not indices or not value or len({*value}) < len(value):
        raise ValueError("must be a number such as 2, a list of GPUs such as [0, 1], or auto")
    return list(value)


class Backbone(Settings):
    name: str = Field(description="such as resnet18 or vit_tiny")
    stem: Literal["3x3", "standard"] | None = Field(
        None, description="of a ResNet; null: 3x3 for CIFAR, else standard"
    )
    kwargs: Whole = Field({}, description="of the backbone, such as patch_size of a ViT")


class Data(Settings):
    dataset: Literal["cifar10", "cifar100", "stl10", "imagenet", "imagenet100", "custom"]
    train_path: Path = Field(description="class folders, or torchvision's files")
    val_path: Path | None = Field(None, description="the same for validation; a probe needs it")
    format: Literal["image_folder"] = Field(
        "image_folder", description="h5 and dali are read by solo-learn's own scripts only"
    )
    num_workers: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        4, description="processes that read images"
    )
    persistent_workers: bool = Field(True, description="keep them from epoch to epoch")
    fraction: Annotated[float, AfterValidator(_fraction)] = Field(
        -1, description="part of the training images, above 0 and below 1; -1: all"
    )
    no_labels: bool = Field(False, description="pretrain on all images below train_path")
    background: Any = Field(
        "white", description="behind transparent pixels: white, '#ff8000' or [255, 128, 0]"
    )
    exif_orientation: bool = Field(False, description="turn images as their EXIF data say")


class Optimizer(Settings):
    name: Literal["sgd", "lars", "adam", "adamw"]
    batch_size: int = Field(ge=2, description="of one process")
    lr: Rate = Field(description=f"learning rate, {SCALED}")
    weight_decay: Rate
    exclude_bias_n_norm_wd: bool = Field(False, description="no decay of biases and norms")
    kwargs: Whole = Field({}, description="momentum, eta, betas, …")


class Scheduler(Settings):
    name: Literal["none", "warmup_cosine", "step"]
    warmup_epochs: Rate = 10
    warmup_start_lr: Rate = 3e-5
    min_lr: Rate = Field(0, description="at the end of the cosine")
    lr_decay_steps: list[int] | None = Field(
        None, description="with step: epochs, each of which divides the rate by 10"
    )
    interval: Literal["step", "epoch"] = Field("step", description="how often the rate changes")

    @model_validator(mode="after")
    def _step_has_epochs(self) -> "Scheduler":
        if self.name == "step" and self.lr_decay_steps is None:
            raise ValueError("step needs lr_decay_steps, a list of epochs")
        return self


class Checkpoint(Settings):
    enabled: bool = Field(False, description="on in the packaged files")
    dir: Path = Field("trained_models", description="folder of the runs: METHOD/RUN, or linear/RUN")
    frequency: Count = Field(1, description="epochs from one to the next")
    keep_prev: bool = Field(False, description="keep the earlier ones")


class AutoResume(Settings):
    enabled: bool = Field(False, description="continue a stopped run that is the same one")
    max_hours: Count = Field(36, description="its age at most")


class Wandb(Settings):
    enabled: bool = Field(False, description="log to Weights & Biases")
    entity: str | None = None
    project: str = "solo-learn"
    offline: bool = False


class Performance(Settings):
    disable_channel_last: bool = Field(False, description="GitHub main only")


class TrainerArguments(Settings):
    """Of the arguments of Lightning's Trainer, those that it does not check itself."""

    # whether others are read, _read knows
    model_config = ConfigDict(extra="allow")

    max_epochs: Count
    max_steps: Count | Literal[-1] = -1
    limit_train_batches: Annotated[int | float, Field(gt=0)] | None = None
    val_check_interval: Annotated[int | float, Field(gt=0)] | Whole | str | None = None
    check_val_every_n_epoch: Count | None = 1
    log_every_n_steps: Annotated[int, Field(ge=0)] | None = None
    accumulate_grad_batches: Count = 1
    gradient_clip_val: Rate | None = None
    deterministic: bool | Literal["warn"] | None = None
    sync_batchnorm: bool = False

    @model_validator(mode="after")
    def _validates_by_batches(self) -> "TrainerArguments":
        by_epoch = isinstance(self.val_check_interval, float | None)
        if self.check_val_every_n_epoch is None and by_epoch:
            raise ValueError("check_val_every_n_epoch=null needs val_check_interval=BATCHES")
        return self


class Run(TrainerArguments):
    """What pretraining and probes share."""

    name: str = Field(description="of the run and its files")
    seed: int = Field(5, ge=0, lt=2**32, description="of weights, order and augmentations")
    devices: Annotated[list[int], BeforeValidator(_devices)] = Field(
        [0], description="a number, a list of GPUs, or auto"
    )
    resume_from_checkpoint: Path | None = Field(
        None, description="a .ckpt file or a run's folder that a new run starts from"
    )
    imports: list[str] = Field([], description="modules that are imported first: own methods")
    callbacks: list[Whole] = Field([], description="of Lightning, each with _target_: its class")
    backbone: Backbone
    data: Data
    optimizer: Optimizer
    scheduler: Scheduler
    checkpoint: Checkpoint = Checkpoint()
    auto_resume: AutoResume = AutoResume()
    wandb: Wandb = Wandb()
    performance: Performance = Performance()


class PretrainOptimizer(Optimizer):
    lr: Rate = Field(description=f"learning rate, {SCALED}, {ACCUMULATED}")
    classifier_lr: Rate | None = Field(
        None, description="of the online classifier, scaled as lr; needed with data.val_path"
    )


class PretrainScheduler(Scheduler):
    warmup_start_lr: Rate = Field(3e-5, description=ACCUMULATED)
    min_lr: Rate = Field(0, description=f"at the end of the cosine, {ACCUMULATED}")


class Momentum(Settings):
    base_tau: Probability = Field(0.99, description="of BYOL's teacher and its like, at the start")
    final_tau: Probability = Field(1, description="and at the end")
    classifier: bool = Field(False, description="a classifier on the teacher too")


class KnnEval(Settings):
    enabled: bool = Field(False, description="online kNN at each validation")
    k: Count = Field(20, description="its neighbours")
    distance_func: Literal["cosine", "euclidean"] = Field(
        "euclidean", description="the files have cosine"
    )


class Crop(Settings):
    enabled: bool = Field(description="random resized crop")
    crop_min_scale: Probability = Field(0.08, description="least part of the area")
    crop_max_scale: Probability = 1


class Prob(Settings):
    """A part of a pipeline that has nothing but a probability."""

    prob: Probability


class ColorJitter(Prob):
    brightness: Rate = 0
    contrast: Rate = 0
    saturation: Rate = 0
    hue: float = Field(0, ge=0, le=0.5)


class Pipeline(Settings):
    """One of ``augmentations``."""

    rrc: Crop
    color_jitter: ColorJitter
    grayscale: Prob
    gaussian_blur: Prob
    solarization: Prob
    equalization: Prob
    horizontal_flip: Prob
    crop_size: int = Field(ge=1, le=10_000, description="pixels")
    num_crops: int = Field(ge=1, le=10_000, description="MetaMask: 2 in all")
    mean: Colour | None = Field(None, description="custom data only; null: ImageNet's")
    std: Colour | None = Field(None, description="custom data only; null: ImageNet's")


class Pretraining(Run):
    """A config of ``metamask-solo pretrain``."""

    method: str = Field(description="a method of solo-learn's, or metamask")
    method_kwargs: Whole = Field({}, description="the method's settings; MetaMask's stand below")
    fold_at_end: bool = Field(True, description="write MetaMask's folded checkpoint too")
    log_rankme: bool = Field(True, description="log RankMe of the features after each epoch")
    optimizer: PretrainOptimizer
    scheduler: PretrainScheduler
    momentum: Momentum = Momentum()
    knn_eval: KnnEval = KnnEval()
    augmentations: list[Pipeline] = Field(
        min_length=1, description="pipelines, or a file's name: augmentations=small"
    )


class ProbeAugmentations(Settings):
    """``data.augmentations`` of a probe; null: those of the run."""

    crop_size: Count | None = Field(None, description="pixels; null: the run's")
    mean: Colour | None = None
    std: Colour | None = None
    crop_min_scale: Probability | None = Field(None, description="least part of a random crop")
    horizontal_flip: Probability | None = Field(None, description="probability")


class ProbeData(Data):
    val_path: Path = Field(description="the same for validation")
    augmentations: ProbeAugmentations = ProbeAugmentations()


class ProbeOptimizer(Optimizer):
    layer_decay: Literal[0] = Field(0, description="solo-learn's optimisers read no other")


class Probe(Run):
    """A config of ``metamask-solo linear`` or ``finetune``."""

    data: ProbeData
    optimizer: ProbeOptimizer
    pretrained_feature_extractor: Path = Field(description="a run's folder, or .ckpt file")
    pretrain_method: Any = Field(None, description="the method of the checkpoint")
    masked: bool | None = Field(
        None, description="features of MetaMask; null: masked where there is a mask"
    )
    scale_features: bool = Field(
        False, description="divide the features by one number, so that the rates fit any backbone"
    )
    finetune: bool = Field(False, description="train the backbone too")
    auto_augment: bool = Field(False, description="timm's RandAugment")
    label_smoothing: Rate = Field(0, description="GitHub main only, like mixup and cutmix")
    mixup: Rate = 0
    cutmix: Rate = 0

    @model_validator(mode="after")
    def _pairs(self) -> "Probe":
        if (self.mixup or self.cutmix) and self.optimizer.batch_size % 2:
            raise ValueError("optimizer.batch_size must be even: mixup and cutmix mix pairs")
        return self


# Arguments of Lightning's Trainer that a command sets itself
OURS = {
    *("logger", "plugins", "enable_checkpointing", "default_root_dir", "overfit_batches"),
    *("use_distributed_sampler", "reload_dataloaders_every_n_epochs", "limit_test_batches"),
    *("limit_predict_batches", "barebones", "model_registry"),
}


def trainer_arguments() -> set[str]:
    """Names of the arguments of the installed Lightning's Trainer that a config may have."""
    from metamask_solo.hosts import pl

    return {*inspect.signature(pl.Trainer.__init__).parameters} - OURS - {"self"}


def known_keys(model: type[Run]) -> list[str]:
    """Dotted keys that a config may have, without those below a mapping that is passed on whole."""
    keys = [key for key, _ in fields(model) if key not in TrainerArguments.model_fields]
    return [*keys, *sorted(trainer_arguments() - {*keys})]


def read_pretraining_config(cfg: DictConfig) -> DictConfig:
    """The checked config of a pretraining, as a copy that takes new keys.

    Numbers that were texts are numbers, ``~`` in paths is the home folder, ``devices`` is a list
    and ``data.num_workers`` a number.

    Raises:
        UserError: the first thing in it that cannot work.
    """
    from metamask_solo.data.loaders import check_folders
    from metamask_solo.hosts import setting_names, trainable_methods

    cfg = _read(cfg, Pretraining)
    if cfg.method not in trainable_methods():
        listed = ", ".join(sorted(trainable_methods()))
        hint = "" if cfg.get("imports") else "; a method of your own needs imports=[MODULE]"
        raise UserError(f"method={cfg.method}: allowed are {listed}{hint}")
    names = setting_names(cfg.method)
    for key in cfg.get("method_kwargs", {}):
        if names is not None and key not in names:
            below = [f"method_kwargs.{name}" for name in sorted(names)]
            raise unknown(f"method_kwargs.{key}", [*below, *known_keys(Pretraining)])
    if cfg.get("fast_dev_run") and cfg.get("knn_eval") is not None:
        cfg.knn_eval.enabled = False  # a batch is not the data that it must see
    check_folders(cfg)
    if cfg.data.get("val_path") is not None and cfg.optimizer.get("classifier_lr") is None:
        raise UserError("optimizer.classifier_lr: missing; data.val_path needs it")
    return cfg


def read_probe_config(cfg: DictConfig) -> DictConfig:
    """The checked config of a probe or of fine-tuning; see :func:`read_pretraining_config`."""
    from metamask_solo.data.loaders import check_folders

    cfg = _read(cfg, Probe)
    check_folders(cfg)
    return cfg


def _read(cfg: DictConfig, model: type[Run]) -> DictConfig:
    from metamask_solo.checkpoints.reading import check_backbone_name
    from metamask_solo.data.datasets import say
    from metamask_solo.training.callbacks import configured_callbacks
    from metamask_solo.training.resume import STARTED_FROM
    from metamask_solo.training.sampling import trains_on_gpu, workers_of
    from metamask_solo.training.trainer import build_trainer, quiet, torch_as_before

    try:
        plain: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{error.full_key}: {reason}" if error.full_key else reason) from error
    trainer, raw = trainer_arguments(), str(OmegaConf.to_container(cfg))
    for name, value in plain.items():
        if name in OURS:
            if value is not None:
                raise UserError(f"{name}={shown(value)}: the command sets it itself")
        elif name not in model.model_fields and name not in trainer and f"${{{name}" not in raw:
            raise unknown(str(name), known_keys(model))  # not even another value refers to it
    run = validated(model, plain)
    # the host completes what decides a result; what is left out there has its default here
    whole = {"seed", "resume_from_checkpoint", "devices", "checkpoint", "auto_resume", "wandb"}
    checked = OmegaConf.create(run.model_dump(exclude_unset=True) | run.model_dump(include=whole))
    if checked.get("accelerator") == "cpu" and plain.get("devices") in ("auto", -1, "-1"):
        checked.devices = [0]
    checked.data.num_workers = workers_of(checked)
    if str(checked.get("precision")) in ("16", "16-mixed") and not trains_on_gpu(checked):
        say("precision: the CPU has no 16-mixed; this run trains in bf16-mixed")
        checked.precision = "bf16-mixed"
    if run.imports:
        checked[STARTED_FROM] = {"code": _import_modules(run.imports)}
    check_backbone_name(checked)
    if run.backbone.stem == "3x3" and not run.backbone.name.startswith("resnet"):
        raise UserError(f"backbone.stem=3x3: only a ResNet has one, not {run.backbone.name}")
    _check_optimizer(run.optimizer)
    with torch_as_before(), quiet(""):  # the trainer that trains says it
        callbacks = configured_callbacks(checked)
        _check_accumulation(checked, callbacks)
        build_trainer(checked, [], callbacks)
    return checked


def _check_accumulation(cfg: DictConfig, callbacks: list[Any]) -> None:
    """Refuses a callback that changes the length in steps of a cosine while it goes on."""
    from metamask_solo.hosts import pl

    changes = pl.callbacks.GradientAccumulationScheduler
    for key in ("scheduler.name", "method_kwargs.mask.schedule"):
        value = str(OmegaConf.select(cfg, key))
        if value.endswith("cosine") and any(isinstance(c, changes) for c in callbacks):
            raise UserError(
                f"{key}={value}: its steps are unknown with GradientAccumulationScheduler; "
                "use accumulate_grad_batches"
            )


def _import_modules(names: list[str]) -> str:
    """Imports modules of the working folder or installed ones, which may register methods.

    Returns:
        A digest of their files: with other code, a run is another one.
    """
    digest = hashlib.sha256()
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    for name in names:
        with one_line(f"imports={name}"):
            module: Any = importlib.import_module(name)
        folders = [pathlib.Path(folder) for folder in getattr(module, "__path__", ())]
        files = [str(file) for folder in folders for file in folder.rglob("*.py")]
        if str(module.__file__).endswith(".py") and not files:
            # with what it imports from its folder
            finder: Any = ModuleFinder(
                [os.path.dirname(module.__file__)], excludes=["metamask_solo"]
            )
            finder.run_script(module.__file__)
            files = [part.__file__ for part in finder.modules.values() if part.__file__]
        for file in sorted(files):
            digest.update(pathlib.Path(file).read_bytes())
    return digest.hexdigest()


def _check_optimizer(optimizer: Optimizer) -> None:
    """Builds the optimiser that the host will build, on one parameter, and drops it."""
    import torch

    from metamask_solo.hosts import OPTIMIZERS

    kind = OPTIMIZERS.get(optimizer.name)
    rates = {"lr": optimizer.lr, "weight_decay": optimizer.weight_decay}
    if kind is None:
        return  # the host says so
    names = inspect.signature(kind.__init__).parameters.keys() - {"self", "params", *rates}
    for key in optimizer.kwargs.keys() - names:
        raise unknown(f"optimizer.kwargs.{key}", [f"optimizer.kwargs.{name}" for name in names])
    # the host's default, which it fills in later
    kwargs = ({"momentum": 0.9} if "momentum" in names else {}) | optimizer.kwargs
    with one_line("optimizer.kwargs"):
        kind([torch.nn.Parameter(torch.zeros(1))], **rates, **kwargs)


@contextmanager
def one_line(where: str = "config") -> Iterator[None]:
    """Makes one line of whatever solo-learn, timm, torch or Lightning say of a setting of theirs.

    Their own settings are not known here, and they refuse one with any exception.

    Args:
        where: what stands before what they say.

    Raises:
        UserError: something in the block failed.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        kind = "" if isinstance(cause, ValueError) else f"{type(cause).__name__}: "
        raise UserError(f"{where}: {kind}{first_line(cause)}") from error


def first_line(error: BaseException) -> str:
    """What an exception says; an assertion of solo-learn says nothing but what it asserts."""
    frames = traceback.extract_tb(error.__traceback__)
    said = str(error).strip() or (frames[-1].line if frames else "") or type(error).__name__
    first, *more = said.splitlines()
    return f"{first} {more[0].strip()}" if first.endswith(":") and more else first
