"""From images to features: evaluation transforms, loaders, and one pass over a data set."""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from metamask_solo.errors import UserError
from metamask_solo.hosts import classification_datasets, dataset_transforms

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _image_settings(cfg: DictConfig) -> tuple[int, Any, Any]:
    """Crop size, mean and standard deviation, from a pretraining or a linear config."""

    def value(key: str, default: Any) -> Any:
        pretraining = OmegaConf.select(cfg, f"augmentations[0].{key}", default=default)
        return OmegaConf.select(cfg, f"data.augmentations.{key}", default=pretraining)

    return value("crop_size", 224), value("mean", IMAGENET_MEAN), value("std", IMAGENET_STD)


def evaluation_transform(cfg: DictConfig) -> Callable[..., Tensor]:
    """The transform for evaluation: solo-learn's own for its built-in data sets.

    For custom data, solo-learn always makes 224 × 224 images; here they have the crop size, mean
    and standard deviation of the run. Above 96 pixels a larger image is resized, and its centre
    taken, in the usual proportion of 256 to 224.
    """
    if cfg.data.dataset != "custom":
        return dataset_transforms(cfg.data.dataset)[1]
    size, mean, std = _image_settings(cfg)
    resized = size if size <= 96 else round(size * 256 / 224)
    return transforms.Compose(
        [
            transforms.Resize(resized, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )


def linear_training_transform(cfg: DictConfig) -> Callable[..., Tensor]:
    """The transform that trains a linear probe: random crop, and a flip where the data allow it.

    For custom data ``data.augmentations`` may set ``crop_min_scale`` (default 0.08) and
    ``horizontal_flip`` (probability, default 0.5).
    """
    if cfg.data.dataset != "custom":
        return dataset_transforms(cfg.data.dataset)[0]
    size, mean, std = _image_settings(cfg)
    least = OmegaConf.select(cfg, "data.augmentations.crop_min_scale", default=0.08)
    flip = OmegaConf.select(cfg, "data.augmentations.horizontal_flip", default=0.5)
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(least, 1.0)),
            transforms.RandomHorizontalFlip(flip),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )


def image_loader(
    folder: str | Path,
    cfg: DictConfig | None = None,
    batch_size: int = 256,
    num_workers: int = 0,
    limit: int | None = None,
    seed: int = 0,
) -> DataLoader[Any]:
    """A loader of a tree of class folders, with the evaluation transform of a run's config.

    Args:
        folder: holds one folder of images for each class.
        cfg: config of the run, or None for the images as they are, scaled to 0..1.
        limit: at most this many images, drawn by ``seed``; None for all.

    Raises:
        UserError: the folder is missing, or a class folder is empty.
    """
    check_class_folders(folder, "data")
    transform = transforms.ToTensor() if cfg is None else evaluation_transform(cfg)
    dataset: Any = ReadableImages(ImageFolder(str(folder), transform))
    if limit is not None and limit < len(dataset):
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
        dataset = Subset(dataset, sorted(order[:limit].tolist()))
    return DataLoader(dataset, batch_size=batch_size, num_workers=num_workers)


class ReadableImages(Dataset[Any]):
    """A data set that names the image that cannot be read, with the ImageFolder's attributes.

    Args:
        dataset: torchvision's ImageFolder, solo-learn's folder without labels, or any other.
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset
        for name in ("classes", "samples"):
            if hasattr(dataset, name):
                setattr(self, name, getattr(dataset, name))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        # all that Pillow raises for missing and for damaged files
        except (
            OSError,
            SyntaxError,
            ValueError,
            zlib.error,
            Image.DecompressionBombError,
        ) as error:
            raise UserError(f"{self._name(index)}: cannot be read ({error})") from error

    def _name(self, index: int) -> str:
        if hasattr(self.dataset, "samples"):
            return str(self.dataset.samples[index][0])
        if hasattr(self.dataset, "images"):
            return str(Path(self.dataset.root) / self.dataset.images[index])
        return f"image {index}"


def check_class_folders(folder: str | Path, key: str) -> None:
    """Refuses a data folder that torchvision could not read, before anything is built."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{key}={folder}: no such folder")
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    if not classes:
        raise UserError(f"{key}={folder}: holds no class folder")
    for entry in classes:
        if not any(file.is_file() for file in entry.rglob("*")):
            raise UserError(f"{key}={folder}: class folder {entry.name} is empty")


SPLITS = ("train", "val")


def split_loader(
    split: str,
    config: DictConfig,
    data: str | Path | None = None,
    batch_size: int = 256,
    num_workers: int = 0,
    limit: int | None = None,
    seed: int = 0,
) -> DataLoader[Any]:
    """The images of one split, with the evaluation transform of a run's config.

    Args:
        split: ``train`` or ``val``.
        config: config of the run.
        data: folder that holds train/ and val/ with class folders; None for the data of the run.
        limit: at most this many images, drawn by ``seed``; None for all.

    Raises:
        UserError: the data are missing or cannot be read.
    """
    own = config.data
    if data is not None:
        return image_loader(Path(data) / split, config, batch_size, num_workers, limit, seed)
    folder = own.get(f"{split}_path")
    if folder is None:
        raise UserError(f"data.{split}_path: missing in the run's args.json; give --data FOLDER")
    if own.dataset == "custom" and own.get("format") in (None, "image_folder"):
        if not Path(folder).is_dir():
            raise UserError(f"data.{split}_path={folder}: no such folder; give --data FOLDER")
        return image_loader(folder, config, batch_size, num_workers, limit, seed)
    dataset = _datasets_of_run(config)[SPLITS.index(split)]
    if limit is not None and limit < len(dataset):
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
        dataset = Subset(dataset, sorted(order[:limit].tolist()))
    return DataLoader(dataset, batch_size=batch_size, num_workers=num_workers)


def _datasets_of_run(config: DictConfig) -> tuple[Any, Any]:
    """Both splits of what solo-learn reads in a way of its own: CIFAR, STL-10, ImageNet, h5."""
    config = config.copy()
    OmegaConf.update(config, "data.fraction", -1, force_add=True)  # all images, as main_knn.py
    transform = evaluation_transform(config)
    try:
        return classification_datasets(config, transform, transform)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"data.train_path={config.data.train_path}, data.val_path={config.data.val_path}: "
            f"cannot be read as {config.data.dataset} ({reason}); give --data FOLDER"
        ) from error


def class_names(loader: DataLoader[Any]) -> list[str]:
    """The names of the classes in the order of their labels; empty where the data have none."""
    dataset: Any = loader.dataset
    if isinstance(dataset, Subset):
        dataset = dataset.dataset
    return [str(name) for name in getattr(dataset, "classes", [])]
