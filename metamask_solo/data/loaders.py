"""The data sets and loaders of a config, built alike on both releases of solo-learn."""

import atexit
import multiprocessing
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torchvision
from omegaconf import DictConfig, OmegaConf
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader

from metamask_solo.data.datasets import (
    Images,
    check_folder,
    check_same_classes,
    overlap_notes,
    pair_notes,
    read_folder,
    say,
)
from metamask_solo.data.read_image import reading_rule
from metamask_solo.data.seeds import generator_of
from metamask_solo.errors import UserError
from metamask_solo.hosts import CLASSES, pretrain_transform
from metamask_solo.paths import as_text, user_path

FOLDER_DATASETS = ("custom", "imagenet", "imagenet100")
CIFAR = {"pretrain": {"train": True}, "train": {"train": True}, "val": {"train": False}}
STL10 = {"pretrain": "train+unlabeled", "train": "train", "val": "test"}
# the arguments of torchvision's classes for the images of each purpose
PACKED: dict[str, dict[str, dict[str, Any]]] = {
    "cifar10": CIFAR,
    "cifar100": CIFAR,
    "stl10": {purpose: {"split": split} for purpose, split in STL10.items()},
}


def is_folder(cfg: DictConfig) -> bool:
    """Whether a config's data are folders of images."""
    return cfg.data.dataset in FOLDER_DATASETS


def check_folders(cfg: DictConfig) -> None:
    """Refuses image folders that cannot be used, before anything is built."""
    reading_rule(cfg)
    if not is_folder(cfg):
        return
    classes = check_folder(cfg.data.train_path, "data.train_path", has_labels(cfg))
    if cfg.data.get("val_path") is not None:
        val_classes = check_folder(cfg.data.val_path, "data.val_path")
        if has_labels(cfg):
            check_same_classes(classes, val_classes)
    most = CLASSES.get(cfg.data.dataset, len(classes))
    if has_labels(cfg) and len(classes) > most:
        raise UserError(
            f"data.train_path={as_text(cfg.data.train_path)}: holds {len(classes)} class folders, "
            f"but data.dataset={cfg.data.dataset} has {most} classes"
        )


def count_classes(cfg: DictConfig) -> None:
    """Sets ``data.num_classes`` of custom data: solo-learn counts hidden folders too."""
    if cfg.data.dataset == "custom":
        classes = check_folder(cfg.data.train_path, "data.train_path", has_labels(cfg))
        cfg.data.num_classes = len(classes) if has_labels(cfg) else 1


def has_labels(cfg: DictConfig) -> bool:
    """Whether a run is to read labels."""
    return not cfg.data.get("no_labels", False)


def pretrain_dataset(cfg: DictConfig) -> Images:
    """The training data of pretraining: items are (index, views, label).

    Raises:
        UserError: the data are missing or cannot be read.
    """
    images = _fraction(cfg, images_of(cfg, "train", "pretrain", has_labels(cfg)))
    return replace(images, transform=pretrain_transform(cfg), with_index=True)


def classification_dataset(
    cfg: DictConfig, split: str, transform: Callable[..., Any], labels: bool = True
) -> Images:
    """Training or validation data: items are (image, label).

    Args:
        split: ``train`` or ``val``.
        labels: False for none: all of them are −1.

    Raises:
        UserError: the data are missing or cannot be read.
    """
    images = images_of(cfg, split, split, labels)
    return replace(_fraction(cfg, images) if split == "train" else images, transform=transform)


def classification_datasets(
    cfg: DictConfig,
    train_transform: Callable[..., Any],
    val_transform: Callable[..., Any],
    run_folder: str | Path | None = None,
) -> tuple[Images, Images]:
    """Training and validation data, compared as :func:`compare_splits` does."""
    train = classification_dataset(cfg, "train", train_transform)
    val = classification_dataset(cfg, "val", val_transform)
    return compare_splits(train, val, run_folder)


def ignore_signals(worker: int) -> None:
    """What a loader's worker does first: the run alone answers signals, and then ends its workers.

    A terminal, ``timeout``, Slurm and containers send signals to the workers too. If they ended,
    the run could not finish the step after which it saves.
    """
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


