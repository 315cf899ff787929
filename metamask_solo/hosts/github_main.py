"""solo-learn's GitHub main: methods take a config."""

import functools
import inspect
import math
import re
from collections.abc import Callable
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
from solo.utils.knn import WeightedKNNClassifier as WeightedKNNClassifier
from solo.utils.misc import param_groups_layer_decay
from torch import Tensor, nn
from torchvision.transforms import Normalize

from metamask_solo.errors import UserError
from metamask_solo.hosts.bridges import note
from metamask_solo.hosts.first_step import SIZED_BACKBONES
from metamask_solo.hosts.optimization import configure_like, plan_of
from metamask_solo.hosts.resuming import make_resumable
from metamask_solo.hosts.stem import SMALL, dataset_of_stem, stem
from metamask_solo.validation import Settings, validated

RELEASE = "main"
OPTIMIZERS = BaseMethod._OPTIMIZERS
LINEAR_OPTIMIZER_KEYS: tuple[str, ...] = ("layer_decay",)
BACKBONE_PREFIX = "backbone."
CLASSES: dict[str, int] = _N_CLASSES_PER_DATASET
DINO_WARMUP = 0
LARGE_CROPS: dict[str, tuple[float, float]] = {
    "byol": (2, math.inf),
    "mae": (1, math.inf),
    "simclr": (2, math.inf),
    "supcon": (2, math.inf),
    "wmse": (2, math.inf),
}
SMALL_CROPS = tuple(
    name
    for name, method in METHODS.items()
    if getattr(method, "multicrop_forward", None) is not BaseMethod.multicrop_forward
    and issubclass(method, BaseMethod)
)


class PluginMethod(BaseMethod):
    """Base of a method that brings settings of its own; see protocol.py."""

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
        given = _plain(cfg.method_kwargs)
        cfg.method_kwargs = validated(cls.settings_model, given, "method_kwargs.").plain()
        return cfg

    def to_memory_format(self, images: Tensor) -> Tensor:
        """Images in the memory format in which this release trains."""
        return images if self.no_channel_last else images.to(memory_format=torch.channels_last)


def setting_names(method: str) -> set[str] | None:
    # the host ignores others without a word; which ones it reads stands in its source only
    found = METHODS.get(method)
    if found is None or hasattr(found, "settings_model"):
        return None
    own = (c for c in found.__mro__ if c.__module__.startswith("solo.methods"))
    return {n for c in own for n in re.findall(r"method_kwargs\.(\w+)", inspect.getsource(c))}


def backbone_names() -> list[str]:
    return list(BaseMethod._BACKBONES)


def build_backbone(cfg: DictConfig) -> nn.Module:
    name = cfg.backbone.name
    kwargs = _plain(OmegaConf.select(cfg, "backbone.kwargs", default={}))
    backbone = BaseMethod._BACKBONES[name](
        cfg.get("pretrain_method") or cfg.get("method"), **kwargs
    )
    if name.startswith("resnet"):
        backbone.fc = nn.Identity()
        if stem(cfg) == SMALL:
            backbone.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=2, bias=False)
            backbone.maxpool = nn.Identity()
    return backbone


def build_method(cfg: DictConfig) -> pl.LightningModule:
    with dataset_of_stem(cfg):
        model = METHODS[cfg.method](cfg)
    make_resumable(model)
    if type(model).configure_optimizers is BaseMethod.configure_optimizers:
        plan = plan_of(cfg, OPTIMIZERS[cfg.optimizer.name], _accumulation(cfg))
        configure_like(model, plan, functools.partial(getattr, model, "learnable_params"))
    if not cfg.performance.disable_channel_last:
        model = model.to(memory_format=torch.channels_last)
    return model


def build_linear(
    backbone: nn.Module,
    cfg: DictConfig,
    loss_func: Callable[..., Tensor] | None = None,
    mixup_func: Callable[..., Any] | None = None,
) -> pl.LightningModule:
    model = LinearModel(backbone, loss_func=loss_func, mixup_func=mixup_func, cfg=cfg)
    plan = plan_of(cfg, OPTIMIZERS[cfg.optimizer.name])
    configure_like(model, plan, functools.partial(_linear_groups, model))
    if not cfg.performance.disable_channel_last:
        model = model.to(memory_format=torch.channels_last)
    return model


def _accumulation(cfg: DictConfig) -> int:
    return cfg.accumulate_grad_batches or 1


def _linear_groups(model: Any) -> list[dict[str, Any]]:
    classifier = {"name": "classifier", "params": model.classifier.parameters()}
    if not model.finetune:
        return [classifier]
    if not model.layer_decay:
        return [{"name": "backbone", "params": model.backbone.parameters()}, classifier]
    if not hasattr(model.backbone, "no_weight_decay"):
        raise UserError(
            f"optimizer.layer_decay={model.layer_decay}: only for backbones made of layers that "
            "say no_weight_decay (ViT, Swin)"
        )
    groups: list[dict[str, Any]] = param_groups_layer_decay(
        model.backbone,
        model.weight_decay,
        no_weight_decay_list=model.backbone.no_weight_decay(),
        layer_decay=model.layer_decay,
    )
    return [*groups, classifier]


def complete_pretrain_config(cfg: DictConfig) -> DictConfig:
    cfg = parse_pretrain(cfg)
    if issubclass(METHODS[cfg.method], BaseMomentumMethod) and "momentum" not in cfg:
        cfg.momentum = {}  # all of its keys have defaults
    _set_image_size(cfg, cfg.augmentations[0].crop_size)
    return cfg


def complete_linear_config(cfg: DictConfig) -> DictConfig:
    # there the linear model itself adds what it needs; here it is needed before that
    cfg = LinearModel.add_and_assert_specific_cfg(parse_linear(cfg))
    _set_image_size(cfg, cfg.data.augmentations.crop_size)
    return cfg


def _set_image_size(cfg: DictConfig, crop_size: int) -> None:
    """Swin and ViT are built for one size of images, and take 224 for it, always."""
    if cfg.backbone.name.startswith(SIZED_BACKBONES) and crop_size != 224:
        cfg.backbone.kwargs = OmegaConf.select(cfg, "backbone.kwargs") or {}
        cfg.backbone.kwargs.setdefault("img_size", crop_size)


note(_set_image_size)


def pretrain_transform(cfg: DictConfig) -> Callable[..., list[Tensor]]:
    crops = []
    for aug in cfg.augmentations:
        pipeline = build_transform_pipeline(cfg.data.dataset, aug)
        for part in pipeline.transforms:
            if isinstance(part, Normalize):  # OmegaConf's lists would be converted for each image
                part.mean, part.std = [float(m) for m in part.mean], [float(s) for s in part.std]
        crops.append(NCropAugmentation(pipeline, aug.num_crops))
    return FullTransformPipeline(crops)


def dataset_transforms(dataset: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    return prepare_transforms(dataset)


def _plain(node: Any) -> dict[str, Any]:
    plain: Any = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    return dict(plain)
