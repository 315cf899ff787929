# ruff: noqa: D101 - a class without a docstring is the section of its name
"""What a run's config may hold: types, ranges, defaults and meanings, for checks and help alike.

A config is checked against these models and stays as it is: solo-learn fills in the defaults.
Which keys may stand beside these is for config_keys.py to say, what two settings are to each other
for config_checks.py. Nothing heavy is imported, since ``--help`` reads this.
"""

import re
from datetime import timedelta
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le
from pydantic import AfterValidator, ConfigDict, Field

from metamask_solo.validation import Allowed, Defaulted, Left, Number, Settings, Text, about

SCALED = "scaled by images a step / 256"

Folder = Annotated[Text, Allowed("a folder")]
Switch = Defaulted[bool]
Whole = Defaulted[dict[Any, Any]]
Probability = Annotated[Number, Field(ge=0, le=1)]
Rate = Annotated[Number, Field(ge=0)]
Three = Annotated[list[Number], Field(min_length=3, max_length=3), Allowed("three numbers")]
ThreePositive = Annotated[
    list[Annotated[Number, Field(gt=0)]],
    Field(min_length=3, max_length=3),
    Allowed("three numbers above 0"),
]


def _fraction(value: float) -> float:
    if value != -1 and not 0 < value < 1:
        raise ValueError("no fraction")
    return value


def _time(given: Any) -> Any:
    """A time as Lightning takes it, ``DD:HH:MM:SS`` or a mapping such as ``{hours: 12}``."""
    found = None
    form = r"\s*(\d+):(\d\d):(\d\d):(\d\d)\s*"
    try:
        if isinstance(given, dict):
            found = timedelta(**given)
        elif isinstance(given, str) and (parts := re.fullmatch(form, given)):
            days, hours, minutes, seconds = map(int, parts.groups())
            found = timedelta(days, seconds, hours=hours, minutes=minutes)
    except (TypeError, OverflowError):
        found = None
    if found is None or found <= timedelta():
        raise ValueError("no time")
    return given


Time = Annotated[Any, AfterValidator(_time)]
# of the batches, or a whole number of them
Share = Annotated[int, Ge(1)] | Annotated[float, Gt(0), Le(1)]
ShareOrNone = Annotated[int, Ge(0)] | Annotated[float, Ge(0), Le(1)]


class Section(Settings):
    """A part of a config; of other keys config_keys.py knows whether they are read."""

    model_config = ConfigDict(extra="ignore")


class Backbone(Section):
    name: Annotated[Text, Allowed("a name of solo-learn's")] = about("such as resnet18 or vit_tiny")
    stem: Literal["3x3", "standard"] | None = about(
        "of a ResNet; null: 3x3 for CIFAR, else standard", None
    )
    kwargs: Annotated[Whole, Allowed("a mapping of what the backbone takes")] = about(
        "such as img_size of a ViT", {}
    )


class Data(Section):
    dataset: Literal["cifar10", "cifar100", "stl10", "imagenet", "imagenet100", "custom"]
    train_path: Folder = about("class folders, or torchvision's files")
    val_path: Folder | None = about("the same for validation; a probe needs it", None)
    format: Annotated[
        Defaulted[Literal["image_folder"]],
        Allowed("image_folder; h5 and dali are read by solo-learn's own scripts only"),
    ] = "image_folder"
    num_workers: Annotated[int, Field(ge=0)] | Literal["auto"] = about(
        "processes that read images", 4
    )
    persistent_workers: Switch = about("keep them from epoch to epoch", True)
    fraction: Defaulted[
        Annotated[
            Number,
            AfterValidator(_fraction),
            Allowed("a number above 0 and below 1, or -1 for all images"),
        ]
    ] = about("part of the training images", -1)
    no_labels: Switch = about("pretrain on all images below train_path", False)
    background: Annotated[Any, Allowed("a colour such as white, '#ff8000' or [255, 128, 0]")] = (
        about("what is behind transparent pixels", "white")
    )
    exif_orientation: Switch = about("turn images as their camera says", False)


