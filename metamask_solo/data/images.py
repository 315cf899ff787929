"""From images to batches: transforms as a run's config says, loaders, and their messages."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms

from metamask_solo.data.datasets import classification_dataset, is_folder
from metamask_solo.data.folders import find_images, say_left_out
from metamask_solo.data.reading import reading_rule, shown
from metamask_solo.data.seeds import generator_of
from metamask_solo.data.sources import FolderSource, Images
from metamask_solo.data.unlabelled import holds_classes
from metamask_solo.errors import UserError
from metamask_solo.hosts import dataset_transforms

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# what solo-learn's own transforms of a data set make of an image
DEFAULT_SIZES = {"cifar10": 32, "cifar100": 32, "stl10": 96}
# main_linear.py writes this size into args.json for them as well, and does not use it
FILLED_IN = 224
IMAGENETS = ("imagenet", "imagenet100")
# up to this size an image is scaled to the crop itself, above it in the proportion of 256 to 224
LARGEST_WHOLE = 96
PROBE = "data.augmentations"  # where the config of a probe has its settings
READING_KEYS = ("background", "exif_orientation")
SPLITS = ("train", "val")


@dataclass(frozen=True)
class ImageSettings:
    """What the transforms of an evaluation, a probe or fine-tuning need to know.

    Attributes:
        size: height and width in pixels.
        mean: of each channel.
        std: of each channel.
        crop_min_scale: least part of a training image that a random crop takes.
        horizontal_flip: probability of it in training.
        bicubic: how validation images are scaled; solo-learn's ImageNet transform is bilinear.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_min_scale: float
    horizontal_flip: float
    bicubic: bool

    def __str__(self) -> str:
        mean, std = (" ".join(f"{x:.4g}" for x in part) for part in (self.mean, self.std))
        return (
            f"{self.size} x {self.size} pixels, mean {mean}, std {std}; training crops from "
            f"{self.crop_min_scale:g} of the area, flipped with chance {self.horizontal_flip:g}"
        )


def image_settings(cfg: DictConfig) -> ImageSettings:
    """The settings of a pretraining config, or of a probe's that is complete.

    A built-in data set keeps its own mean and standard deviation, as in solo-learn; of the size,
    what the config says counts for all.
    """
    dataset = cfg.data.dataset
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if dataset != "custom":
        normalize: Any = dataset_transforms(dataset)[1].transforms[-1]  # type: ignore[attr-defined]
        mean, std = normalize.mean, normalize.std
    else:
        mean, std = _setting(cfg, "mean", mean), _setting(cfg, "std", std)
    size = _setting(cfg, "crop_size", DEFAULT_SIZES.get(dataset, 224))
    probed = OmegaConf.select(cfg, f"{PROBE}.crop_size", default=None)
    if dataset in DEFAULT_SIZES and probed == FILLED_IN:
        size = DEFAULT_SIZES[dataset]
    return ImageSettings(
        size=int(size),
        mean=tuple(float(x) for x in mean),
        std=tuple(float(x) for x in std),
        crop_min_scale=float(OmegaConf.select(cfg, f"{PROBE}.crop_min_scale", default=0.08)),
        horizontal_flip=float(OmegaConf.select(cfg, f"{PROBE}.horizontal_flip", default=0.5)),
        bicubic=dataset not in IMAGENETS,
    )


def _setting(cfg: DictConfig, key: str, default: Any) -> Any:
    """A value of a probe's config, or of the first pipeline of a pretraining config."""
    pretraining = OmegaConf.select(cfg, f"augmentations[0].{key}", default=default)
    value = OmegaConf.select(cfg, f"{PROBE}.{key}", default=pretraining)
    return default if value is None else value


def complete_image_settings(cfg: DictConfig, run: DictConfig | None) -> None:
    """Gives a probe's config what it does not say of images from the run that it probes.

    Args:
        cfg: config of a linear probe or fine-tuning; gets ``data.augmentations`` and the keys of
            reading.
        run: config of the pretraining run, or None where it has none.
    """
    found: dict[str, Any] = {}
    if run is not None:
        own = image_settings(run)
        found = {"crop_size": own.size}
        if cfg.data.dataset == "custom":
            found |= {"mean": list(own.mean), "std": list(own.std)}
            scale = OmegaConf.select(run, "augmentations[0].rrc.crop_min_scale", default=None)
            flip = OmegaConf.select(run, "augmentations[0].horizontal_flip.prob", default=None)
            probed = OmegaConf.select(run, PROBE, default=None)  # itself fine-tuned
            found["crop_min_scale"] = own.crop_min_scale if probed or scale is None else scale
            found["horizontal_flip"] = own.horizontal_flip if probed or flip is None else flip
        for key in READING_KEYS:
            value = OmegaConf.select(run, f"data.{key}", default=None)
            if value is not None and OmegaConf.select(cfg, f"data.{key}", default=None) is None:
                OmegaConf.update(cfg, f"data.{key}", value, force_add=True)
    for key, value in found.items():
        if OmegaConf.select(cfg, f"{PROBE}.{key}", default=None) is None:
            OmegaConf.update(cfg, f"{PROBE}.{key}", value, force_add=True)


def evaluation_transform(cfg: DictConfig) -> Callable[..., Tensor]:
    """The transform for evaluation: the crop size of the run, its mean and standard deviation.

    The shorter side becomes the crop size, above 96 pixels more in the usual proportion of 256 to
    224, and the centre is taken. At the sizes that solo-learn's own transforms of the built-in data
    sets have, this gives the same numbers as they.
    """
    settings = image_settings(cfg)
    size = settings.size
    bicubic, bilinear = transforms.InterpolationMode.BICUBIC, transforms.InterpolationMode.BILINEAR
    return transforms.Compose(
        [
            transforms.Resize(
                size if size <= LARGEST_WHOLE else round(size * 256 / 224),
                interpolation=bicubic if settings.bicubic else bilinear,
            ),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(settings.mean, settings.std),
        ]
    )


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


