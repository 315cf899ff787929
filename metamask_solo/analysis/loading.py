"""What an analysis reads: features and masks of checkpoints, and what lies behind the objects."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.utils.data import DataLoader

from metamask_solo.analysis.figures import plain_text
from metamask_solo.analysis.measure_checkpoint import (
    Background,
    CheckpointFeatures,
    bounds_images,
)
from metamask_solo.analysis.measures import Array, IntArray
from metamask_solo.analysis.subsets import Labelled
from metamask_solo.checkpoints.reading import Checkpoint
from metamask_solo.data.datasets import Images, holds_classes
from metamask_solo.data.seeds import image_seed
from metamask_solo.errors import UserError
from metamask_solo.evaluation.features import FeatureReader, NotFinite, extract_features
from metamask_solo.hosts import build_backbone, pretrain_transform
from metamask_solo.training.resume import run_identity

METADATA = "metadata.csv"
COLOURS = ["mean_red", "mean_green", "mean_blue"]
MOST_PIXELS = 32 * 32 * 3  # the linear probe on more of them takes long
MOST_DIFFERENCES = 3  # settings in the label of a run
Loaders = dict[str, DataLoader[Any]]  # by split


def titles(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """A label for each checkpoint, short enough for a figure."""
    runs = []
    for checkpoint in checkpoints:
        name = checkpoint.config.get("name") if checkpoint.config else None
        name = str(name or checkpoint.method or checkpoint.path.stem)
        name = f"{name} (folded)" if checkpoint.folded else name
        runs.append((name, checkpoint.config, checkpoint.path.parent))
    return run_labels(runs)


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


def check_same_data(checkpoints: Sequence[Checkpoint]) -> None:
    """Raises UserError unless the runs' own data are the same: the report compares accuracies."""
    first, *others = [checkpoint.config.data for checkpoint in checkpoints if checkpoint.config]
    for other in others:
        for key in ("dataset", "train_path", "val_path", "no_labels"):
            values = [_resolved(data.get(key)) for data in (first, other)]
            if values[0] != values[1]:
                raise UserError(
                    f"runs of different data: data.{key} is {values[0]} and {values[1]}; analyse "
                    "them one by one, or give --data FOLDER with images for all"
                )


def _resolved(value: Any) -> Any:
    """A folder as the file system knows it."""
    return str(Path(value).resolve()) if isinstance(value, str) and os.sep in value else value


def has_labels(checkpoint: Checkpoint, data: Path | None) -> bool:
    """Whether there are labelled images of both splits, in a folder or in the run's own data."""
    if data is not None:
        both = all((data / split).is_dir() for split in ("train", "val"))
        return both and holds_classes(data / "train", "--data")
    own = checkpoint.config.data if checkpoint.config is not None else {}
    return own.get("val_path") is not None and not own.get("no_labels", False)


def view_transform(config: DictConfig | None) -> Callable[..., Any] | None:
    """From an image to the views that a run was trained on.

    Returns:
        None where these are not two views of one size, or the installed solo-learn cannot make
        them.
    """
    pipelines: Any = None if config is None else config.get("augmentations")
    if config is None or not OmegaConf.is_list(pipelines):
        return None
    sizes = [pipeline.crop_size for pipeline in pipelines for _ in range(pipeline.num_crops)]
    if len(sizes) < 2 or sizes[0] != sizes[1]:
        return None
    try:
        return pretrain_transform(config)
    except UserError:
        return None


def read_features(
    reader: FeatureReader, name: str, loaders: Loaders, seed: int, two_views: bool
) -> CheckpointFeatures:
    """The plain features of the images of ``loaders``, which has no ``val`` without labels.

    Args:
        two_views: also of two augmented views of the images of the bounds.

    Raises:
        UserError: the images cannot be read.
    """
    checkpoint = reader.checkpoint
    mask, history, notes = mask_and_history(checkpoint)
    train = val = views = None
    try:
        splits = {split: _labelled(reader, loader) for split, loader in loaders.items()}
        train, val = splits["train"], splits.get("val")
        if val is not None and two_views:
            views = _views(reader, loaders["val"], bounds_images(val.labels, seed), seed)
    except NotFinite as error:
        train = val = None
        notes.append(str(error).removeprefix(f"{checkpoint.path}: "))
    path, method = str(checkpoint.path), checkpoint.method
    return CheckpointFeatures(name, path, method, train, val, mask, history, views, notes)


