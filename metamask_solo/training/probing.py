"""Linear probes and fine-tuning from a config: checks, model and data, the run."""

from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig
from timm.data import Mixup, create_transform
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from metamask_solo.checkpoints.reading import config_beside, load_backbone
from metamask_solo.data.datasets import say, write_fingerprints
from metamask_solo.data.loaders import classification_datasets, count_classes, plain_loader
from metamask_solo.data.transforms import (
    complete_image_settings,
    evaluation_transform,
    image_settings,
    linear_training_transform,
)
from metamask_solo.hosts import build_linear, complete_linear_config, pl
from metamask_solo.training.config_checks import (
    buildable,
    check_faults,
    check_linear_config,
)
from metamask_solo.training.endings import print_ending
from metamask_solo.training.hydra_app import open_config
from metamask_solo.training.resume import FitResult, identify
from metamask_solo.training.sampling import training_loader
from metamask_solo.training.trainer import build_trainer, fit


def probe_run(cfg: DictConfig) -> FitResult:
    """Trains the probe, or backbone and probe with ``finetune``, and prints the last line.

    Args:
        cfg: a composed config.
    """
    model, cfg, train_loader, val_loader = prepare_probe(open_config(cfg))
    result = fit(model, cfg, train_loader, val_loader, "linear")
    if model.global_rank == 0:
        if cfg.get("finetune") and result.folder.is_dir():
            write_fingerprints(train_loader.dataset, result.folder)
        print(result)
        print_ending(f"folder: {result.folder}", ["plot", result.folder])
    if result.stopped is not None:
        raise result.stopped
    return result


def check_probe(cfg: DictConfig) -> DictConfig:
    """Validates the config and builds model, data and trainer; trains and writes nothing.

    Returns:
        The completed config.
    """
    _, prepared, *_ = prepare_probe(open_config(cfg))
    build_trainer(prepared, [], [])
    return prepared


def prepare_probe(cfg: DictConfig) -> tuple[Any, DictConfig, Any, Any]:
    """Model, completed config and loaders; raises UserError before anything is written."""
    check_linear_config(cfg)
    masked = cfg.get("masked")
    with buildable():
        # first of all: solo-learn would fill in 224 pixels, and some backbones need the size
        complete_image_settings(cfg, config_beside(cfg.pretrained_feature_extractor))
        say(f"images: {image_settings(cfg)}")
        cfg = complete_linear_config(cfg)
        count_classes(cfg)
        pl.seed_everything(cfg.seed)
        backbone, checkpoint = load_backbone(cfg.pretrained_feature_extractor, masked, cfg)
        # of a run's folder the file in it: a probe of a newer one is another run
        cfg.pretrained_feature_extractor = str(checkpoint.path)
        backbone.train(cfg.finetune)  # Lightning leaves the mode as it finds it
        model = build_linear(backbone, cfg, *_loss_and_mixup(cfg))
        train_transform = _auto_augment(cfg) if cfg.auto_augment else linear_training_transform(cfg)
        transforms = train_transform, evaluation_transform(cfg)
        train, val = classification_datasets(cfg, *transforms, checkpoint.path.parent)
        identify(cfg, train, val)
        val_loader = plain_loader(val, cfg.optimizer.batch_size, cfg.data.num_workers)
        train_loader = training_loader(train, cfg)
        check_faults(model, cfg, train_loader, "linear")
        return model, cfg, train_loader, val_loader


def _loss_and_mixup(cfg: DictConfig) -> tuple[Any, Any]:
    """Loss and mixup function, from the same keys and in the same cases as main_linear.py."""
    if cfg.mixup > 0 or cfg.cutmix > 0:
        mixup = Mixup(
            mixup_alpha=cfg.mixup,
            cutmix_alpha=cfg.cutmix,
            label_smoothing=cfg.label_smoothing,
            num_classes=cfg.data.num_classes,
        )
        return SoftTargetCrossEntropy(), mixup
    if cfg.label_smoothing > 0:
        return LabelSmoothingCrossEntropy(smoothing=cfg.label_smoothing), None
    return nn.CrossEntropyLoss(), None


def _auto_augment(cfg: DictConfig) -> Any:
    """timm's RandAugment, of the size and with the normalisation of the validation images."""
    settings = image_settings(cfg)
    transform = create_transform(
        settings.size,
        is_training=True,
        color_jitter=0.0,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.25,
        mean=settings.mean,
        std=settings.std,
    )
    for part in transform.transforms:
        for operation in getattr(part, "ops", []):
            if "Posterize" in operation.name:
                operation.level_fn = _AtLeastOneBit(operation.level_fn)
    return transform


class _AtLeastOneBit:
    """timm's strength of Posterize goes down to 0 bits, which Pillow no longer takes."""

    def __init__(self, level: Callable[..., tuple[Any, ...]]):
        self.level = level

    def __call__(self, *arguments: Any) -> tuple[int]:
        return (max(1, int(self.level(*arguments)[0])),)