def image_loader(
    folder: str | Path,
    cfg: DictConfig | None = None,
    batch_size: int = 256,
    num_workers: int = 0,
    limit: int | None = None,
    seed: int = 0,
    key: str = "data",
    labels: bool = True,
) -> DataLoader[Any]:
    """A loader of a tree of class folders, with the evaluation transform of a run's config.

    Args:
        folder: holds one folder of images for each class.
        cfg: config of the run, or None for the images as they are, scaled to 0..1.
        limit: at most this many images, drawn by ``seed``; None for all.
        key: the option that names the folder, for messages.
        labels: False for all images at any depth, with the label −1.

    Raises:
        UserError: the folder is missing, or a class folder is empty.
    """
    found = find_images(folder, key, labels)
    say_left_out(found, folder, key)
    transform = transforms.ToTensor() if cfg is None else evaluation_transform(cfg)
    dataset = Images(FolderSource(found, reading_rule(cfg)), transform)
    return plain_loader(_limited(dataset, limit, seed), batch_size, num_workers)


def plain_loader(dataset: Dataset[Any], batch_size: int, num_workers: int) -> DataLoader[Any]:
    """A loader in the order of the data set; draws nothing from the process's random numbers."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        generator=generator_of(0),
    )


def _limited(dataset: Images, limit: int | None, seed: int) -> Dataset[Any]:
    if limit is None or limit >= len(dataset):
        return dataset
    order = torch.randperm(len(dataset), generator=generator_of(seed))
    return Subset(dataset, sorted(order[:limit].tolist()))


def folder_loader(
    folder: str | Path,
    config: DictConfig | None,
    batch_size: int = 256,
    num_workers: int = 0,
    limit: int | None = None,
    seed: int = 0,
    labels: bool | None = None,
    key: str = "--data",
) -> DataLoader[Any]:
    """The images of one folder, with the evaluation transform of a run's config.

    Args:
        folder: class folders, or images without labels.
        limit: at most this many images, drawn by ``seed``; None for all.
        labels: False for −1 whatever the folder holds; None for labels if it has class folders.
        key: the option that names the folder, for messages.

    Raises:
        UserError: there is no such folder, it holds no images, or it holds train/ and val/.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{key}={folder}: no such folder")
    if all((folder / split).is_dir() for split in SPLITS):
        raise UserError(f"{key}={folder}: holds train/ and val/; give one of them")
    if labels is None:
        labels = holds_classes(folder)
    return image_loader(folder, config, batch_size, num_workers, limit, seed, key, labels)


def split_loader(
    split: str,
    config: DictConfig | None,
    data: str | Path | None = None,
    batch_size: int = 256,
    num_workers: int = 0,
    limit: int | None = None,
    seed: int = 0,
    labelled: bool = True,
) -> DataLoader[Any]:
    """The images of one split, with the evaluation transform of a run's config.

    Args:
        split: ``train`` or ``val``.
        config: config of the run; with ``data`` None for the images as they are.
        data: folder that holds train/ and val/ with class folders; None for the data of the run.
        limit: at most this many images, drawn by ``seed``; None for all.
        labelled: False where labels may be missing: ``data`` may then be images, and a run without
            validation images gives its training images for ``val`` too.

    Raises:
        UserError: the data are missing or cannot be read.
    """
    options = (batch_size, num_workers, limit, seed)
    if data is not None:
        inner = Path(data) / split
        if labelled:
            return image_loader(inner, config, *options, f"--data, {split}")
        return folder_loader(inner if inner.is_dir() else data, config, *options)
    assert config is not None  # the caller's, whose data are asked for
    key, own = f"data.{split}_path", config.data
    folder = own.get(f"{split}_path")
    if folder is None and not labelled and is_folder(config):
        folder = own.get("train_path")
    if folder is None:
        raise UserError(f"{key}: missing in the run's args.json; give --data FOLDER")
    if is_folder(config):
        if not Path(folder).is_dir():
            raise UserError(f"{key}={shown(folder)}: no such folder; give --data FOLDER")
        if labelled:
            return image_loader(folder, config, *options, key)
        labels = False if own.get("no_labels", False) else None
        return folder_loader(folder, config, *options, labels, key)
    try:
        # all images, as main_knn.py
        dataset = classification_dataset(config, split, evaluation_transform(config), whole=True)
    except UserError as error:
        raise UserError(f"{error}; give --data FOLDER") from error
    return plain_loader(_limited(dataset, limit, seed), batch_size, num_workers)


def class_names(loader: DataLoader[Any]) -> list[str]:
    """The names of the classes in the order of their labels; empty where the data have none."""
    dataset: Any = loader.dataset
    if isinstance(dataset, Subset):
        dataset = dataset.dataset
    return [shown(name) for name in getattr(dataset, "classes", [])]


def loader_failure(error: RuntimeError) -> UserError | None:
    """One line for a loader's worker that the system ended, or for images of different sizes.

    Returns:
        None where the error is another one.
    """
    text = str(error)
    if "DataLoader worker" in text and ("killed" in text or "exited unexpectedly" in text):
        return UserError(
            "data.num_workers: a process that reads images was ended from outside (often for want "
            "of memory, or of shared memory in /dev/shm); fewer workers, or 0, may help"
        )
    if "stack expects each tensor to be equal size" in text:
        return UserError("data: the images of a batch have different sizes after the transform")
    return None
