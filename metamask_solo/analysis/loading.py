"""What an analysis reads: the data folder, its backgrounds, checkpoints and their features."""

import csv
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from metamask_solo.analysis.drawing import plain_text
from metamask_solo.analysis.measures import Array, IntArray
from metamask_solo.analysis.study import Background, Subject, bracket_images
from metamask_solo.analysis.subsets import Split
from metamask_solo.checkpoints.reading import Checkpoint, load_backbone
from metamask_solo.data.datasets import pretrain_dataset
from metamask_solo.data.folders import check_same_classes, find_images
from metamask_solo.data.images import READING_KEYS, image_settings, split_loader
from metamask_solo.data.reading import shown
from metamask_solo.data.splitting import images_below
from metamask_solo.data.unlabelled import holds_classes
from metamask_solo.errors import UserError
from metamask_solo.evaluation.features import extract_features
from metamask_solo.hosts import build_backbone
from metamask_solo.training.resume import run_identity, say_other_images

METADATA = "metadata.csv"
MOST_PIXELS = 64 * 64 * 3
MOST_DIFFERENCES = 3  # settings in the label of a run
COLOURS = ("mean_red", "mean_green", "mean_blue")


@dataclass(frozen=True)
class Reading:
    """How features are extracted: at most ``samples`` images of each split, drawn by ``seed``.

    ``data`` holds train/ and val/; None stands for each run's own data.
    """

    data: Path | None
    samples: int
    seed: int
    batch_size: int
    num_workers: int
    device: str


def has_labels(root: Path) -> bool:
    """Whether ``root``/train holds class folders rather than images alone.

    A folder of images without train/ is one without labels.
    """
    if not root.is_dir():
        raise UserError(f"--data={root}: no such folder; it must hold train/ and val/")
    if not (root / "train").is_dir():
        if not holds_classes(root) and images_below(root):
            return False
        raise UserError(f"--data={root}: has no folder train/")
    return holds_classes(root / "train")


def has_own_labels(checkpoint: Checkpoint) -> bool:
    """Whether a run's own data have labels and validation images.

    Raises:
        UserError: there is no config beside the checkpoint, so its data are not known.
    """
    if checkpoint.config is None:
        raise UserError(f"{checkpoint.path.parent / 'args.json'}: missing; give --data FOLDER")
    data = checkpoint.config.data
    return data.get("val_path") is not None and not data.get("no_labels", False)


def check_same_data(checkpoints: Sequence[Checkpoint]) -> None:
    """Raises UserError unless the runs' own data are the same: the report compares accuracies."""
    kept = ("dataset", "train_path", "val_path", "no_labels", "format")
    first, *others = [checkpoint.config.data for checkpoint in checkpoints if checkpoint.config]
    for other in others:
        for key in kept:
            values = [_place(data.get(key)) for data in (first, other)]
            if values[0] != values[1]:
                raise UserError(
                    f"runs of different data: data.{key} is {values[0]} and {values[1]}; analyse "
                    "them one by one, or give --data FOLDER with images for all"
                )


def _place(value: Any) -> Any:
    """A folder as the file system knows it."""
    return str(Path(value).resolve()) if isinstance(value, str) and os.sep in value else value


def check_data(root: Path) -> int:
    """Checks that ``root`` has train/ and val/ with the same class folders, none nearly empty.

    Returns:
        The number of classes.

    Raises:
        UserError: a folder is missing, holds fewer than 2 images, or is in one split only.
    """
    if not root.is_dir():
        raise UserError(f"--data={root}: no such folder; it must hold train/ and val/")
    for split in ("train", "val"):
        if not (root / split).is_dir():
            raise UserError(f"--data={root}: has no folder {split}/")
    names = check_same_classes(root / "train", root / "val", "--data, train", "--data, val")
    if len(names) < 2:
        raise UserError(f"--data={root}: has {len(names)} classes; at least 2 are needed")
    for split in ("train", "val"):
        found = find_images(root / split, f"--data, {split}")
        counts = Counter(label for _, label in found.samples)
        label = min(counts, key=lambda label: counts[label])
        if counts[label] < 2:
            raise UserError(
                f"--data={root}: class folder {split}/{shown(names[label])} has {counts[label]} "
                "images; each needs at least 2"
            )
    return len(names)


