"""The first layers of a ResNet: the standard ones, or the 3×3 stem for small images.

Both releases of solo-learn give the 3×3 stem (a convolution with stride 1, and no max pooling) to
the CIFAR data sets alone. ``backbone.stem`` asks for it, or against it, whatever the data.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

SMALL, STANDARD = "3x3", "standard"
STEMS = (SMALL, STANDARD)
KEY = "backbone.stem"
SMALL_DATASETS = ("cifar10", "cifar100")


def stem(cfg: DictConfig) -> str:
    """The stem of a config: ``backbone.stem``, or what solo-learn gives its data set."""
    given = OmegaConf.select(cfg, KEY, default=None)
    return given or (SMALL if cfg.data.dataset in SMALL_DATASETS else STANDARD)


def stem_of(state: Mapping[str, Tensor]) -> str | None:
    """The stem that the weights of a backbone are of; None where it is no ResNet."""
    weight = state.get("conv1.weight")
    if weight is None or weight.ndim != 4:
        return None
    return SMALL if weight.shape[-1] == 3 else STANDARD


@contextmanager
def dataset_of_stem(cfg: DictConfig) -> Iterator[None]:
    """Names a data set for which solo-learn builds the stem that is asked for.

    It reads the name when it builds a backbone, and keeps no copy.
    """
    before: Any = cfg.data.dataset
    if stem(cfg) == SMALL:
        cfg.data.dataset = SMALL_DATASETS[0]
    elif before in SMALL_DATASETS:
        cfg.data.dataset = "custom"
    try:
        yield
    finally:
        cfg.data.dataset = before
