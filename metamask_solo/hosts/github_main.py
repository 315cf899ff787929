"""solo-learn's GitHub main: methods take a config. It is the reference, and runs as it is."""

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig, OmegaConf
from solo.args.linear import parse_cfg as parse_linear
from solo.args.pretrain import _N_CLASSES_PER_DATASET
from solo.args.pretrain import parse_cfg as parse_pretrain
from solo.data.classification_dataloader import prepare_transforms
from solo.data.pretrain_dataloader import (
    FullTransformPipeline,
    NCropAugmentation,
    build_transform_pipeline,
)
from solo.methods import METHODS
from solo.methods.base import BaseMethod, BaseMomentumMethod
from solo.methods.linear import LinearModel
from solo.utils.knn import WeightedKNNClassifier
from solo.utils.metrics import accuracy_at_k
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import Normalize

from metamask_solo.hosts.shared import UpdatingMetric, log_nothing_of_labels
from metamask_solo.hosts.stem import SMALL, dataset_of_stem, set_image_size, stem
from metamask_solo.validation import Settings, validated

RELEASE = "main"
OPTIMIZERS = BaseMethod._OPTIMIZERS
BACKBONE_PREFIX = "backbone."
CLASSES: dict[str, int] = _N_CLASSES_PER_DATASET
SMALL_CROPS = tuple(
    name
    for name, method in METHODS.items()
    if issubclass(method, BaseMethod)
    and method.multicrop_forward is not BaseMethod.multicrop_forward
)


class PluginMethod(BaseMethod):
    """Base of a method of one's own.

    Attributes:
        settings_model: of the class: the pydantic model of ``method_kwargs``.
        settings: the checked settings.
        optimizer_name: value of ``optimizer.name``.
    """

    settings_model: type[Settings]

    def __init__(self, cfg: DictConfig):
        with dataset_of_stem(cfg):
            super().__init__(cfg)
        self.settings = self.settings_model(**_plain(self.cfg.method_kwargs))
        self.optimizer_name: str = self.optimizer

    @classmethod
    def add_and_assert_specific_cfg(cls, cfg: DictConfig) -> DictConfig:
        """Completes and checks ``method_kwargs``, beside what solo-learn does for every method."""
        cfg = BaseMethod.add_and_assert_specific_cfg(cfg)
        settings = validated(cls.settings_model, _plain(cfg.method_kwargs), "method_kwargs.")
        cfg.method_kwargs = settings.model_dump()
        return cfg

    def to_memory_format(self, images: Tensor) -> Tensor:
        """Images in the memory format in which this release trains."""
        return images if self.no_channel_last else images.to(memory_format=torch.channels_last)


class OnlineKNN(WeightedKNNClassifier, UpdatingMetric):
    """solo-learn's online kNN on the torchmetrics of today."""


class FewClassesModel(LinearModel):
    """solo-learn's linear model for fewer than five classes, which its top-5 accuracy refuses."""

    def shared_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        if self.training and self.mixup_func is not None:
            return super().shared_step(batch, batch_idx)
        images, labels = batch
        logits = self(images)["logits"]
        acc1, top = accuracy_at_k(logits, labels, top_k=(1, self.classifier.out_features))
        loss = F.cross_entropy(logits, labels)
        return {"batch_size": len(images), "loss": loss, "acc1": acc1, "acc5": top}


def setting_names(method: str) -> set[str] | None:
    """The keys of ``method_kwargs`` that a method reads; None where it checks them itself."""
    # the host ignores others without a word; which ones it reads stands in its source only
    cls = METHODS.get(method)
    if cls is None or hasattr(cls, "settings_model"):
        return None
    classes = (c for c in cls.__mro__ if c.__module__.startswith("solo.methods"))
    return {n for c in classes for n in re.findall(r"method_kwargs\.(\w+)", inspect.getsource(c))}


def backbone_names() -> list[str]:
    """The values that ``backbone.name`` may have."""
    return list(BaseMethod._BACKBONES)


