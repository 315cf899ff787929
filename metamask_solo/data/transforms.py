"""Transforms of evaluation, probes and fine-tuning, as a run's config says."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.functional import center_crop

from metamask_solo.errors import UserError
from metamask_solo.hosts import CLASSES, dataset_transforms

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# what solo-learn's own transforms of a data set make of an image
DEFAULT_SIZES = {"cifar10": 32, "cifar100": 32, "stl10": 96}
DEFAULT_SIZE = 224  # of any other
IMAGENETS = ("imagenet", "imagenet100")
# up to this size an image is scaled to the crop itself, above it in the proportion of 256 to 224
LARGEST_WHOLE = 96
LONGEST_STRIP = 16  # long side over short side
PROBE = "data.augmentations"  # where the config of a probe has its settings
TRAINING_KEYS = ("crop_min_scale", "horizontal_flip")
READING_KEYS = ("background", "exif_orientation")


class ImageSettings(NamedTuple):
    """What the transforms of an evaluation, a probe or fine-tuning need to know."""

    size: int  # height and width in pixels
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_min_scale: float  # least part of a training image that a random crop takes
    horizontal_flip: float  # probability of it in training
    interpolation: str  # of evaluation; solo-learn's own is bilinear for ImageNet

    def __str__(self) -> str:
        mean, std = (" ".join(f"{x:.4g}" for x in part) for part in (self.mean, self.std))
        return (
            f"{self.size} x {self.size} pixels, mean {mean}, std {std}; training crops from "
            f"{self.crop_min_scale:g} of the area, flipped with chance {self.horizontal_flip:g}"
        )

    @property
    def shorter_side(self) -> int:
        """What evaluation scales the shorter side to, in pixels, before the crop."""
        return self.size if self.size <= LARGEST_WHOLE else round(self.size * 256 / 224)


def image_settings(cfg: DictConfig) -> ImageSettings:
    """The settings of a pretraining config, or of a probe's that is complete.

    A built-in data set keeps its own mean and standard deviation, as in solo-learn; of the size,
    what the config says counts for all.

    Raises:
        UserError: solo-learn does not have the data set.
    """
    dataset = cfg.data.dataset
    if dataset not in (known := ("custom", *CLASSES)):
        raise UserError(f"data.dataset={dataset}: must be one of {', '.join(known)}")
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if dataset != "custom":
        normalize: Any = dataset_transforms(dataset)[1].transforms[-1]  # type: ignore[attr-defined]
        mean, std = normalize.mean, normalize.std
    else:
        mean, std = _setting(cfg, "mean", mean), _setting(cfg, "std", std)
    size = _setting(cfg, "crop_size", DEFAULT_SIZES.get(dataset, DEFAULT_SIZE))
    return ImageSettings(
        size=int(size),
        mean=tuple(float(x) for x in mean),
        std=tuple(float(x) for x in std),
        crop_min_scale=float(_setting(cfg, "crop_min_scale", 0.08, "rrc.crop_min_scale")),
        horizontal_flip=float(_setting(cfg, "horizontal_flip", 0.5, "horizontal_flip.prob")),
        interpolation="bilinear" if dataset in IMAGENETS else "bicubic",
    )


def _setting(cfg: DictConfig, key: str, default: Any, pretraining: str = "") -> Any:
    """A value of a probe's config, or of the first pipeline of a pretraining config."""
    keys = (f"{PROBE}.{key}", f"augmentations[0].{pretraining or key}")
    values = (OmegaConf.select(cfg, k, default=None) for k in keys)
    return next((value for value in values if value is not None), default)


def complete_image_settings(cfg: DictConfig, run: DictConfig | None) -> None:
    """Gives a probe's config what it does not say of images from the run that it probes.

    Args:
        cfg: config of a linear probe or fine-tuning; gets ``data.augmentations`` and the keys of
            reading.
        run: config of the pretraining run, or None where it has none.
    """
    known = cfg if run is None else run
    settings = image_settings(known)
    values: dict[str, Any] = {f"{PROBE}.crop_size": settings.size}
    if cfg.data.dataset == "custom":
        values |= {f"{PROBE}.mean": list(settings.mean), f"{PROBE}.std": list(settings.std)}
        values |= {f"{PROBE}.{k}": getattr(settings, k) for k in TRAINING_KEYS}
    values |= {
        f"data.{k}": OmegaConf.select(known, f"data.{k}", default=None) for k in READING_KEYS
    }
    for key, value in values.items():
        if value is not None and OmegaConf.select(cfg, key, default=None) is None:
            OmegaConf.update(cfg, key, value, force_add=True)


def shorten_strip(image: Image.Image) -> Image.Image:
    """Cuts the middle out of an image that is longer than 16 times its width.

    Scaled as a whole, an image of 2 × 20,000 pixels would take 2 GB; all but its middle is cropped
    away afterwards.
    """
    most = LONGEST_STRIP * min(image.size)
    if max(image.size) <= most:
        return image
    return center_crop(image, [min(image.height, most), min(image.width, most)])


def evaluation_transform(cfg: DictConfig) -> Callable[..., Tensor]:
    """The transform for evaluation: the crop size of the run, its mean and standard deviation.

    The shorter side becomes the crop size, above 96 pixels more in the usual proportion of 256 to
    224, and the centre is taken. At the sizes that solo-learn's own transforms of the built-in data
    sets have, this gives the same numbers as they.
    """
    settings = image_settings(cfg)
    return transforms.Compose(
        [
            shorten_strip,
            transforms.Resize(
                settings.shorter_side, transforms.InterpolationMode(settings.interpolation)
            ),
            transforms.CenterCrop(settings.size),
            transforms.ToTensor(),
            transforms.Normalize(settings.mean, settings.std),
        ]
    )


def timm_image_config(cfg: DictConfig) -> dict[str, Any]:
    """:func:`evaluation_transform` in the words of timm's ``pretrained_cfg``."""
    settings = image_settings(cfg)
    part = settings.size / settings.shorter_side
    if math.floor(settings.size / part) < settings.shorter_side:  # as timm computes it back
        part = math.nextafter(part, 0)
    return {
        "input_size": [3, settings.size, settings.size],
        "interpolation": settings.interpolation,
        "crop_pct": part,
        "crop_mode": "center",
        "mean": list(settings.mean),
        "std": list(settings.std),
    }


def linear_training_transform(cfg: DictConfig) -> Callable[..., Tensor]:
    """The transform that trains a linear probe: random crop, and a flip where the data allow it.

    ``data.augmentations`` may set ``crop_min_scale`` (default 0.08) and ``horizontal_flip``
    (probability, default 0.5).
    """
    settings = image_settings(cfg)
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(settings.size, scale=(settings.crop_min_scale, 1.0)),
            transforms.RandomHorizontalFlip(settings.horizontal_flip),
            transforms.ToTensor(),
            transforms.Normalize(settings.mean, settings.std),
        ]
    )