def titles(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """A label for each checkpoint, short enough for a figure."""
    return run_labels([(title(one), one.config, one.path.parent) for one in checkpoints])


def run_labels(runs: Sequence[tuple[str, DictConfig | None, Path]]) -> list[str]:
    """A number and a name for each run, short enough for a figure.

    Runs of one name are told apart by the settings that differ among them, or by their folders.

    Args:
        runs: name, config and folder of each.
    """
    labels = []
    for number, (name, config, folder) in enumerate(runs, start=1):
        label = f"{number}: {plain_text(name, 40)}"
        alike = [_identity(run[1]) for run in runs if run[0] == name]
        if len(alike) > 1:
            settings = _identity(config)
            parts = [
                f"{key.rpartition('.')[2]}={str(value)[:20]}"
                for key, value in sorted(settings.items())
                if any(other.get(key) != value for other in alike)
            ]
            if len(parts) > MOST_DIFFERENCES:
                parts[MOST_DIFFERENCES:] = ["…"]
            if not parts or alike.count(settings) > 1:
                parts.append(folder.resolve().name.removeprefix("offline-"))
            label += f" ({plain_text(', '.join(parts))})"
        labels.append(label)
    return labels


def _identity(config: DictConfig | None) -> dict[str, Any]:
    return {} if config is None else run_identity(config)


def title(checkpoint: Checkpoint) -> str:
    """The run's name, short enough for a figure."""
    name = checkpoint.config.get("name") if checkpoint.config else None
    short = plain_text(str(name or checkpoint.method or checkpoint.path.stem), 40)
    folded = checkpoint.raw.get("metamask", {}).get("folded", False)
    return f"{short} (folded)" if folded else short


def val_folder(checkpoint: Checkpoint, data: Path | None) -> Path | None:
    """The folder of the validation images; None where they lie in no class folders."""
    if data is not None:
        return data / "val"
    own = checkpoint.config.data if checkpoint.config is not None else {}
    folder = own.get("val_path")
    return Path(folder) if own.get("dataset") == "custom" and folder else None


def two_view_data(checkpoint: Checkpoint, folder: Path | None) -> Dataset[Any] | None:
    """The images of ``folder`` in the views that a run was trained on.

    Returns:
        A data set of (index, views, label), or None where the run did not train on two views of
        one size, or the installed solo-learn cannot make its augmentations.
    """
    config = checkpoint.config
    if config is None or folder is None:
        return None
    pipelines = OmegaConf.select(config, "augmentations", default=None)
    if not OmegaConf.is_list(pipelines):
        return None
    sizes = [pipeline.crop_size for pipeline in pipelines for _ in range(pipeline.num_crops)]
    if len(sizes) < 2 or sizes[0] != sizes[1]:
        return None
    # a folder of images is custom data, which solo-learn scales as the pipeline says
    settings = image_settings(config)
    scale = {"mean": list(settings.mean), "std": list(settings.std)}
    here = config.copy()
    here.augmentations = [OmegaConf.merge(pipeline, scale) for pipeline in pipelines]
    here.data = {
        "dataset": "custom",
        "train_path": str(folder),
        "format": "image_folder",
        "no_labels": False,
        "fraction": -1,
        **{key: config.data[key] for key in READING_KEYS if key in config.data},
    }
    try:
        return pretrain_dataset(here)
    except UserError:
        return None


def load_subject(
    path: Path, name: str, reading: Reading, two_views: bool
) -> tuple[Subject, list[Path]]:
    """Extracts the plain features of both splits with the backbone of a checkpoint.

    Args:
        two_views: also of two augmented views of the images of the bracket.

    Returns:
        The subject, and the files of its training images in the order of their features.

    Raises:
        UserError: the checkpoint cannot be used, its features are not finite or all zero, or
            ``reading.samples`` leaves a class with fewer than 2 images.
    """
    backbone, checkpoint = load_backbone(path, masked=False)
    train, files = _split(backbone, checkpoint, name, "train", reading)
    val, val_files = _split(backbone, checkpoint, name, "val", reading)
    if reading.data is None and checkpoint.config is not None:
        say_other_images(checkpoint.config)
    views = None
    if two_views:
        chosen = [val_files[index] for index in bracket_images(val.labels, reading.seed)]
        views = _views(backbone, checkpoint, name, chosen, reading)
    mask, history = _mask_and_history(checkpoint)
    subject = Subject(name, str(path), checkpoint.method, train, val, mask, history, views)
    return subject, files


def load_unlabelled(path: Path, name: str, reading: Reading) -> Subject:
    """Extracts the plain features of the training images alone, whose labels are all −1."""
    backbone, checkpoint = load_backbone(path, masked=False)
    loader = _loader(checkpoint, "train", reading, labelled=False)
    found, labels = extract_features(backbone, loader, reading.device, f"{name} train")
    features = found.numpy()
    _check_features(features, checkpoint.path)
    train = Split(features, np.full(len(labels), -1))
    mask, history = _mask_and_history(checkpoint)
    return Subject(name, str(path), checkpoint.method, train, None, mask, history)


def load_references(path: Path, reading: Reading) -> dict[str, tuple[Split, Split]]:
    """Features of an untrained backbone, and the pixels, of the same images of both splits.

    Pixels are left out where an image has more of them than ``MOST_PIXELS``.
    """
    _, checkpoint = load_backbone(path, masked=False)
    config = checkpoint.config
    assert config is not None  # load_backbone needs it
    torch.manual_seed(reading.seed)
    untrained = f"random backbone ({config.backbone.name})"
    modules = {untrained: build_backbone(config), "raw pixels": nn.Flatten()}
    found: dict[str, tuple[Split, Split]] = {}
    for name, module in modules.items():
        splits = []
        for split in ("train", "val"):
            loader = _loader(checkpoint, split, reading)
            shape = loader.dataset[0][0].shape
            if name == "raw pixels" and shape.numel() > MOST_PIXELS:
                break
            features, labels = extract_features(module, loader, reading.device, f"{name} {split}")
            splits.append(Split(features.numpy(), labels.numpy()))
        if len(splits) == 2:
            found[name] = splits[0], splits[1]
    return found


def _split(
    backbone: nn.Module, checkpoint: Checkpoint, name: str, split: str, reading: Reading
) -> tuple[Split, list[Path]]:
    loader = _loader(checkpoint, split, reading)
    found, labels = extract_features(backbone, loader, reading.device, f"{name} {split}")
    features = found.numpy()
    _check_features(features, checkpoint.path)
    folder: Any = loader.dataset
    chosen: Sequence[int] = range(len(features))
    if isinstance(folder, Subset):
        folder, chosen = folder.dataset, folder.indices
    classes = getattr(folder, "classes", range(int(labels.max()) + 1))
    least = int(np.bincount(labels.numpy(), minlength=len(classes)).min())
    if least < 2:
        raise UserError(
            f"--samples={reading.samples}: leaves a class of {split} with {least} images; each "
            "needs at least 2"
        )
    samples = getattr(folder, "samples", None)  # torchvision's CIFAR and STL-10 have no files
    files = [] if samples is None else [Path(samples[index][0]) for index in chosen]
    return Split(features, labels.numpy()), files


def _loader(
    checkpoint: Checkpoint, split: str, reading: Reading, labelled: bool = True
) -> DataLoader[Any]:
    options = (reading.batch_size, reading.num_workers, reading.samples, reading.seed)
    return split_loader(split, checkpoint.config, reading.data, *options, labelled)


def _check_features(features: Array, path: Path) -> None:
    if not np.isfinite(features).all():
        raise UserError(f"{path}: its features are not finite; the run diverged")
    empty = int(np.count_nonzero(~features.any(axis=1)))
    if empty:
        raise UserError(
            f"{path}: the features of {empty} of {len(features)} images are all zero; the "
            "representation has collapsed"
        )


@torch.no_grad()
def _views(
    backbone: nn.Module, checkpoint: Checkpoint, name: str, files: list[Path], reading: Reading
) -> tuple[Array, Array]:
    data: Any = two_view_data(checkpoint, val_folder(checkpoint, reading.data))
    place = {Path(file): index for index, (file, _) in enumerate(data.samples)}
    loader = DataLoader(
        Subset(data, [place[file] for file in files]),
        batch_size=reading.batch_size,
        # exactly one worker: its random state is its own, and the same for every --num-workers
        num_workers=1,
        generator=torch.Generator().manual_seed(reading.seed),
    )
    features: tuple[list[Array], list[Array]] = ([], [])
    for _, views, _ in tqdm(loader, desc=f"{name} views", leave=False):
        for found, view in zip(features, views[:2], strict=True):
            found.append(backbone(view.to(reading.device)).float().cpu().numpy())
    first, second = (np.concatenate(found) for found in features)
    _check_features(first, checkpoint.path)
    _check_features(second, checkpoint.path)
    return first, second


def _mask_and_history(
    checkpoint: Checkpoint,
) -> tuple[Array | None, tuple[IntArray, Array] | None]:
    """The learned mask and its way over training; neither where it was folded into the backbone."""
    state = checkpoint.raw.get("metamask", {})
    if checkpoint.mask is None or state.get("folded", False):
        return None, None
    mask = checkpoint.mask.double().numpy()
    history = state.get("history")
    if history is None:
        return mask, None
    steps, masks = history["step"].numpy(), history["mask"].double().numpy()
    last = checkpoint.raw.get("global_step", 0)
    if last > steps[-1]:  # written before the epoch's mask was noted
        steps, masks = np.append(steps, last), np.vstack([masks, mask])
    return mask, (steps, masks)


def read_background(root: Path | None, files: Sequence[Path]) -> Background | None:
    """Reads from ``root``/metadata.csv what lies behind the object of each image.

    Args:
        files: images in ``root``.

    Returns:
        None where there is no such file, or it has no columns ``file``, ``photograph`` and mean
        colours (another tool's).

    Raises:
        UserError: an image is missing from it, or a colour is not a number.
    """
    if root is None or not files or not (root / METADATA).is_file():
        return None
    path = root / METADATA
    with path.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        if not {"file", "photograph", *COLOURS} <= set(reader.fieldnames or ()):
            return None
        rows = {row["file"]: row for row in reader}
    names = [file.relative_to(root).as_posix() for file in files]
    missing = next((name for name in names if name not in rows), None)
    if missing is not None:
        raise UserError(f"{path}: has no row for {missing}")
    try:
        colour = np.array([[float(rows[name][key]) for key in COLOURS] for name in names])
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: a mean colour is not a number ({error})") from error
    _, photograph = np.unique([rows[name]["photograph"] for name in names], return_inverse=True)
    return Background(photograph, colour)
