"""Images with or without labels, for what needs no labels: every image of a folder is taken."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch.utils.data import DataLoader, Subset

from metamask_solo.data.datasets import is_folder
from metamask_solo.data.images import SPLITS, image_loader, split_loader
from metamask_solo.data.splitting import images_below
from metamask_solo.errors import UserError

NO_LABEL = -1


def holds_classes(folder: Path) -> bool:
    """Whether a folder holds folders with images, rather than images alone."""
    entries = [e for e in folder.iterdir() if e.is_dir() and not e.name.startswith(".")]
    return any(images_below(entry) for entry in entries)


def folder_loader(
    folder: str | Path,
    config: DictConfig,
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


def any_split_loader(
    split: str,
    config: DictConfig,
    data: str | Path | None = None,
    batch_size: int = 256,
    num_workers: int = 0,
    limit: int | None = None,
    seed: int = 0,
) -> DataLoader[Any]:
    """As :func:`metamask_solo.data.images.split_loader`, but labels may be missing.

    A run without validation images gives its training images for ``val`` too.
    """
    own = config.data
    options = (batch_size, num_workers, limit, seed)
    if data is not None:
        inner = Path(data) / split
        return folder_loader(inner if inner.is_dir() else data, config, *options)
    if not is_folder(config):
        return split_loader(split, config, None, *options)
    key = f"data.{split}_path"
    folder = own.get(f"{split}_path") or own.get("train_path")
    if not Path(folder).is_dir():
        raise UserError(f"{key}={folder}: no such folder; give --data FOLDER")
    labels = False if own.get("no_labels", False) else None
    return folder_loader(folder, config, *options, labels=labels, key=key)


def sample_names(loader: DataLoader[Any]) -> list[str]:
    """The file of each image, in the order of the loader; its number where there is no file."""
    dataset: Any = loader.dataset
    chosen = range(len(dataset))
    if isinstance(dataset, Subset):
        dataset, chosen = dataset.dataset, dataset.indices  # type: ignore[assignment]
    samples = getattr(dataset, "samples", None)
    return [str(samples[i][0]) if samples is not None else str(i) for i in chosen]


def is_labelled(labels: torch.Tensor) -> bool:
    """Whether labels are more than the −1 of images that have none."""
    return bool((labels != NO_LABEL).all())
