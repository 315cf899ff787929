"""Images with or without labels, for what needs no labels: every image of a folder is taken."""

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from metamask_solo.data.splitting import images_below

NO_LABEL = -1


def holds_classes(folder: Path) -> bool:
    """Whether a folder holds folders with images, rather than images alone."""
    entries = [e for e in folder.iterdir() if e.is_dir() and not e.name.startswith(".")]
    return any(images_below(entry) for entry in entries)


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
