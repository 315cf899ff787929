"""The data sets of a config, built alike on both releases of solo-learn."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torchvision
from omegaconf import DictConfig, OmegaConf
from sklearn.model_selection import train_test_split

from metamask_solo.data.folders import (
    check_any_image,
    check_class_folders,
    check_same_classes,
    class_folders,
    find_images,
    say_doubtful,
    say_left_out,
)
from metamask_solo.data.reading import reading_rule, shown
from metamask_solo.data.sources import FolderSource, Images, PackedSource
from metamask_solo.errors import UserError
from metamask_solo.hosts import CLASSES, pretrain_transform

FOLDER_DATASETS = ("custom", "imagenet", "imagenet100")
FORMAT = "image_folder"
TITLES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "stl10": "STL-10"}
# torchvision's class, and its arguments for the images of each purpose
PACKED: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "cifar10": (
        "CIFAR10",
        {"pretrain": {"train": True}, "train": {"train": True}, "val": {"train": False}},
    ),
    "cifar100": (
        "CIFAR100",
        {"pretrain": {"train": True}, "train": {"train": True}, "val": {"train": False}},
    ),
    "stl10": (
        "STL10",
        {
            "pretrain": {"split": "train+unlabeled"},
            "train": {"split": "train"},
            "val": {"split": "test"},
        },
    ),
}


def is_folder(cfg: DictConfig) -> bool:
    """Whether a config's data are folders of images."""
    given = OmegaConf.select(cfg, "data.format", default=None)
    return cfg.data.dataset in FOLDER_DATASETS and given in (None, FORMAT)


def pretrain_dataset(cfg: DictConfig) -> Images:
    """The training data of pretraining: items are (index, views, label).

    Raises:
        UserError: the data are missing or cannot be read.
    """
    source = _source(cfg, "train", "pretrain", labels=not _no_labels(cfg))
    return Images(source, pretrain_transform(cfg), True, _fraction(cfg, source))


def classification_datasets(
    cfg: DictConfig, train_transform: Callable[..., Any], val_transform: Callable[..., Any]
) -> tuple[Images, Images]:
    """Labelled training and validation data: items are (image, label).

    Raises:
        UserError: the data are missing or cannot be read.
    """
    return (
        classification_dataset(cfg, "train", train_transform),
        classification_dataset(cfg, "val", val_transform),
    )


def classification_dataset(
    cfg: DictConfig, split: str, transform: Callable[..., Any], whole: bool = False
) -> Images:
    """One split of :func:`classification_datasets`.

    Args:
        split: ``train`` or ``val``.
        whole: all training images, whatever ``data.fraction`` says.
    """
    source = _source(cfg, split, split)
    chosen = _fraction(cfg, source) if split == "train" and not whole else None
    return Images(source, transform, chosen=chosen)


def check_folders(cfg: DictConfig, labels: bool = True) -> None:
    """Refuses image folders that cannot be used, before anything is built.

    Args:
        labels: False where the training images have none.
    """
    if OmegaConf.select(cfg, "data.format", default=None) not in (None, FORMAT):
        raise _unknown_format(cfg)
    reading_rule(cfg)
    if not is_folder(cfg):
        return
    train, val = cfg.data.train_path, OmegaConf.select(cfg, "data.val_path", default=None)
    if labels:
        check_class_folders(train, "data.train_path")
    else:
        check_any_image(train, "data.train_path")
    if val is not None:
        check_class_folders(val, "data.val_path")
        if labels:
            check_same_classes(train, val, "data.train_path", "data.val_path")
    most = CLASSES.get(cfg.data.dataset)
    if labels and most is not None and len(class_folders(train, "data.train_path")) > most:
        found = len(class_folders(train, "data.train_path"))
        raise UserError(
            f"data.train_path={shown(train)}: holds {found} class folders, but "
            f"data.dataset={cfg.data.dataset} has {most} classes"
        )


def _unknown_format(cfg: DictConfig) -> UserError:
    # GitHub main would read a name that it does not know as image folders, without a word
    return UserError(
        f"data.format={cfg.data.format}: must be {FORMAT}; h5 and dali are read by solo-learn's "
        "own scripts only"
    )


def count_classes(cfg: DictConfig) -> None:
    """Sets ``data.num_classes`` of custom data: solo-learn counts hidden folders too."""
    if cfg.data.dataset == "custom" and is_folder(cfg):
        few = 1
        if not _no_labels(cfg):
            few = len(class_folders(cfg.data.train_path, "data.train_path"))
        cfg.data.num_classes = few


def say_doubts(train: Any, val: Any) -> None:
    """Lines for a single class, and for validation images that are training images too."""
    if isinstance(getattr(train, "source", None), FolderSource):
        say_doubtful(train.classes, train.samples, getattr(val, "samples", []))


def _source(cfg: DictConfig, split: str, purpose: str, labels: bool = True) -> Any:
    key = f"data.{split}_path"
    path = str(OmegaConf.select(cfg, key, default=None) or "")
    if not path:
        raise UserError(f"{key}: missing; give it a value")
    if cfg.data.dataset in PACKED:
        return _packed(cfg.data.dataset, path, key, purpose)
    if is_folder(cfg):
        found = find_images(path, key, labels)
        say_left_out(found, path, key)
        return FolderSource(found, reading_rule(cfg))
    raise _unknown_format(cfg)


def _packed(name: str, path: str, key: str, purpose: str) -> PackedSource:
    kind, arguments = PACKED[name]
    title = TITLES[name]
    there = os.path.isdir(path)
    try:
        # looked up now, so that a replaced class is taken
        dataset = getattr(torchvision.datasets, kind)(path, download=True, **arguments[purpose])
    except Exception as error:  # network, disk, archive
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        state = f"holds no whole {title}" if there else "no such folder"
        raise UserError(
            f"{key}={shown(path)}: cannot be read as {name}: {state}, and it could not be "
            f"downloaded ({reason})"
        ) from error
    return PackedSource(dataset, f"{title} in {shown(Path(path))}")


def _no_labels(cfg: DictConfig) -> bool:
    return bool(OmegaConf.select(cfg, "data.no_labels", default=False))


def _fraction(cfg: DictConfig, source: Any) -> list[int] | None:
    """The images that ``data.fraction`` leaves: those that GitHub main's solo-learn takes."""
    fraction = OmegaConf.select(cfg, "data.fraction", default=-1)
    if fraction is None or fraction <= 0:
        return None
    if fraction >= 1:
        raise UserError(f"data.fraction={fraction}: must be above 0 and below 1, or -1 for all")
    labels = source.labels()
    strata = labels if len(set(labels)) > 1 else None
    try:
        chosen, _ = train_test_split(
            range(len(labels)), train_size=fraction, stratify=strata, random_state=42
        )
    except ValueError as error:
        raise UserError(f"data.fraction={fraction}: {error}") from error
    return list(chosen)
