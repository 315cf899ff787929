"""The data sets and loaders of a config, built alike on both releases of solo-learn."""

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
)
from metamask_solo.data.read_image import reading_rule
from metamask_solo.data.seeds import generator_of
from metamask_solo.data.transforms import evaluation_transform
from metamask_solo.errors import UserError
from metamask_solo.hosts import CLASSES, pretrain_transform
from metamask_solo.paths import shown, user_path

FORMAT = "image_folder"
FOLDER_DATASETS = ("custom", "imagenet", "imagenet100")
CIFAR = {"pretrain": {"train": True}, "train": {"train": True}, "val": {"train": False}}
STL10 = {"pretrain": "train+unlabeled", "train": "train", "val": "test"}
# torchvision's class, and its arguments for the images of each purpose
PACKED: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "cifar10": ("CIFAR10", CIFAR),
    "cifar100": ("CIFAR100", CIFAR),
    "stl10": ("STL10", {purpose: {"split": split} for purpose, split in STL10.items()}),
}


def is_folder(cfg: DictConfig) -> bool:
    """Whether a config's data are folders of images."""
    return cfg.data.dataset in FOLDER_DATASETS


def check_folders(cfg: DictConfig, labels: bool = True) -> None:
    """Refuses image folders that cannot be used, before anything is built.

    Args:
        labels: False where the training images have none.
    """
    kind = OmegaConf.select(cfg, "data.format", default=None)
    if kind not in (None, FORMAT):
        # GitHub main would read a name that it does not know as image folders, without a word
        raise UserError(
            f"data.format={kind}: must be {FORMAT}; h5 and dali are read by solo-learn's own "
            "scripts only"
        )
    reading_rule(cfg)
    if not is_folder(cfg):
        return
    classes = check_folder(cfg.data.train_path, "data.train_path", labels)
    if cfg.data.get("val_path") is not None:
        val_classes = check_folder(cfg.data.val_path, "data.val_path")
        if labels:
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
        labels = not cfg.data.get("no_labels", False)
        classes = check_folder(cfg.data.train_path, "data.train_path", labels)
        cfg.data.num_classes = len(classes) or 1


def pretrain_dataset(cfg: DictConfig, download: bool = True) -> Images:
    """The training data of pretraining: items are (index, views, label).

    Args:
        download: whether one of torchvision's data sets may be downloaded.

    Raises:
        UserError: the data are missing or cannot be read.
    """
    labels = not cfg.data.get("no_labels", False)
    source = _source(cfg, "train", "pretrain", labels, download)
    return Images(source, pretrain_transform(cfg), True, _fraction(cfg, source), "train")


def classification_dataset(
    cfg: DictConfig,
    split: str,
    transform: Callable[..., Any],
    whole: bool = False,
    download: bool = True,
) -> Images:
    """Labelled training or validation data: items are (image, label).

    Args:
        split: ``train`` or ``val``.
        whole: all training images, whatever ``data.fraction`` says.
        download: whether one of torchvision's data sets may be downloaded.

    Raises:
        UserError: the data are missing or cannot be read.
    """
    source = _source(cfg, split, split, True, download)
    chosen = _fraction(cfg, source) if split == "train" and not whole else None
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


def data_notes(cfg: DictConfig) -> list[str]:
    """What is left out or doubtful of a config's data, in sentences, for a report."""
    transform = evaluation_transform(cfg)
    labels = not cfg.data.get("no_labels", False)
    if labels and cfg.data.get("val_path") is not None:
        return classification_datasets(cfg, transform, transform)[1].notes
    return Images(_source(cfg, "train", "pretrain", labels), transform).notes


def plain_loader(dataset: Images, batch_size: int, num_workers: int) -> DataLoader[Any]:
    """A loader in the order of the data set; draws nothing from the process's random numbers."""
    generator = generator_of(0)
    return DataLoader(dataset, batch_size, num_workers=num_workers, generator=generator)


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
    dataset = _evaluation_images(cfg, split, data, labels).limited(limit, seed)
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


def _evaluation_images(
    cfg: DictConfig, split: str, data: str | Path | None, labels: bool | None
) -> Images:
    transform = evaluation_transform(cfg)
    if labels is None and cfg.data.get("no_labels", False):
        labels = False
    if data is not None:
        root = user_path(data)
        split = split if labels or (root / split).is_dir() else ""
        source = read_folder(root / split, "--data", labels, reading_rule(cfg))
        say(*source.notes)
        return Images(source, transform, split=split)
    if labels is not True and is_folder(cfg) and cfg.data.get(f"{split}_path") is None:
        split = "train"
    try:
        # all images, as main_knn.py
        source = _source(cfg, split, split, labels)
    except UserError as error:
        raise UserError(f"{error}; give --data FOLDER") from error
    return Images(source, transform, split=split)


def _source(
    cfg: DictConfig, split: str, purpose: str, labels: bool | None = True, download: bool = True
) -> Any:
    """One of torchvision's data sets without a transform: items are (image, label)."""
    key = f"data.{split}_path"
    path = cfg.data.get(f"{split}_path")
    if not path:
        raise UserError(f"{key}: missing; give it a value")
    if is_folder(cfg):
        images = read_folder(path, key, labels, reading_rule(cfg))
        say(*images.notes)
        return images
    name = cfg.data.dataset
    if name not in PACKED:
        raise UserError(f"data.dataset={name}: must be one of {', '.join(FOLDER_DATASETS)}")
    kind, arguments = PACKED[name]
    folder = user_path(path)
    there = folder.is_dir()
    try:
        # looked up now, so that a replaced class is taken
        dataset = getattr(torchvision.datasets, kind)
        return dataset(str(folder), download=download, **arguments[purpose])
    except Exception as error:  # network, disk, archive
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        state = f"holds no whole {name}" if there else "no such folder"
        failed = f", and it could not be downloaded ({reason})" if download else ""
        raise UserError(
            f"{key}={shown(path)}: cannot be read as {name}: {state}{failed}"
        ) from error


def _fraction(cfg: DictConfig, source: Any) -> list[int] | None:
    """The images that ``data.fraction`` leaves: those that GitHub main's solo-learn takes."""
    fraction = OmegaConf.select(cfg, "data.fraction", default=-1)
    if fraction is None or fraction <= 0:
        return None
    if fraction >= 1:
        raise UserError(f"data.fraction={fraction}: must be above 0 and below 1, or -1 for all")
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
