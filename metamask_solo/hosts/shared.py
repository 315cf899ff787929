"""What both releases share: processes, logging without labels, and torchmetrics of today."""

import functools
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torchmetrics.metric import Metric

# how the names begin of what solo-learn logs of labels
OF_LABELS = (
    "train_class_loss",
    "train_acc",
    "train_momentum_",
    "train_nn_acc",
    "val_",
    "momentum_",
)


def process_count(cfg: DictConfig) -> int:
    """How many processes train, on all machines; ``devices`` is a list, or a number."""
    devices = cfg.get("devices", 1)
    here = len(devices) if OmegaConf.is_list(devices) else devices
    return int(here * (cfg.get("num_nodes") or 1))


def log_nothing_of_labels(model: Any) -> None:
    """For a model whose images have no labels, or not all of them."""
    model.log_dict = functools.partial(_log_the_rest, model)


def _log_the_rest(model: Any, metrics: dict[str, Any], *args: Any, **kwargs: Any) -> None:
    rest = {name: value for name, value in metrics.items() if not name.startswith(OF_LABELS)}
    type(model).log_dict(model, rest, *args, **kwargs)


class UpdatingMetric(Metric):
    """Base for solo-learn's online kNN, which asks for what torchmetrics 1 no longer has.

    That was ``compute_on_step=False``: a call updates, and computes nothing.
    """

    def __init__(self, compute_on_step: bool = False, **kwargs: Any):
        super().__init__(**kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> None:
        self.update(*args, **kwargs)