@atexit.register
def end_workers() -> None:
    """At exit, multiprocessing sends SIGTERM to its children, which these ignore, and waits."""
    if children := [child for child in multiprocessing.active_children() if child.daemon]:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would raise an error
    for child in children:
        child.terminate()
    for child in children:
        child.join(0.5)
        child.kill()


def plain_loader(dataset: Images, batch_size: int, num_workers: int) -> DataLoader[Any]:
    """A loader in the order of the data set; draws nothing from the process's random numbers."""
    return DataLoader(
        dataset,
        batch_size,
        num_workers=num_workers,
        generator=generator_of(0),
        worker_init_fn=ignore_signals,
    )


def compare_splits(
    train: Images, val: Images, run_folder: str | Path | None = None
) -> tuple[Images, Images]:
    """Says what is doubtful of training and validation images, and notes it in ``val.notes``.

    Args:
        run_folder: of the run whose backbone is judged by them, if any.

    Raises:
        UserError: the two have different classes.
    """
    check_same_classes(train.classes, val.classes)
    notes = pair_notes(train, val)
    if run_folder is not None:
        notes += overlap_notes(val, run_folder)
    say(*notes)
    val.notes = list(dict.fromkeys([*train.notes, *val.notes, *notes]))
    return train, val


def images_of(cfg: DictConfig, split: str, purpose: str, labels: bool | None = True) -> Images:
    """All images of a split, without a transform, from a folder or one of torchvision's data sets.

    Args:
        split: ``train`` or ``val``, the setting that names the folder.
        purpose: ``pretrain``, ``train`` or ``val``.
        labels: of a folder, see :func:`.datasets.read_folder`.

    Raises:
        UserError: the data are missing or cannot be read.
    """
    key, name = f"data.{split}_path", cfg.data.dataset
    path = cfg.data.get(f"{split}_path")
    if not path:
        raise UserError(f"{key}: missing")
    if is_folder(cfg):
        images = read_folder(path, key, labels, reading_rule(cfg))
        say(*images.notes)
        return replace(images, split=split)
    if name not in PACKED:
        known = ", ".join((*FOLDER_DATASETS, *PACKED))
        raise UserError(f"data.dataset={name}: must be one of {known}")
    folder = user_path(path)
    state = f"holds no whole {name}" if folder.is_dir() else "no such folder"
    try:
        # looked up now, so that a replaced class is taken
        source = getattr(torchvision.datasets, name.upper())
        source = source(str(folder), download=True, **PACKED[name][purpose])
    except Exception as error:  # network, disk, archive
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{key}={as_text(path)}: cannot be read as {name}: {state}, and it could not be "
            f"downloaded ({reason})"
        ) from error
    numbers = [int(label) for label in getattr(source, "targets", None) or source.labels]
    return Images(list(enumerate(numbers)), partial(_image, source), source.classes, split=split)


def _image(source: Any, number: int) -> Any:
    return source[number][0]


def _fraction(cfg: DictConfig, images: Images) -> Images:
    """The images that ``data.fraction`` leaves: those that GitHub main's solo-learn takes."""
    fraction = OmegaConf.select(cfg, "data.fraction", default=-1)
    if fraction is None or fraction <= 0:
        return images
    labels = images.targets
    stratify = labels if len(set(labels)) > 1 else None
    try:
        chosen, _ = train_test_split(
            images.samples, train_size=fraction, stratify=stratify, random_state=42
        )
    except ValueError as error:
        raise UserError(f"data.fraction={fraction}: {error}") from error
    return replace(images, samples=chosen)


def loader_failure(error: RuntimeError) -> UserError | None:
    """One line for a loader's worker that the system ended, or for images of different sizes.

    Returns:
        None where the error is another one.
    """
    text = str(error)
    if "DataLoader worker" in text and ("killed" in text or "exited unexpectedly" in text):
        return UserError(
            "data.num_workers: a process that reads images was killed (often because memory or "
            "/dev/shm is full); try fewer workers, or 0"
        )
    if "stack expects each tensor to be equal size" in text:
        return UserError("data: the images of a batch have different sizes after the transform")
    return None