class Optimizer(Section):
    name: Literal["sgd", "lars", "adam", "adamw"]
    batch_size: int = about("of one process", ge=2)
    lr: Rate = about(f"learning rate, {SCALED}")
    weight_decay: Rate
    exclude_bias_n_norm_wd: Switch = about("no decay of biases and norms", False)
    kwargs: Annotated[Whole, Allowed("a mapping of what the optimiser takes")] = about(
        "momentum, eta, betas, …", {}
    )


class Scheduler(Section):
    name: Literal["none", "warmup_cosine", "cosine", "step", "reduce"]
    warmup_epochs: Defaulted[Rate] = 10
    warmup_start_lr: Defaulted[Rate] = 3e-5
    min_lr: Defaulted[Rate] = about("at the end of the cosine", 0)
    lr_decay_steps: Annotated[list[int], Allowed("a list of epochs")] | None = about(
        "with step: times 0.1 at each", None
    )
    interval: Defaulted[Literal["step", "epoch"]] = about("how often the rate changes", "step")


class Checkpoint(Section):
    enabled: Switch = about("the files have it on", False)
    dir: Defaulted[Folder] = about("gets METHOD/RUN, or linear/RUN", "trained_models")
    frequency: int = about("epochs from one to the next", 1, ge=1)
    keep_prev: Switch = about("keep the earlier ones", False)


class AutoResume(Section):
    enabled: Switch = about("continue a stopped run of the same config", False)
    max_hours: int = about("its age at most", 36, ge=1)


class Wandb(Section):
    enabled: Switch = about("log to Weights & Biases", False)
    entity: Text | None = None
    project: Defaulted[Text] = "solo-learn"
    offline: Switch = False


class Performance(Section):
    disable_channel_last: Switch = about("GitHub main only", False)
    compile: Switch = about("torch.compile of the backbone", False)


class TrainerArguments(Section):
    """Arguments of Lightning's Trainer; those that are not here it checks itself, in time."""

    max_epochs: int = Field(ge=1)
    min_epochs: int | None = Field(None, ge=0)
    min_steps: int | None = Field(None, ge=0)
    max_steps: Annotated[int, Ge(1)] | Literal[-1] | None = -1
    max_time: Left[
        Annotated[
            Time,
            Allowed("a time above 0, such as 00:12:00:00 (days first) or {hours: 12}"),
        ]
    ] = None
    limit_train_batches: Left[
        Annotated[Share, Allowed("a share above 0.0 up to 1.0, or a whole number of batches")]
    ] = None
    limit_val_batches: Left[
        Annotated[ShareOrNone, Allowed("a share from 0.0 up to 1.0, or a whole number of batches")]
    ] = None
    val_check_interval: Left[
        Annotated[
            Share | Time,
            Allowed("a share of an epoch above 0.0 up to 1.0, a number of batches, or DD:HH:MM:SS"),
        ]
    ] = None
    check_val_every_n_epoch: int | None = Field(1, ge=1)
    num_sanity_val_steps: int | None = Field(None, ge=-1)
    log_every_n_steps: int | None = Field(None, ge=0)
    accumulate_grad_batches: int = Field(1, ge=1)
    num_nodes: int = Field(1, ge=1)
    fast_dev_run: bool | Annotated[int, Field(ge=1)] | None = False
    gradient_clip_val: Number | None = Field(None, ge=0)
    gradient_clip_algorithm: Literal["norm", "value"] | None = None
    profiler: Literal["simple", "advanced", "pytorch"] | None = None
    deterministic: Literal[True, False, "warn"] | None = None
    sync_batchnorm: Left[bool] = False
    enable_progress_bar: Left[bool] = None
    enable_model_summary: Left[bool] = None
    enable_autolog_hparams: Left[bool] = None
    inference_mode: Left[bool] = None
    detect_anomaly: Left[bool] = None
    benchmark: Left[bool] = None


class Run(TrainerArguments):
    """What pretraining and probes share."""

    name: Text = about("of the run and its files")
    seed: int = about("of weights, order and augmentations", 5, ge=0, lt=2**32)
    resume_from_checkpoint: Annotated[Text | None, Allowed("a .ckpt file, or a run's folder")] = (
        about("to go on from, in a run of its own", None)
    )
    started_from: Annotated[Any, Allowed("set by the command")] = about(
        "identity of the images, and of the checkpoint that a run began at", None
    )
    backbone: Backbone
    data: Data
    optimizer: Optimizer
    scheduler: Scheduler
    checkpoint: Checkpoint
    auto_resume: AutoResume
    wandb: Wandb
    performance: Performance