def build_backbone(cfg: DictConfig) -> nn.Module:
    """The backbone as solo-learn's methods build it: images to N × D features."""
    name = cfg.backbone.name
    kwargs = _plain(OmegaConf.select(cfg, "backbone.kwargs", default={}))
    method = cfg.get("pretrain_method") or cfg.get("method")
    backbone = BaseMethod._BACKBONES[name](method, **kwargs)
    if name.startswith("resnet"):
        backbone.fc = nn.Identity()
        if stem(cfg) == SMALL:
            backbone.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=2, bias=False)
            backbone.maxpool = nn.Identity()
    return backbone


def build_method(cfg: DictConfig, labels: bool = True) -> pl.LightningModule:
    """The method that ``cfg.method`` names.

    Args:
        cfg: a completed config.
        labels: False where an image has no label; the method logs nothing of labels then, and the
            data set is to give each image the label 0.
    """
    with dataset_of_stem(cfg), _without_knn(cfg):
        model = METHODS[cfg.method](cfg)
    if OmegaConf.select(cfg, "knn_eval.enabled", default=False):
        model.knn_eval = True
        model.knn = OnlineKNN(k=cfg.knn_eval.k, distance_fx=cfg.knn_eval.distance_func)
    if not labels:
        log_nothing_of_labels(model)
    return _as_in_its_scripts(model, cfg)


@contextmanager
def _without_knn(cfg: DictConfig) -> Iterator[None]:
    """Builds no online kNN: its constructor fails with torchmetrics 1."""
    enabled = OmegaConf.select(cfg, "knn_eval.enabled", default=False)
    OmegaConf.update(cfg, "knn_eval.enabled", False, force_add=True)
    try:
        yield
    finally:
        cfg.knn_eval.enabled = enabled


def build_linear(
    backbone: nn.Module,
    cfg: DictConfig,
    loss_func: Callable[..., Tensor] | None = None,
    mixup_func: Callable[..., Any] | None = None,
) -> pl.LightningModule:
    """solo-learn's linear (or fine-tuning) model on a backbone, from a completed config."""
    cls = LinearModel if cfg.data.num_classes >= 5 else FewClassesModel
    model = cls(backbone, loss_func=loss_func, mixup_func=mixup_func, cfg=cfg)
    return _as_in_its_scripts(model, cfg)


def _as_in_its_scripts(model: Any, cfg: DictConfig) -> Any:
    # a list of OmegaConf's would go into the optimiser's state, which no safe reader opens
    model.extra_optimizer_args = _plain(model.extra_optimizer_args)
    if cfg.performance.disable_channel_last:
        return model
    return model.to(memory_format=torch.channels_last)


def complete_pretrain_config(cfg: DictConfig) -> DictConfig:
    """Defaults and derived values, as main_pretrain.py computes them."""
    cfg = parse_pretrain(cfg)
    if cfg.optimizer.get("classifier_lr") is None:
        cfg.optimizer.classifier_lr = cfg.optimizer.lr
    if issubclass(METHODS[cfg.method], BaseMomentumMethod) and "momentum" not in cfg:
        cfg.momentum = {}  # all of its keys have defaults
    set_image_size(cfg, cfg.augmentations[0].crop_size)
    return cfg


def complete_linear_config(cfg: DictConfig) -> DictConfig:
    """Defaults and derived values, as main_linear.py computes them."""
    # there the linear model itself adds what it needs; here it is needed before that
    cfg = LinearModel.add_and_assert_specific_cfg(parse_linear(cfg))
    set_image_size(cfg, cfg.data.augmentations.crop_size)
    return cfg


def pretrain_transform(cfg: DictConfig) -> Callable[..., list[Tensor]]:
    """From an image to the views that a pretraining config asks for."""
    crops = []
    for aug in cfg.augmentations:
        pipeline = build_transform_pipeline(cfg.data.dataset, aug)
        for part in pipeline.transforms:
            if isinstance(part, Normalize):  # OmegaConf's lists would be converted for each image
                part.mean, part.std = [float(m) for m in part.mean], [float(s) for s in part.std]
        crops.append(NCropAugmentation(pipeline, aug.num_crops))
    return FullTransformPipeline(crops)


def dataset_transforms(dataset: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """solo-learn's training and evaluation transforms of one of its built-in data sets."""
    return prepare_transforms(dataset)


def _plain(node: Any) -> dict[str, Any]:
    plain: Any = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    return dict(plain)
