"""What a run's config may hold: types, ranges, defaults and meanings, for checks and help alike.

A config is checked against these models and stays as it is: solo-learn fills in the defaults.
Which keys may stand beside these is for config_keys.py to say, what two settings are to each other
for config_checks.py. Nothing heavy is imported, since ``--help`` reads this.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field

from metamask_solo.training.trainer_arguments import TrainerArguments
from metamask_solo.validation import Allowed, Defaulted, Number, Settings, Text

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


class Section(Settings):
    """A part of a config; of other keys config_keys.py knows whether they are read."""

    model_config = ConfigDict(extra="ignore")


class Backbone(Section):
    """``backbone``."""

    name: Annotated[Text, Allowed("a name of solo-learn's")] = Field(
        description="such as resnet18 or vit_tiny"
    )
    stem: Literal["3x3", "standard"] | None = Field(
        None, description="of a ResNet; null: 3x3 for CIFAR, else standard"
    )
    kwargs: Annotated[Whole, Allowed("a mapping of what the backbone takes")] = Field(
        {}, description="such as img_size of a ViT"
    )


class Data(Section):
    """``data`` of pretraining."""

    dataset: Literal["cifar10", "cifar100", "stl10", "imagenet", "imagenet100", "custom"]
    train_path: Folder = Field(description="class folders, or torchvision's files")
    val_path: Folder | None = Field(None, description="the same for validation; a probe needs it")
    format: Annotated[
        Defaulted[Literal["image_folder"]],
        Allowed("image_folder; h5 and dali are read by solo-learn's own scripts only"),
    ] = "image_folder"
    num_workers: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        4, description="processes that read images"
    )
    persistent_workers: Switch = Field(True, description="keep them from epoch to epoch")
    fraction: Defaulted[
        Annotated[
            Number,
            AfterValidator(_fraction),
            Allowed("a number above 0 and below 1, or -1 for all images"),
        ]
    ] = Field(-1, description="part of the training images")
    no_labels: Switch = Field(False, description="pretrain on all images below train_path")
    background: Annotated[Any, Allowed("a colour such as white, '#ff8000' or [255, 128, 0]")] = (
        Field("white", description="what is behind transparent pixels")
    )
    exif_orientation: Switch = Field(False, description="turn images as their camera says")


class Optimizer(Section):
    """``optimizer``."""

    name: Literal["sgd", "lars", "adam", "adamw"]
    batch_size: int = Field(ge=2, description="of one process")
    lr: Rate = Field(description=f"learning rate, {SCALED}")
    weight_decay: Rate
    exclude_bias_n_norm_wd: Switch = Field(False, description="no decay of biases and norms")
    kwargs: Annotated[Whole, Allowed("a mapping of what the optimiser takes")] = Field(
        {}, description="momentum, eta, betas, …"
    )


class Scheduler(Section):
    """``scheduler`` of a probe."""

    name: Literal["none", "warmup_cosine", "cosine", "step", "reduce"]
    warmup_epochs: Defaulted[Rate] = 10
    warmup_start_lr: Defaulted[Rate] = 3e-5
    min_lr: Defaulted[Rate] = Field(0, description="at the end of the cosine")
    lr_decay_steps: Annotated[list[int], Allowed("a list of epochs")] | None = Field(
        None, description="with step: times 0.1 at each"
    )
    interval: Annotated[Defaulted[Literal["step", "epoch"]], Allowed("step or epoch")] = Field(
        "step", description="how often the rate changes"
    )


class Checkpoint(Section):
    """``checkpoint``."""

    enabled: Switch = Field(False, description="the files have it on")
    dir: Defaulted[Folder] = Field("trained_models", description="gets METHOD/RUN, or linear/RUN")
    frequency: int = Field(1, ge=1, description="epochs from one to the next")
    keep_prev: Switch = Field(False, description="keep the earlier ones")


class AutoResume(Section):
    """``auto_resume``."""

    enabled: Switch = Field(False, description="continue a stopped run of the same config")
    max_hours: int = Field(36, ge=1, description="its age at most")


class Wandb(Section):
    """``wandb``."""

    enabled: Switch = Field(False, description="log to Weights & Biases")
    entity: Text | None = None
    project: Defaulted[Text] = "solo-learn"
    offline: Switch = False


class Performance(Section):
    """``performance``."""

    disable_channel_last: Switch = Field(False, description="GitHub main only")
    compile: Switch = Field(False, description="torch.compile of the backbone")


class Run(TrainerArguments):
    """What pretraining and probes share."""

    name: Text = Field(description="of the run; a stopped run is found again by it")
    seed: int = Field(5, ge=0, lt=2**32, description="of weights, order and augmentations")
    resume_from_checkpoint: Annotated[Text | None, Allowed("a .ckpt file")] = Field(
        None, description="to go on from, in a run of its own"
    )
    started_from: Annotated[Any, Allowed("set by the command")] = Field(
        None, description="identity of the checkpoint that a run began at"
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
    """``optimizer`` of pretraining."""

    classifier_lr: Rate | None = Field(
        None, description=f"of the online classifier, {SCALED}; needed with data.val_path"
    )


class PretrainScheduler(Scheduler):
    """``scheduler`` of pretraining."""

    name: Literal["none", "warmup_cosine", "cosine", "step"]


class Momentum(Section):
    """``momentum``: of the teacher of BYOL and its like."""

    base_tau: Defaulted[Probability] = Field(
        0.99, description="BYOL and its like: of the teacher, at the start"
    )
    final_tau: Defaulted[Probability] = Field(1, description="and at the end")
    classifier: Switch = Field(False, description="a classifier on the teacher too")


class KnnEval(Section):
    """``knn_eval``."""

    enabled: Switch = Field(False, description="online kNN at each validation")
    k: int = Field(20, ge=1, description="its neighbours")
    distance_func: Defaulted[Literal["cosine", "euclidean"]] = Field(
        "euclidean", description="the files have cosine"
    )


class Crop(Section):
    """``rrc`` of a pipeline."""

    enabled: bool = Field(description="random resized crop")
    crop_min_scale: Defaulted[Probability] = Field(0.08, description="least part of the area")
    crop_max_scale: Defaulted[Probability] = 1


class Prob(Section):
    """A part of a pipeline that has nothing but a probability."""

    prob: Probability


class ColorJitter(Prob):
    """``color_jitter`` of a pipeline."""

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
    crop_size: int = Field(ge=1, le=10_000, description="pixels")
    num_crops: int = Field(ge=1, le=10_000, description="MetaMask: 2 in all")
    mean: Three | None = Field(None, description="custom data only; null: ImageNet's")
    std: ThreePositive | None = Field(None, description="custom data only; null: ImageNet's")


class Pretraining(Run):
    """A config of ``metamask-solo pretrain``."""

    optimizer: PretrainOptimizer
    scheduler: PretrainScheduler
    method: Annotated[Text, Allowed("a method of solo-learn's, or metamask")]
    method_kwargs: Annotated[Whole, Allowed("a mapping of the method's own settings")] = Field(
        {}, description="MetaMask's stand below"
    )
    fold_at_end: Switch = Field(True, description="write MetaMask's folded checkpoint too")
    momentum: Momentum
    knn_eval: KnnEval
    augmentations: Annotated[
        list[Pipeline], Field(min_length=1), Allowed("a list of augmentation pipelines")
    ] = Field(description="or a file's name: augmentations=small")


class ProbeAugmentations(Section):
    """``data.augmentations`` of a probe; null: those of the run."""

    crop_size: int | None = Field(None, ge=1, description="pixels; null: the run's, as the next")
    mean: Three | None = None
    std: ThreePositive | None = None
    crop_min_scale: Probability | None = Field(None, description="least part of a random crop")
    horizontal_flip: Probability | None = Field(None, description="probability")


class ProbeData(Data):
    """``data`` of a probe."""

    val_path: Folder = Field(description="the same for validation")
    augmentations: ProbeAugmentations


class ProbeOptimizer(Optimizer):
    """``optimizer`` of a probe."""

    layer_decay: Defaulted[Probability] = Field(0, description="GitHub main only, of a ViT")


class Probe(Run):
    """A config of ``metamask-solo linear`` or ``finetune``."""

    data: ProbeData
    optimizer: ProbeOptimizer
    pretrained_feature_extractor: Annotated[Text, Allowed("a run's folder, or .ckpt file")]
    pretrain_method: Annotated[Any, Allowed("a method's name")] = Field(
        None, description="for the record"
    )
    masked: bool | None = Field(
        None, description="features of MetaMask; null: masked where there is a mask"
    )
    finetune: Switch = Field(False, description="train the backbone too")
    auto_augment: Switch = Field(False, description="timm's RandAugment")
    label_smoothing: Defaulted[Rate] = Field(0, description="GitHub main only, as the next two")
    mixup: Defaulted[Rate] = 0
    cutmix: Defaulted[Rate] = 0
