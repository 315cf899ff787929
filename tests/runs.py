"""Small real runs for the tests: a data folder of noise images, a config, and training on it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import nn

PROJECTOR = {"proj_hidden_dim": 16, "proj_output_dim": 16}
SMALL_HEADS = PROJECTOR | {"contrastive_hidden_dim": 16, "contrastive_output_dim": 8}
METHOD_KWARGS = {
    "metamask": SMALL_HEADS,
    "simclr": PROJECTOR | {"temperature": 0.2},
    "byol": PROJECTOR | {"pred_hidden_dim": 16},
}


def write_images(root: Path, classes: int = 5, train: int = 4, val: int = 2) -> Path:
    """Class folders of 32 × 32 noise images under root/train and root/val."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / split / f"class_{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def image_loader(folder: Path, cfg: DictConfig | None = None, num_workers: int = 0) -> Any:
    """A loader of class folders, with a run's evaluation transform where there is a run."""
    from torchvision.transforms import ToTensor

    from metamask_solo.data.datasets import read_folder
    from metamask_solo.data.loaders import plain_loader
    from metamask_solo.data.read_image import DEFAULT_RULE, reading_rule
    from metamask_solo.data.transforms import evaluation_transform

    rule = DEFAULT_RULE if cfg is None else reading_rule(cfg)
    transform = ToTensor() if cfg is None else evaluation_transform(cfg)
    images = replace(read_folder(folder, "data", True, rule), transform=transform)
    return plain_loader(images, 256, num_workers)


def pretrain_config(
    data: Path, out: Path, method: str = "metamask", **overrides: Any
) -> DictConfig:
    """A config in GitHub main's form for a few steps on the CPU; overrides are dotted keys."""
    jitter = {"prob": 0.0, "brightness": 0.1, "contrast": 0.1, "saturation": 0.1, "hue": 0.1}
    pipeline = {
        "rrc": {"enabled": True, "crop_min_scale": 0.5, "crop_max_scale": 1.0},
        "color_jitter": jitter,
        **{
            key: {"prob": 0.0}
            for key in ("grayscale", "gaussian_blur", "solarization", "equalization")
        },
        "horizontal_flip": {"prob": 0.5},
        "crop_size": 32,
        "num_crops": 2,
    }
    cfg = OmegaConf.create(
        {
            "name": f"{method}-test",
            "method": method,
            "seed": 1,
            "backbone": {"name": "resnet18", "kwargs": {}},
            "method_kwargs": dict(METHOD_KWARGS.get(method, {})),
            "data": {
                "dataset": "custom",
                "train_path": str(data / "train"),
                "val_path": str(data / "val"),
                "format": "image_folder",
                "num_workers": 0,
            },
            "augmentations": [pipeline],
            "optimizer": {
                "name": "sgd",
                "batch_size": 10,
                "lr": 0.5,
                "classifier_lr": 0.1,
                "weight_decay": 1e-4,
            },
            "scheduler": {"name": "none"},
            "checkpoint": {"enabled": True, "dir": str(out), "frequency": 1},
            "auto_resume": {"enabled": False},
            "wandb": {"enabled": False},
            "max_epochs": 1,
            "devices": "1",
            "accelerator": "cpu",
            "strategy": "auto",
            "precision": 32,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
        }
    )
    OmegaConf.set_struct(cfg, False)
    for key, value in overrides.items():
        OmegaConf.update(cfg, key.replace("__", "."), value, force_add=True)
    return cfg


def use_small_backbone(model: Any) -> None:
    """Puts a network of a few milliseconds in the place of a ResNet-18, with as many features."""
    from metamask_solo.hosts import BACKBONE_PREFIX

    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(4)]
    backbone = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 512))
    setattr(model, BACKBONE_PREFIX.rstrip("."), backbone)


def train(cfg: DictConfig, *callbacks: Any, small: bool = False) -> tuple[Any, Any]:
    """Pretrains in this process; returns the trained module and the result of fit."""
    from metamask_solo.training.pretrain import prepare_pretraining
    from metamask_solo.training.trainer import fit

    model, cfg, train_loader, val_loader = prepare_pretraining(cfg)
    if small:
        use_small_backbone(model)
    return model, fit(model, cfg, train_loader, val_loader, cfg.method, callbacks)
