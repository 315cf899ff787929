"""Backbones for small images: the 3×3 stem of a ResNet, the size of images of ViT and Swin.

solo-learn gives the 3×3 stem (a convolution with stride 1, and no max pooling) to the CIFAR data
sets alone. ``backbone.stem`` asks for it, or against it, whatever the data.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from omegaconf import DictConfig
from torch import Tensor

SMALL, STANDARD = "3x3", "standard"
SMALL_DATASETS = ("cifar10", "cifar100")


def stem(cfg: DictConfig) -> str:
    """The stem of a config: ``backbone.stem``, or what solo-learn gives its data set."""
    by_dataset = SMALL if cfg.data.dataset in SMALL_DATASETS else STANDARD
    return cfg.backbone.get("stem") or by_dataset


def stem_of(state: Mapping[str, Tensor]) -> str | None:
    """The stem that the weights of a backbone are of; None where it is no ResNet."""
    weight = state.get("conv1.weight")
    if weight is None or weight.ndim != 4:
        return None
    return SMALL if weight.shape[-1] == 3 else STANDARD


def set_image_size(cfg: DictConfig, crop_size: int) -> None:
    """Swin and ViT are built for one size of images, and take 224 for it if nobody says more."""
    if cfg.backbone.name.startswith(("vit", "swin")) and crop_size != 224:
        cfg.backbone.kwargs = cfg.backbone.get("kwargs") or {}
        cfg.backbone.kwargs.setdefault("img_size", crop_size)


@contextmanager
def dataset_of_stem(cfg: DictConfig) -> Iterator[None]:
    """Names a data set for which solo-learn builds the stem, while it builds a backbone."""
    before = cfg.data.dataset
    if (stem(cfg) == SMALL) != (before in SMALL_DATASETS):
        cfg.data.dataset = SMALL_DATASETS[0] if stem(cfg) == SMALL else "custom"
    try:
        yield
    finally:
        cfg.data.dataset = before