def _labelled(
    reader: FeatureReader, loader: DataLoader[Any], module: nn.Module | None = None
) -> Labelled:
    features = reader.extract(loader, module)
    return Labelled(features.features.numpy(), features.labels.numpy())


def _views(
    reader: FeatureReader, loader: DataLoader[Any], images: IntArray, seed: int
) -> tuple[Array, Array] | None:
    """Features of two augmented views of some images of a loader's data set."""
    transform = view_transform(reader.checkpoint.config)
    if transform is None or not len(images):
        return None
    of: Any = loader.dataset
    chosen = [of.indices[index] for index in images.tolist()]
    draws: Any = [(index, image_seed(seed, 0, index)) for index in range(len(images))]
    views = []
    for number in (0, 1):
        dataset = Images(of.source, partial(_view, transform, number), chosen=chosen)
        batches = DataLoader(
            dataset, loader.batch_size, sampler=draws, num_workers=loader.num_workers
        )
        label = str(reader.checkpoint.path)
        views.append(extract_features(reader.module, batches, reader.device, label)[0].numpy())
    return views[0], views[1]


def _view(transform: Callable[..., Any], number: int, image: Any) -> Any:
    return transform(image)[number]


def untrained_features(
    reader: FeatureReader, loaders: Loaders, seed: int
) -> dict[str, tuple[Labelled, Labelled]]:
    """Features of an untrained backbone, and the pixels, of the same images of both splits.

    Pixels are left out where an image has more of them than ``MOST_PIXELS``.
    """
    config = reader.checkpoint.config
    assert config is not None  # the reader built its backbone
    torch.manual_seed(seed)
    modules = {f"untrained backbone ({config.backbone.name})": build_backbone(config)}
    if loaders["train"].dataset[0][0].numel() <= MOST_PIXELS:
        modules["pixels"] = nn.Flatten()
    return {
        name: (
            _labelled(reader, loaders["train"], module),
            _labelled(reader, loaders["val"], module),
        )
        for name, module in modules.items()
    }


def mask_and_history(
    checkpoint: Checkpoint,
) -> tuple[Array | None, tuple[IntArray, Array] | None, list[str]]:
    """The learned mask, its way over training, and notes.

    There is neither where the mask was folded into the backbone, or is not finite.
    """
    if checkpoint.mask is None or checkpoint.folded:
        return None, None, []
    mask = checkpoint.mask.double().numpy()
    if not np.isfinite(mask).all():
        return None, None, ["its mask is not finite: the run diverged"]
    history = checkpoint.raw.get("metamask", {}).get("history")
    if history is None:
        return mask, None, []
    steps, masks = history["step"].numpy(), history["mask"].double().numpy()
    last = checkpoint.raw.get("global_step", 0)
    if last > steps[-1]:  # written before the epoch's mask was noted
        steps, masks = np.append(steps, last), np.vstack([masks, mask])
    return mask, (steps, masks), []


def read_background(root: Path | None, files: Sequence[str]) -> Background | None:
    """Reads from ``root``/metadata.csv what lies behind the object of each image.

    Args:
        files: images in ``root``.

    Returns:
        None where there is no such file, or it has no columns ``file``, ``photograph`` and mean
        colours (another tool's).

    Raises:
        UserError: an image is missing from it, or a colour is not a number.
    """
    if root is None or not (root / METADATA).is_file():
        return None
    try:
        table = pd.read_csv(root / METADATA)
    except ValueError:  # no table, or an empty one
        return None
    if not {"file", "photograph", *COLOURS} <= set(table.columns):
        return None
    names = [Path(file).relative_to(root).as_posix() for file in files]
    rows = table.drop_duplicates("file").set_index("file").reindex(names)
    colour = rows[COLOURS].apply(pd.to_numeric, errors="coerce")
    bad = rows.index[rows["photograph"].isna() | colour.isna().any(axis=1)]
    if len(bad):
        raise UserError(
            f"{root / METADATA}: has no row for {bad[0]} with a photograph and three numbers"
        )
    return Background(pd.factorize(rows["photograph"], sort=True)[0], colour.to_numpy())
