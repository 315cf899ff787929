"""What the project asks of a release of solo-learn."""

from collections.abc import Callable
from typing import Any, Protocol

from omegaconf import DictConfig
from torch import Tensor, nn


class Host(Protocol):
    """A module for each release: the same names, whose types mypy checks.

    Attributes:
        RELEASE: its name, in notes and results.
        BACKBONE_PREFIX: what the keys of a backbone begin with in a checkpoint.
        CLASSES: number of classes of the built-in data sets.
        LARGE_CROPS: methods that take other than two large crops, with the least and the most.
        DINO_WARMUP: DINO's ``warmup_teacher_temperature_epochs`` where a config does not give it.
        LINEAR_OPTIMIZER_KEYS: keys of ``optimizer`` that only linear training reads.
        METHODS: name of a method to its class, as solo-learn keeps them.
        OPTIMIZERS: value of ``optimizer.name`` to the class.
        SMALL_CROPS: methods that take small crops, too.
        BaseMethod: the class of all methods.
        BaseMomentumMethod: the class of those with a momentum encoder.
        PluginMethod: the class to derive a method of one's own from. It has a model of the
            method's settings in ``settings_model``, and the checked ones in ``settings``; backbone,
            name of the optimiser and memory format are read from it, as the releases differ in
            these.
        WeightedKNNClassifier: the online kNN.
        pl: the Lightning that this release imports.
    """

    RELEASE: str
    BACKBONE_PREFIX: str
    CLASSES: dict[str, int]
    DINO_WARMUP: int
    LARGE_CROPS: dict[str, tuple[float, float]]
    LINEAR_OPTIMIZER_KEYS: tuple[str, ...]
    METHODS: Any
    OPTIMIZERS: dict[str, Any]
    SMALL_CROPS: tuple[str, ...]
    BaseMethod: Any
    BaseMomentumMethod: Any
    PluginMethod: Any
    WeightedKNNClassifier: Any
    pl: Any

    def setting_names(self, method: str) -> set[str] | None:
        """The keys of ``method_kwargs`` that a method reads; None where it checks them itself."""

    def backbone_names(self) -> list[str]:
        """The values that ``backbone.name`` may have."""

    def build_backbone(self, cfg: DictConfig) -> nn.Module:
        """The backbone as solo-learn's methods build it: images to N × D features."""

    def build_method(self, cfg: DictConfig) -> Any:
        """The method that ``cfg.method`` names, from a completed config."""

    def build_linear(
        self,
        backbone: nn.Module,
        cfg: DictConfig,
        loss_func: Callable[..., Tensor] | None = None,
        mixup_func: Callable[..., Any] | None = None,
    ) -> Any:
        """solo-learn's linear (or fine-tuning) model on a backbone, from a completed config."""

    def complete_pretrain_config(self, cfg: DictConfig) -> DictConfig:
        """Defaults and derived values, as GitHub main's main_pretrain.py computes them."""

    def complete_linear_config(self, cfg: DictConfig) -> DictConfig:
        """Defaults and derived values, as GitHub main's main_linear.py computes them."""

    def pretrain_transform(self, cfg: DictConfig) -> Callable[..., list[Tensor]]:
        """From an image to the views that a pretraining config asks for."""

    def dataset_transforms(
        self, dataset: str
    ) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
        """solo-learn's training and evaluation transforms of one of its built-in data sets."""
