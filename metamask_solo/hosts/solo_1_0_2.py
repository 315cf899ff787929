"""solo-learn 1.0.2 of the package index, brought to the behaviour of GitHub main.

Methods of this release take keyword arguments, and were written for Lightning 1. A run of ours uses
subclasses of them, made here: from YAML files in GitHub main's form, with its schedule by steps, on
Lightning 2. The classes of solo-learn stay as they are. What cannot be brought to GitHub main's
behaviour is refused (:mod:`metamask_solo.hosts.faults`).

To drop this release, delete this file, ``pl_bolts.py`` and its branch in ``hosts/__init__.py``.
"""

import difflib
import distutils.util  # noqa: F401  DINO uses it, but imports distutils alone
import functools
import os
from argparse import ArgumentParser
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from solo.args.utils import N_CLASSES_PER_DATASET
from solo.methods import DINO, METHODS, WMSE
from solo.methods.base import BaseMethod, BaseMomentumMethod
from solo.methods.linear import LinearModel
from solo.utils.classification_dataloader import prepare_transforms
from solo.utils.knn import WeightedKNNClassifier
from solo.utils.metrics import accuracy_at_k
from solo.utils.pretrain_dataloader import prepare_n_crop_transform, prepare_transform
from solo.utils.whitening import Whitening2d
from torch import Tensor, nn
from torch.nn import functional as F

from metamask_solo.errors import UserError
from metamask_solo.hosts.shared import UpdatingMetric, log_nothing_of_labels, process_count
from metamask_solo.hosts.stem import SMALL, set_image_size, stem
from metamask_solo.validation import Settings, unknown, validated

RELEASE = "1.0.2"
OPTIMIZERS: dict[str, Any] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
BACKBONE_PREFIX = "encoder."
CLASSES: dict[str, int] = N_CLASSES_PER_DATASET
SMALL_CROPS: tuple[str, ...] = ("byol", "simclr")


