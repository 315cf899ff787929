"""Linear probes and fine-tuning from a config: checks, model and data, the run."""

import math
from collections.abc import Callable
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from timm.data import Mixup, create_transform
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

from metamask_solo.checkpoints.reading import config_beside, load_backbone
from metamask_solo.data.datasets import say
from metamask_solo.data.loaders import (
    classification_dataset,
    classification_datasets,
    count_classes,
    is_folder,
    plain_loader,
)
from metamask_solo.data.transforms import (
    complete_image_settings,
    evaluation_transform,
    image_settings,
    linear_training_transform,
)
from metamask_solo.errors import RunStopped
from metamask_solo.evaluation.features import extract_features
from metamask_solo.hosts import build_linear, complete_linear_config, pl, refuse_known_faults
from metamask_solo.training.callbacks import loss_of
from metamask_solo.training.config import one_line, read_probe_config
from metamask_solo.training.endings import print_ending
from metamask_solo.training.resume import STARTED_FROM, FitResult, identify
from metamask_solo.training.sampling import device_of, training_loader
from metamask_solo.training.trainer import fit

MOST_SCALED = 1024  # images whose features say by how much they are scaled
# mean squared norm of scaled features. On 270 images of features with a norm of 18, 100 steps at
# rates from 0.1 to 1 with momentum end within two points of logistic regression; so they do with
# three times as much
SQUARED_NORM = 20.0


def probe_run(cfg: DictConfig) -> FitResult:
    """Trains the probe, or backbone and probe with ``finetune``, and says what is there.

    Args:
        cfg: a composed config.

    Raises:
        UserError: something in the config, the data or the checkpoint cannot be used.
        RunStopped: a signal ended the run, its loss is not finite, or it diverged.
    """
    model, cfg, train_loader, val_loader = prepare_probe(cfg)
    if cfg.get("scale_features"):
        scale_classifier(model, cfg)
    first = FirstLoss()
    result = fit(model, cfg, train_loader, val_loader, "linear", (first,))
    if model.global_rank == 0:
        if result.folder.is_dir():
            print_ending(f"folder: {result.folder}", ["plot", result.folder])
        print(result)
    loss, chance = result.metrics.get("train_loss", 0.0), math.log(cfg.data.num_classes)
    if loss > max(1.1 * chance, first.loss):
        raise RunStopped(
            f"the probe diverged: its training loss rose from {first.loss:.3g} to {loss:.3g} "
            f"(guessing: {chance:.3g}); try scale_features=True or a lower optimizer.lr"
        )
    if result.stopped is not None:
        raise result.stopped
    return result


def prepare_probe(cfg: DictConfig, read_packed: bool = True) -> tuple[Any, DictConfig, Any, Any]:
    """Model, completed config and loaders; see :func:`.pretrain.prepare_pretraining`."""
    cfg = read_probe_config(cfg)
    with one_line():
        # first of all: solo-learn would fill in 224 pixels, and some backbones need the size
        run = config_beside(cfg.pretrained_feature_extractor)
        if run is not None:  # some methods have a backbone of their own
            cfg.pretrain_method = run.get("method") or run.get("pretrain_method")
        complete_image_settings(cfg, run)
        say(f"images: {image_settings(cfg)}")
        cfg = complete_linear_config(cfg)
        refuse_known_faults(cfg, pretrains=False)
        count_classes(cfg)
        pl.seed_everything(cfg.seed)
        masked = cfg.get("masked")
        backbone, checkpoint = load_backbone(cfg.pretrained_feature_extractor, masked, cfg)
        # of a run's folder the file in it: a probe of a newer one is another run
        cfg.pretrained_feature_extractor = str(checkpoint.path)
        if checkpoint.folded:
            OmegaConf.update(cfg, f"{STARTED_FROM}.folded", True, force_add=True)
        backbone.train(cfg.finetune)  # Lightning leaves the mode as it finds it
        model = build_linear(backbone, cfg, *_loss_and_mixup(cfg))
        if not is_folder(cfg) and not read_packed:
            return model, cfg, None, None
        train_transform = _auto_augment(cfg) if cfg.auto_augment else linear_training_transform(cfg)
        transforms = train_transform, evaluation_transform(cfg)
        train, val = classification_datasets(cfg, *transforms, checkpoint.path.parent)
        identify(cfg, train, val)
        cfg.data.class_names = list(getattr(train, "classes", []))
        val_loader = plain_loader(val, cfg.optimizer.batch_size, cfg.data.num_workers)
        train_loader = training_loader(train, cfg)
        return model, cfg, train_loader, val_loader


class ScaledLinear(nn.Linear):
    """A linear classifier of features that are divided by one number.

    Args:
        classifier: whose weights it starts with.
        scale: the number.
    """

    scale: Tensor

    def __init__(self, classifier: nn.Linear, scale: float):
        super().__init__(classifier.in_features, classifier.out_features)
        self.load_state_dict(classifier.state_dict())
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, features: Tensor) -> Tensor:
        """Logits, N × classes, of N × D features."""
        return super().forward(features / self.scale)


def scale_classifier(model: Any, cfg: DictConfig) -> None:
    """Gives a probe a classifier of features with a mean squared norm of ``SQUARED_NORM``.

    The rate at which a linear probe diverges goes down with the squared norm, which is 1 for some
    backbones and 5,000 for others. The number is measured on training images.
    """
    images = classification_dataset(cfg, "train", evaluation_transform(cfg))
    images.samples = images.samples[:: max(1, len(images) // MOST_SCALED)]
    loader = plain_loader(images, cfg.optimizer.batch_size, cfg.data.num_workers)
    features, _ = extract_features(model.backbone, loader, device_of(cfg), "scale")
    model.backbone.train(cfg.finetune)
    squared = float(features.double().square().sum(1).mean())
    model.classifier = ScaledLinear(model.classifier, math.sqrt(squared / SQUARED_NORM) or 1.0)
    say(f"scale_features: the features are divided by {float(model.classifier.scale):.3g}")


class FirstLoss(pl.Callback):  # type: ignore[name-defined]
    """Remembers the loss of the first batch of a run, whenever it is continued."""

    def __init__(self) -> None:
        self.loss = math.inf

    def on_train_batch_end(
        self, trainer: Any, model: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if math.isinf(self.loss):
            self.loss = float(loss_of(outputs))

    def state_dict(self) -> dict[str, Any]:
        return {"loss": self.loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss = state["loss"]


def _loss_and_mixup(cfg: DictConfig) -> tuple[Any, Any]:
    """Loss and mixup function of images that are mixed; else solo-learn takes its own."""
    if cfg.mixup > 0 or cfg.cutmix > 0:
        mixup = Mixup(
            mixup_alpha=cfg.mixup,
            cutmix_alpha=cfg.cutmix,
            label_smoothing=cfg.label_smoothing,
            num_classes=cfg.data.num_classes,
        )
        return SoftTargetCrossEntropy(), mixup
    return None, None


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
