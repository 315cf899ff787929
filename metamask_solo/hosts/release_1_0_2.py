"""solo-learn 1.0.2 of the package index: methods take keyword arguments.

Makes a host of this release, from YAML files in GitHub main's form. What it misses on Lightning 2
is bridged in ``bridges_1_0_2``, and its LARS replaced by that of ``lars_1_0_2``.
"""

import functools
import math
import os
from argparse import ArgumentParser
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from solo.args.utils import N_CLASSES_PER_DATASET
from solo.methods import METHODS, base, linear
from solo.methods.base import BaseMethod, BaseMomentumMethod
from solo.methods.linear import LinearModel
from solo.utils import whitening
from solo.utils.classification_dataloader import prepare_transforms
from solo.utils.knn import WeightedKNNClassifier
from solo.utils.pretrain_dataloader import prepare_n_crop_transform, prepare_transform
from torch import Tensor, nn

from metamask_solo.errors import UserError
from metamask_solo.hosts import bridges_1_0_2
from metamask_solo.hosts.bridges import bridge, note
from metamask_solo.hosts.lars_1_0_2 import LARS, lars_from_sgd
from metamask_solo.hosts.optimization import configure_like, plan_of
from metamask_solo.hosts.plugin_1_0_2 import PluginMethod as PluginMethod
from metamask_solo.hosts.resuming import make_resumable
from metamask_solo.hosts.stem import SMALL, stem
from metamask_solo.validation import validated

note(bridges_1_0_2.LinearWarmupCosineAnnealingLR)  # bolts_1_0_2.py offers it to the host
bridge(bridges_1_0_2.import_distutils)
bridge(bridges_1_0_2.bridge_validation, BaseMethod)
bridge(bridges_1_0_2.bridge_validation, LinearModel)
bridge(bridges_1_0_2.bridge_momentum_update, BaseMomentumMethod)
bridge(bridges_1_0_2.bridge_gradient_clipping, METHODS["dino"])
bridge(bridges_1_0_2.bridge_whitening, whitening)
bridge(bridges_1_0_2.bridge_cosine, WeightedKNNClassifier)
note(lars_from_sgd)
base.LARSWrapper = linear.LARSWrapper = lars_from_sgd

