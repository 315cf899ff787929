"""The data sets and loaders of a config, built alike on both releases of solo-learn."""

import atexit
import multiprocessing
import signal
from collections.abc import Callable
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
    split_notes,
)
from metamask_solo.data.read_image import reading_rule
from metamask_solo.data.seeds import generator_of
from metamask_solo.data.transforms import evaluation_transform
from metamask_solo.errors import UserError
from metamask_solo.hosts import CLASSES, pretrain_transform
from metamask_solo.paths import shown, user_path

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
    classes = _class_folders(cfg)
    if cfg.data.get("val_path") is not None:
        val_classes = check_folder(cfg.data.val_path, "data.val_path")
        if _has_labels(cfg):
            check_same_classes(classes, val_classes)
    most = CLASSES.get(cfg.data.dataset, len(classes))
    if len(classes) > most:
        raise UserError(
            f"data.train_path={shown(cfg.data.train_path)}: holds {len(classes)} class folders, "
            f"but data.dataset={cfg.data.dataset} has {most} classes"
        )


def count_classes(cfg: DictConfig) -> None:
    """Sets ``data.num_classes`` of custom data: solo-learn counts hidden folders too."""
    if cfg.data.dataset == "custom":
        cfg.data.num_classes = len(_class_folders(cfg)) or 1


def _class_folders(cfg: DictConfig) -> list[str]:
    return check_folder(cfg.data.train_path, "data.train_path", _has_labels(cfg))


def _has_labels(cfg: DictConfig) -> bool:
    return not cfg.data.get("no_labels", False)


def pretrain_dataset(cfg: DictConfig) -> Images:
    """The training data of pretraining: items are (index, views, label).

    Raises:
        UserError: the data are missing or cannot be read.
    """
    source = _source(cfg, "train", "pretrain", _has_labels(cfg))
    return Images(source, pretrain_transform(cfg), True, _fraction(cfg, source), "train")


def classification_dataset(cfg: DictConfig, split: str, transform: Callable[..., Any]) -> Images:
    """Labelled training or validation data: items are (image, label).

    Args:
        split: ``train`` or ``val``.

    Raises:
        UserError: the data are missing or cannot be read.
    """
    source = _source(cfg, split, split)
    chosen = _fraction(cfg, source) if split == "train" else None
    return Images(source, transform, chosen=chosen, split=split)


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


def evaluation_loader(
    cfg: DictConfig,
    split: str,
    data: str | Path | None = None,
    labels: bool | None = True,
    batch_size: int = 256,
    num_workers: int = 0,
    limit: int | None = None,
    seed: int = 0,
) -> DataLoader[Any]:
    """The images of one split, with the evaluation transform of a run's config.

    Args:
        cfg: config of the run.
        split: ``train``, ``val``, or nothing for the folder ``data`` itself;
            ``loader.dataset.split`` says which was read.
        data: a folder that holds train/ and val/, or if labels may be missing a folder of images;
            None for the data of the run.
        labels: True for class folders, None for labels where run and folder have them, and False
            for none: then a run without validation images gives its training images for ``val``.
        limit: at most this many images, drawn by ``seed``; None for all.

    Raises:
        UserError: the data are missing or cannot be read.
    """
    if labels is None and not _has_labels(cfg):
        labels = False
    if data is not None:
        root = user_path(data)
        split = split if labels or (root / split).is_dir() else ""
        source = read_folder(root / split, "--data", labels, reading_rule(cfg))
        say(*(split_notes(root, split) if split else []), *source.notes)
    else:
        if labels is not True and is_folder(cfg) and cfg.data.get(f"{split}_path") is None:
            split = "train"
        try:
            source = _source(cfg, split, split, labels)  # all images, as main_knn.py
        except UserError as error:
            raise UserError(f"{error}; give --data FOLDER") from error
    dataset = Images(source, evaluation_transform(cfg), split=split).limited(limit, seed)
    return plain_loader(dataset, batch_size, num_workers)


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


def _source(cfg: DictConfig, split: str, purpose: str, labels: bool | None = True) -> Any:
    """An image folder, or one of torchvision's data sets: items are (image, label)."""
    key, name = f"data.{split}_path", cfg.data.dataset
    path = cfg.data.get(f"{split}_path")
    if not path:
        raise UserError(f"{key}: missing; give it a value")
    if is_folder(cfg):
        images = read_folder(path, key, labels, reading_rule(cfg))
        say(*images.notes)
        return images
    if name not in PACKED:
        known = ", ".join((*FOLDER_DATASETS, *PACKED))
        raise UserError(f"data.dataset={name}: must be one of {known}")
    folder = user_path(path)
    state = f"holds no whole {name}" if folder.is_dir() else "no such folder"
    try:
        # looked up now, so that a replaced class is taken
        dataset = getattr(torchvision.datasets, name.upper())
        return dataset(str(folder), download=True, **PACKED[name][purpose])
    except Exception as error:  # network, disk, archive
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{key}={shown(path)}: cannot be read as {name}: {state}, and it could not be "
            f"downloaded ({reason})"
        ) from error


def _fraction(cfg: DictConfig, source: Any) -> list[int] | None:
    """The images that ``data.fraction`` leaves: those that GitHub main's solo-learn takes."""
    fraction = OmegaConf.select(cfg, "data.fraction", default=-1)
    if fraction is None or fraction <= 0:
        return None
    labels = list(getattr(source, "targets", None) or source.labels)
    try:
        chosen, _ = train_test_split(
            range(len(labels)),
            train_size=fraction,
            stratify=labels if len(set(labels)) > 1 else None,
            random_state=42,
        )
    except ValueError as error:
        raise UserError(f"data.fraction={fraction}: {error}") from error
    return list(chosen)


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