class PretrainOptimizer(Optimizer):
    classifier_lr: Rate | None = about(
        f"of the online classifier, {SCALED}; needed with data.val_path", None
    )


class PretrainScheduler(Scheduler):
    name: Literal["none", "warmup_cosine", "cosine", "step"]


class Momentum(Section):
    base_tau: Defaulted[Probability] = about(
        "BYOL and its like: of the teacher, at the start", 0.99
    )
    final_tau: Defaulted[Probability] = about("and at the end", 1)
    classifier: Switch = about("a classifier on the teacher too", False)


class KnnEval(Section):
    enabled: Switch = about("online kNN at each validation", False)
    k: int = about("its neighbours", 20, ge=1)
    distance_func: Defaulted[Literal["cosine", "euclidean"]] = about(
        "the files have cosine", "euclidean"
    )


class Crop(Section):
    enabled: bool = about("random resized crop")
    crop_min_scale: Defaulted[Probability] = about("least part of the area", 0.08)
    crop_max_scale: Defaulted[Probability] = 1


class Prob(Section):
    """A part of a pipeline that has nothing but a probability."""

    prob: Probability


class ColorJitter(Prob):
    brightness: Defaulted[Rate] = 0
    contrast: Defaulted[Rate] = 0
    saturation: Defaulted[Rate] = 0
    hue: Defaulted[Annotated[Number, Field(ge=0, le=0.5)]] = 0


class Pipeline(Section):
    """One of ``augmentations``."""

    rrc: Crop
    color_jitter: ColorJitter
    grayscale: Prob
    gaussian_blur: Prob
    solarization: Prob
    equalization: Prob
    horizontal_flip: Prob
    crop_size: int = about("pixels", ge=1, le=10_000)
    num_crops: int = about("MetaMask: 2 in all", ge=1, le=10_000)
    mean: Three | None = about("custom data only; null: ImageNet's", None)
    std: ThreePositive | None = about("custom data only; null: ImageNet's", None)


class Pretraining(Run):
    """A config of ``metamask-solo pretrain``."""

    optimizer: PretrainOptimizer
    scheduler: PretrainScheduler
    method: Annotated[Text, Allowed("a method of solo-learn's, or metamask")]
    method_kwargs: Annotated[Whole, Allowed("a mapping of the method's own settings")] = about(
        "MetaMask's stand below", {}
    )
    fold_at_end: Switch = about("write MetaMask's folded checkpoint too", True)
    momentum: Momentum
    knn_eval: KnnEval
    augmentations: Annotated[
        list[Pipeline], Field(min_length=1), Allowed("a list of augmentation pipelines")
    ] = about("or a file's name: augmentations=small")


class ProbeAugmentations(Section):
    """``data.augmentations`` of a probe; null: those of the run."""

    crop_size: int | None = about("pixels; null: the run's, as the next", None, ge=1)
    mean: Three | None = None
    std: ThreePositive | None = None
    crop_min_scale: Probability | None = about("least part of a random crop", None)
    horizontal_flip: Probability | None = about("probability", None)


class ProbeData(Data):
    val_path: Folder = about("the same for validation")
    augmentations: ProbeAugmentations


class ProbeOptimizer(Optimizer):
    layer_decay: Defaulted[Probability] = about("GitHub main only, of a ViT", 0)


class Probe(Run):
    """A config of ``metamask-solo linear`` or ``finetune``."""

    data: ProbeData
    optimizer: ProbeOptimizer
    pretrained_feature_extractor: Annotated[Text, Allowed("a run's folder, or .ckpt file")]
    pretrain_method: Annotated[Any, Allowed("a method's name")] = about("for the record", None)
    masked: bool | None = about("features of MetaMask; null: masked where there is a mask", None)
    finetune: Switch = about("train the backbone too", False)
    auto_augment: Switch = about("timm's RandAugment", False)
    label_smoothing: Defaulted[Rate] = about("GitHub main only, as the next two", 0)
    mixup: Defaulted[Rate] = 0
    cutmix: Defaulted[Rate] = 0