RELEASE = "1.0.2"
# LARS is a wrapper in this release, which does nothing: it scales the gradients of the step before
OPTIMIZERS: dict[str, Any] = {
    "sgd": torch.optim.SGD,
    "lars": LARS,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
LINEAR_OPTIMIZER_KEYS: tuple[str, ...] = ()
BACKBONE_PREFIX = "encoder."
CLASSES: dict[str, int] = N_CLASSES_PER_DATASET
DINO_WARMUP = 50
LARGE_CROPS: dict[str, tuple[float, float]] = {"byol": (2, math.inf), "wmse": (2, math.inf)}
SMALL_CROPS: tuple[str, ...] = ("byol", "simclr")


def setting_names(method: str) -> set[str] | None:
    found = METHODS.get(method)
    if found is None or hasattr(found, "settings_model"):
        return None
    return set(_argparse_defaults(found))


def backbone_names() -> list[str]:
    return list(BaseMethod._SUPPORTED_ENCODERS)


def build_backbone(cfg: DictConfig) -> nn.Module:
    # the base class builds and adjusts the backbone; this release has no function for that alone
    return BaseMethod(**_base_arguments(cfg)).encoder


def build_method(cfg: DictConfig) -> pl.LightningModule:
    method = METHODS[cfg.method]
    given = _plain(cfg, "method_kwargs")
    own = getattr(method, "settings_model", None)
    if own is not None:  # the base class would take an unknown key without a word
        validated(own, given, "method_kwargs.")
    defaults = {} if own else _argparse_defaults(method)
    arguments = {**defaults, **_base_arguments(cfg), **given}
    if issubclass(method, BaseMomentumMethod):
        arguments |= {
            "base_tau_momentum": OmegaConf.select(cfg, "momentum.base_tau", default=0.99),
            "final_tau_momentum": OmegaConf.select(cfg, "momentum.final_tau", default=1.0),
            "momentum_classifier": OmegaConf.select(cfg, "momentum.classifier", default=False),
        }
    model = method(**arguments)
    make_resumable(model)
    if model.knn_eval:
        model.knn.distance_fx = OmegaConf.select(
            cfg, "knn_eval.distance_func", default=model.knn.distance_fx
        )
    if method.configure_optimizers is BaseMethod.configure_optimizers:
        plan = plan_of(cfg, OPTIMIZERS[cfg.optimizer.name], model.accumulate_grad_batches)
        configure_like(model, plan, functools.partial(getattr, model, "learnable_params"))
    return model


def build_linear(
    backbone: nn.Module,
    cfg: DictConfig,
    loss_func: Callable[..., Tensor] | None = None,
    mixup_func: Callable[..., Any] | None = None,
) -> pl.LightningModule:
    if OmegaConf.select(cfg, "finetune", default=False):
        model_class: type = _FinetuneModel
    else:
        model_class = LinearModel
    if mixup_func is not None or OmegaConf.select(cfg, "label_smoothing", default=0):
        raise UserError("mixup, cutmix and label_smoothing: not in solo-learn 1.0.2; leave them 0")
    model = model_class(
        backbone,
        num_classes=cfg.data.num_classes,
        max_epochs=cfg.max_epochs,
        batch_size=cfg.optimizer.batch_size,
        lr=cfg.optimizer.lr,
        weight_decay=cfg.optimizer.weight_decay,
        scheduler=cfg.scheduler.name,
        **_optimizer_arguments(
            cfg, ("optimizer", "lars", "exclude_bias_n_norm", "extra_optimizer_args")
        ),
    )
    plan = plan_of(cfg, OPTIMIZERS[cfg.optimizer.name])
    configure_like(model, plan, functools.partial(_linear_groups, model))
    return model


def _linear_groups(model: Any) -> list[dict[str, Any]]:
    classifier = {"name": "classifier", "params": model.classifier.parameters()}
    if not isinstance(model, _FinetuneModel):
        return [classifier]
    return [{"name": "backbone", "params": model.backbone.parameters()}, classifier]


class _FinetuneModel(LinearModel):
    """This release's linear model with the backbone trained too, which it does not offer."""

    classifier: Any

    def __init__(self, backbone: nn.Module, **kwargs: Any):
        trained = [p for p in backbone.parameters() if p.requires_grad]  # not the mask
        super().__init__(backbone, **kwargs)
        for parameter in trained:
            parameter.requires_grad = True

    def forward(self, X: Tensor) -> dict[str, Tensor]:
        feats = self.backbone(X)
        return {"logits": self.classifier(feats), "feats": feats}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        _, loss, acc1, acc5 = self.shared_step(batch, batch_idx)
        log = {"train_loss": loss, "train_acc1": acc1, "train_acc5": acc5}
        self.log_dict(log, on_epoch=True, sync_dist=True)
        return loss


def complete_pretrain_config(cfg: DictConfig) -> DictConfig:
    _complete_shared(cfg)
    _default(cfg, "data.val_path", None)
    _default(cfg, "data.no_labels", False)
    sizes = [pipeline.crop_size for pipeline in cfg.augmentations]
    crops = [pipeline.num_crops for pipeline in cfg.augmentations]
    large = sum(n for n, size in zip(crops, sizes, strict=True) if size == sizes[0])
    cfg.data.num_large_crops, cfg.data.num_small_crops = large, sum(crops) - large
    if cfg.data.val_path is not None:
        cfg.optimizer.classifier_lr *= _lr_factor(cfg)
    _default(cfg, "optimizer.classifier_lr", cfg.optimizer.lr)
    return cfg


def complete_linear_config(cfg: DictConfig) -> DictConfig:
    _complete_shared(cfg)
    for key, value in {
        "pretrain_method": None,
        "finetune": False,
        "auto_augment": False,
        "label_smoothing": 0.0,
        "mixup": 0.0,
        "cutmix": 0.0,
    }.items():
        _default(cfg, key, value)
    return cfg


def _complete_shared(cfg: DictConfig) -> None:
    for key, value in {
        "checkpoint.enabled": False,
        "checkpoint.dir": "trained_models",
        "checkpoint.frequency": 1,
        "checkpoint.keep_prev": False,
        "auto_resume.enabled": False,
        "auto_resume.max_hours": 36,
        "data.format": "image_folder",
        "data.fraction": -1,
        "wandb.enabled": False,
        "wandb.entity": None,
        "wandb.project": "solo-learn",
        "wandb.offline": False,
        "seed": 5,
        "resume_from_checkpoint": None,
        "strategy": None,
        "num_nodes": 1,
        "accumulate_grad_batches": 1,
        "optimizer.kwargs": {},
        "backbone.kwargs": {},
        "method_kwargs": {},
    }.items():
        _default(cfg, key, value)
    if cfg.data.fraction > 0:
        raise UserError(f"data.fraction={cfg.data.fraction}: not in solo-learn 1.0.2; leave it -1")
    if cfg.data.dataset in N_CLASSES_PER_DATASET:
        cfg.data.num_classes = N_CLASSES_PER_DATASET[cfg.data.dataset]
    else:
        folders = sum(entry.is_dir() for entry in os.scandir(cfg.data.train_path))
        cfg.data.num_classes = max(1, folders)
    cfg.optimizer.lr *= _lr_factor(cfg)
    if cfg.optimizer.name in ("sgd", "lars"):
        _default(cfg, "optimizer.kwargs.momentum", 0.9)


def _lr_factor(cfg: DictConfig) -> float:
    """solo-learn's rates are for 256 images a step."""
    return cfg.optimizer.batch_size * len(cfg.devices) * cfg.num_nodes / 256


def _default(cfg: DictConfig, key: str, value: Any) -> None:
    missing = object()
    if OmegaConf.select(cfg, key, default=missing) is missing:
        OmegaConf.update(cfg, key, value, force_add=True)


def pretrain_transform(cfg: DictConfig) -> Callable[..., list[Tensor]]:
    transforms = [
        prepare_transform(cfg.data.dataset, **_transform_arguments(cfg.data.dataset, aug))
        for aug in cfg.augmentations
    ]
    return prepare_n_crop_transform(transforms, [aug.num_crops for aug in cfg.augmentations])


def _transform_arguments(dataset: str, aug: DictConfig) -> dict[str, Any]:
    if not aug.rrc.enabled or aug.equalization.prob:
        raise UserError(
            "augmentations: solo-learn 1.0.2 always crops (rrc.enabled) and cannot equalize"
        )
    arguments = {
        "brightness": aug.color_jitter.get("brightness", 0.0),
        "contrast": aug.color_jitter.get("contrast", 0.0),
        "saturation": aug.color_jitter.get("saturation", 0.0),
        "hue": aug.color_jitter.get("hue", 0.0),
        "color_jitter_prob": aug.color_jitter.prob,
        "gray_scale_prob": aug.grayscale.prob,
        "horizontal_flip_prob": aug.horizontal_flip.prob,
        "gaussian_prob": aug.gaussian_blur.prob,
        "solarization_prob": aug.solarization.prob,
        "min_scale": aug.rrc.crop_min_scale,
        "max_scale": aug.rrc.crop_max_scale,
        "crop_size": aug.crop_size,
    }
    if dataset == "custom":
        arguments |= {key: tuple(aug[key]) for key in ("mean", "std") if key in aug}
    return arguments


def dataset_transforms(dataset: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    return prepare_transforms(dataset)


def _base_arguments(cfg: DictConfig) -> dict[str, Any]:
    """Keyword arguments of BaseMethod; what a bare backbone does not need has a default."""

    def value(key: str, default: Any) -> Any:
        return OmegaConf.select(cfg, key, default=default)

    backbone_args = {
        **_plain(cfg, "backbone.kwargs"),
        "cifar": stem(cfg) == SMALL,
    }
    if not cfg.backbone.name.startswith("resnet"):
        crop = value("augmentations[0].crop_size", value("data.augmentations.crop_size", 224))
        backbone_args.setdefault("img_size", crop)
    return {
        "encoder": cfg.backbone.name,
        "num_classes": value("data.num_classes", 1),
        "backbone_args": backbone_args,
        "max_epochs": value("max_epochs", 1),
        "batch_size": value("optimizer.batch_size", 1),
        "lr": value("optimizer.lr", 0.0),
        "weight_decay": value("optimizer.weight_decay", 0.0),
        "classifier_lr": value("optimizer.classifier_lr", 0.0),
        "accumulate_grad_batches": value("accumulate_grad_batches", 1) or 1,
        "scheduler": value("scheduler.name", "none"),
        "min_lr": value("scheduler.min_lr", 0.0),
        "warmup_start_lr": value("scheduler.warmup_start_lr", 3e-5),
        "warmup_epochs": value("scheduler.warmup_epochs", 10),
        "lr_decay_steps": value("scheduler.lr_decay_steps", None),
        "num_large_crops": value("data.num_large_crops", 2),
        "num_small_crops": value("data.num_small_crops", 0),
        "knn_eval": value("knn_eval.enabled", False),
        "knn_k": value("knn_eval.k", 20),
        **_optimizer_arguments(cfg),
    }


def _optimizer_arguments(cfg: DictConfig, only: tuple[str, ...] = ()) -> dict[str, Any]:
    """GitHub main's ``lars_1_0_2`` is SGD inside a wrapper here."""
    extra = _plain(cfg, "optimizer.kwargs")
    name = OmegaConf.select(cfg, "optimizer.name", default="sgd")
    arguments = {
        "optimizer": "sgd" if name == "lars" else name,
        "lars": name == "lars",
        "eta_lars": extra.pop("eta", 1e-3),
        "grad_clip_lars": extra.pop("clip_lr", False),
        "exclude_bias_n_norm": extra.pop("exclude_bias_n_norm", False),
        "extra_optimizer_args": extra,
    }
    return {key: arguments[key] for key in only or arguments}


def _argparse_defaults(method: Any) -> dict[str, Any]:
    """This release keeps the defaults of a method's settings in its argument parser."""
    parser = ArgumentParser()
    method.add_model_specific_args(parser)
    base = ArgumentParser()
    BaseMethod.add_model_specific_args(base)
    shared = {action.dest for action in base._actions}
    return {a.dest: a.default for a in parser._actions if a.dest not in shared}


def _plain(cfg: DictConfig, key: str) -> dict[str, Any]:
    node = OmegaConf.select(cfg, key, default=None)
    return OmegaConf.to_container(node, resolve=True) if node is not None else {}  # type: ignore[return-value]