class Lightning2:
    """For every model of this release: what Lightning 2 calls otherwise than Lightning 1."""

    # hides the method from Lightning, which refuses a model that has it; super() still reaches it
    validation_epoch_end = None

    def on_validation_epoch_start(self) -> None:
        self._validation_outputs: list[Any] = []

    def on_validation_batch_end(
        self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._validation_outputs.append(outputs)

    def on_validation_epoch_end(self) -> None:
        super().validation_epoch_end(self._validation_outputs)  # type: ignore[misc]


class Optimization:
    """For every model of a run: ``warmup_cosine`` moves by steps, as in GitHub main.

    Attributes:
        scheduler_interval: ``step``, or ``epoch`` as this release has it.
    """

    scheduler_interval = "step"

    def configure_optimizers(self: Any) -> Any:
        epochs, warmup = self.max_epochs, self.warmup_epochs
        by_step = self.scheduler == "warmup_cosine" and self.scheduler_interval == "step"
        if by_step:  # what this release counts in epochs
            self.max_epochs = self.trainer.estimated_stepping_batches
            self.warmup_epochs = warmup * (self.max_epochs / epochs)
        try:
            made = BaseMethod.configure_optimizers(self)  # of the linear model, too
        finally:
            self.max_epochs, self.warmup_epochs = epochs, warmup
        if not by_step:
            return made
        (optimizer,), (schedule,) = made
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Momentum:
    """For methods with a momentum encoder: τ moves by the steps that the run takes.

    This release counts the whole loader, whatever the limits of the trainer are.
    """

    def on_train_batch_end(self: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step > self.last_step:
            for pair in self.momentum_pairs:
                self.momentum_updater.update(*pair)
            self.log("tau", self.momentum_updater.cur_tau)
            self.momentum_updater.update_tau(
                cur_step=self.trainer.global_step,
                max_steps=self.trainer.estimated_stepping_batches,
            )
        self.last_step = self.trainer.global_step


class ClippingDINO:
    """For DINO, whose own ``clip_gradients(value)`` has the name of a method of Lightning's."""

    def clip_gradients(self, first: Any, *args: Any, **kwargs: Any) -> None:
        """Lightning's with what Lightning gives, else DINO's."""
        if args or kwargs:
            pl.LightningModule.clip_gradients(self, first, *args, **kwargs)  # type: ignore[arg-type]
        else:
            DINO.clip_gradients(self, first)


class Whitening(Whitening2d):
    """W-MSE's whitening without ``torch.cholesky``, which torch no longer has."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            centred = x.float() - x.float().mean(0)
            covariance = centred.T @ centred / (len(x) - 1)
            shrunk = (1 - self.eps) * covariance + self.eps * torch.eye(len(covariance)).to(x)
            factor = torch.linalg.cholesky(shrunk)
            return torch.linalg.solve_triangular(factor, centred.T, upper=False).T


class OnlineKNN(WeightedKNNClassifier, UpdatingMetric):
    """The online kNN on the torchmetrics of today; a cosine is that of normalised features."""

    def update(self, **banks: Any) -> None:
        if self.distance_fx == "cosine":
            banks = {k: F.normalize(v) if "features" in k else v for k, v in banks.items()}
        WeightedKNNClassifier.update(self, **banks)


@functools.cache
def for_a_run(cls: Any) -> type:
    """The subclass of a method of this release that a run uses."""
    mixins: list[type] = []
    if cls.configure_optimizers is BaseMethod.configure_optimizers:
        mixins.append(Optimization)
    if not issubclass(cls, Lightning2):
        mixins.append(Lightning2)
    if issubclass(cls, BaseMomentumMethod):
        mixins.append(Momentum)
    if issubclass(cls, DINO):
        mixins.append(ClippingDINO)
    rebuilt = {"__reduce__": lambda self: (_blank, (cls,), self.__getstate__())}
    return type(cls.__name__, (*mixins, cls), {"__module__": __name__, **rebuilt})


def _blank(cls: Any) -> Any:
    """What another process unpickles an instance into."""
    return object.__new__(for_a_run(cls))


class PluginMethod(Lightning2, BaseMethod):
    """Base of a method of one's own; see github_main.py. Takes keyword arguments."""

    settings_model: type[Settings]

    def __init__(self, **kwargs: Any):
        names = self.settings_model.model_fields.keys() & kwargs.keys()
        settings = {name: kwargs.pop(name) for name in names}
        for name in kwargs:  # the base class takes any keyword, so only a misspelt one is seen
            if difflib.get_close_matches(name, self.settings_model.model_fields, cutoff=0.8):
                raise unknown(name, self.settings_model.model_fields)
        super().__init__(**kwargs)
        if self.lars:
            raise UserError("lars=True: does not work in this release; GitHub main has it")
        self.settings = validated(self.settings_model, settings)
        self.optimizer_name: str = self.optimizer

    @property
    def backbone(self) -> nn.Module:
        return self.encoder

    def base_forward(self, X: Tensor) -> dict[str, Any]:
        """What the shared steps of this release call; GitHub main's call ``forward``."""
        return self.forward(X)

    def to_memory_format(self, images: Tensor) -> Tensor:
        return images


class Classifier(Optimization, Lightning2, LinearModel):
    """The linear model; it also trains the backbone (``finetune``), as GitHub main's does.

    Args:
        backbone: images to N × D features.
        finetune: trains what of it requires a gradient.
        kwargs: as for solo-learn's methods.
    """

    classifier: Any

    def __init__(self, backbone: nn.Module, finetune: bool, **kwargs: Any):
        trained = [p for p in backbone.parameters() if p.requires_grad]  # not the mask
        super().__init__(backbone, **kwargs)
        for name in ("warmup_epochs", "warmup_start_lr", "min_lr"):
            setattr(self, name, kwargs[name])
        self.finetune = finetune
        for parameter in trained if finetune else ():
            parameter.requires_grad = True

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        parts = ("backbone", "classifier") if self.finetune else ("classifier",)
        return [{"name": part, "params": getattr(self, part).parameters()} for part in parts]

    def forward(self, X: Tensor) -> dict[str, Tensor]:
        with torch.set_grad_enabled(self.finetune and torch.is_grad_enabled()):
            feats = self.backbone(X)
        return {"logits": self.classifier(feats), "feats": feats}

    def shared_step(self, batch: Any, batch_idx: int) -> Any:
        images, labels = batch
        logits = self(images)["logits"]
        top = min(5, logits.shape[1])  # this release takes five classes or more
        acc1, acc5 = accuracy_at_k(logits, labels, top_k=(1, top))
        return len(images), F.cross_entropy(logits, labels), acc1, acc5

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if not self.finetune:
            self.backbone.eval()
        _, loss, acc1, acc5 = self.shared_step(batch, batch_idx)
        log = {"train_loss": loss, "train_acc1": acc1, "train_acc5": acc5}
        self.log_dict(log, on_epoch=True, sync_dist=True)
        return loss


def setting_names(method: str) -> set[str] | None:
    cls = METHODS.get(method)
    if cls is None or hasattr(cls, "settings_model"):
        return None
    return set(_argparse_defaults(cls))


def backbone_names() -> list[str]:
    return list(BaseMethod._SUPPORTED_ENCODERS)


def build_backbone(cfg: DictConfig) -> nn.Module:
    name, method = cfg.backbone.name, cfg.get("pretrain_method") or cfg.get("method")
    if method in ("mae", "mocov3") and name in ("vit_tiny", "vit_small"):
        # the weights would fit, and the features would be others
        raise UserError(
            f"backbone.name={name}: that of {method} has 12 heads, which solo-learn 1.0.2 cannot "
            "build; GitHub main has it"
        )
    # the base class builds and adjusts the backbone; this release has no function for that alone
    return BaseMethod(**_base_arguments(cfg)).encoder


def build_method(cfg: DictConfig, labels: bool = True) -> pl.LightningModule:
    method = METHODS[cfg.method]
    settings = _value(cfg, "method_kwargs", {})
    if hasattr(method, "settings_model"):  # checked here, where the key has its prefix
        validated(method.settings_model, settings, "method_kwargs.")
    arguments = {**_base_arguments(cfg), **settings}
    if issubclass(method, BaseMomentumMethod):
        arguments |= {
            "base_tau_momentum": _value(cfg, "momentum.base_tau", 0.99),
            "final_tau_momentum": _value(cfg, "momentum.final_tau", 1.0),
            "momentum_classifier": _value(cfg, "momentum.classifier", False),
        }
    model: Any = for_a_run(method)(**arguments)
    model.scheduler_interval = _value(cfg, "scheduler.interval", "step")
    if isinstance(model, WMSE):
        model.whitening = Whitening(model.whitening.output_dim, model.whitening.eps)
    if _value(cfg, "knn_eval.enabled", False):
        distance = _value(cfg, "knn_eval.distance_func", "euclidean")
        model.knn_eval, model.knn = True, OnlineKNN(k=model.knn_k, distance_fx=distance)
    if not labels:
        log_nothing_of_labels(model)
    return model


def build_linear(
    backbone: nn.Module,
    cfg: DictConfig,
    loss_func: Callable[..., Tensor] | None = None,
    mixup_func: Callable[..., Any] | None = None,
) -> pl.LightningModule:
    model: Any = Classifier(backbone, _value(cfg, "finetune", False), **_base_arguments(cfg))
    model.scheduler_interval = _value(cfg, "scheduler.interval", "step")
    return model


def complete_pretrain_config(cfg: DictConfig) -> DictConfig:
    _complete_shared(cfg)
    _default(cfg, {"data.val_path": None, "data.no_labels": False})
    sizes = [pipeline.crop_size for pipeline in cfg.augmentations]
    crops = [pipeline.num_crops for pipeline in cfg.augmentations]
    large = sum(n for n, size in zip(crops, sizes, strict=True) if size == sizes[0])
    cfg.data.num_large_crops, cfg.data.num_small_crops = large, sum(crops) - large
    if cfg.data.val_path is not None and cfg.optimizer.get("classifier_lr") is not None:
        cfg.optimizer.classifier_lr *= _lr_factor(cfg)
    if cfg.optimizer.get("classifier_lr") is None:
        cfg.optimizer.classifier_lr = cfg.optimizer.lr
    if not hasattr(METHODS[cfg.method], "settings_model"):
        defaults = _argparse_defaults(METHODS[cfg.method])
        _default(cfg, {f"method_kwargs.{name}": value for name, value in defaults.items()})
    set_image_size(cfg, sizes[0])
    return cfg


def complete_linear_config(cfg: DictConfig) -> DictConfig:
    _complete_shared(cfg)
    off = dict.fromkeys(("label_smoothing", "mixup", "cutmix"), 0.0)
    _default(cfg, {"pretrain_method": None, "finetune": False, "auto_augment": False, **off})
    set_image_size(cfg, _value(cfg, "data.augmentations.crop_size", 224))
    return cfg


def _complete_shared(cfg: DictConfig) -> None:
    defaults: dict[str, Any] = {
        "data.format": "image_folder",
        "data.fraction": -1,
        "strategy": None,
        "num_nodes": 1,
        "accumulate_grad_batches": 1,
        "optimizer.kwargs": {},
        "optimizer.exclude_bias_n_norm_wd": False,
        "backbone.kwargs": {},
        "method_kwargs": {},
        "scheduler.interval": "step",
    }
    _default(cfg, defaults)
    if cfg.data.dataset in N_CLASSES_PER_DATASET:
        cfg.data.num_classes = N_CLASSES_PER_DATASET[cfg.data.dataset]
    else:
        folders = sum(entry.is_dir() for entry in os.scandir(cfg.data.train_path))
        cfg.data.num_classes = max(1, folders)
    cfg.optimizer.lr *= _lr_factor(cfg)
    if cfg.optimizer.name == "sgd":
        _default(cfg, {"optimizer.kwargs.momentum": 0.9})


def _lr_factor(cfg: DictConfig) -> float:
    """solo-learn's rates are for 256 images a step."""
    return cfg.optimizer.batch_size * process_count(cfg) / 256


def _default(cfg: DictConfig, values: dict[str, Any]) -> None:
    missing = object()
    for key, value in values.items():
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
    jitter = ("brightness", "contrast", "saturation", "hue")
    arguments = {name: aug.color_jitter.get(name, 0.0) for name in jitter} | {
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
    value = functools.partial(_value, cfg)
    return {
        "encoder": cfg.backbone.name,
        "num_classes": value("data.num_classes", 1),
        "backbone_args": {**value("backbone.kwargs", {}), "cifar": stem(cfg) == SMALL},
        "max_epochs": value("max_epochs", 1),
        "batch_size": value("optimizer.batch_size", 1),
        "optimizer": value("optimizer.name", "sgd"),
        "lars": False,
        "exclude_bias_n_norm": False,
        "extra_optimizer_args": value("optimizer.kwargs", {}),
        "lr": value("optimizer.lr", 0.0),
        "weight_decay": value("optimizer.weight_decay", 0.0),
        "classifier_lr": value("optimizer.classifier_lr", 0.0),
        "accumulate_grad_batches": value("accumulate_grad_batches", 1),
        "scheduler": value("scheduler.name", "none"),
        "min_lr": value("scheduler.min_lr", 0.0),
        "warmup_start_lr": value("scheduler.warmup_start_lr", 3e-5),
        "warmup_epochs": value("scheduler.warmup_epochs", 10),
        "lr_decay_steps": value("scheduler.lr_decay_steps", None),
        "num_large_crops": value("data.num_large_crops", 2),
        "num_small_crops": value("data.num_small_crops", 0),
        "knn_k": value("knn_eval.k", 20),
    }


def _argparse_defaults(method: Any) -> dict[str, Any]:
    """This release keeps the defaults of a method's settings in its argument parser."""
    parser = ArgumentParser()
    method.add_model_specific_args(parser)
    base = ArgumentParser()
    BaseMomentumMethod.add_model_specific_args(base)
    shared = {action.dest for action in base._actions}
    return {a.dest: a.default for a in parser._actions if a.dest not in shared}


def _value(cfg: DictConfig, key: str, default: Any) -> Any:
    """The value of a key as plain Python; the default where it is missing or null."""
    value = OmegaConf.select(cfg, key, default=None)
    value = default if value is None else value
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
