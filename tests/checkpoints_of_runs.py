"""Checkpoints of untrained runs, for the tests of what reads checkpoints."""

import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from runs import pretrain_config
from torch import Tensor, nn
from torchvision.datasets import ImageFolder

from metamask_solo.hosts import (
    BACKBONE_PREFIX,
    build_backbone,
    build_method,
    complete_pretrain_config,
)


def write_run(folder: Path, data: Path, method: str = "metamask", **changes: Any) -> Path:
    """A checkpoint of ``metamask`` with a random mask, or of ``simclr``, and its args.json."""
    torch.manual_seed(0)
    config = complete_pretrain_config(pretrain_config(data, folder, method, **changes))
    model = build_method(config)
    content = {"epoch": 0, "global_step": 2, "state_dict": model.state_dict()}
    if method == "metamask":
        with torch.no_grad():
            model.mask.logits.normal_(std=3.0)
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(OmegaConf.to_container(config)))
    torch.save(content, folder / "run.ckpt")
    return folder / "run.ckpt"


def read_by_torchvision(folder: Path) -> tuple[Tensor, Tensor]:
    """Images and labels of class folders, with the evaluation transform of such a run."""

    def transform(image: Any) -> Tensor:
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(32, 32, 3)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        return ((pixels / 255 - mean) / std).permute(2, 0, 1)

    data = ImageFolder(str(folder), transform)
    return torch.stack([image for image, _ in data]), torch.tensor(data.targets)


def backbone_config(name: str, dataset: str = "imagenet100", **kwargs: Any) -> DictConfig:
    """The least that describes a backbone; small images and patches for transformers."""
    if name.startswith("vit"):
        kwargs = {"img_size": 32, "patch_size": 16, **kwargs}
    elif name.startswith("swin"):
        kwargs = {"img_size": 64, "window_size": 2, **kwargs}
    backbone = {"name": name, "kwargs": kwargs}
    return OmegaConf.create(
        {"method": "metamask", "backbone": backbone, "data": {"dataset": dataset}}
    )


def random_backbone(config: DictConfig) -> nn.Module:
    """A backbone whose norms, biases and layer scales are no ones and zeros."""
    backbone = build_backbone(config).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(-0.5, 1.5)
    return backbone


def random_images(name: str, count: int = 2) -> Tensor:
    """Images of a size that the backbone of that name takes."""
    size = 32 if name.startswith(("vit", "wide_resnet")) else 64
    return torch.randn(count, 3, size, size)


def write_backbone_run(
    folder: Path, name: str, dataset: str = "imagenet100", mask: bool = True, **changes: Any
) -> tuple[Path, Tensor, Tensor]:
    """A checkpoint that holds a backbone, and mask logits where there is a mask.

    Returns:
        The file, images, and their features, masked where there is a mask.
    """
    config = OmegaConf.merge(backbone_config(name, dataset), changes)
    backbone, images = random_backbone(config), random_images(name)
    with torch.no_grad():
        features = backbone(images)
    state = {BACKBONE_PREFIX + key: value for key, value in backbone.state_dict().items()}
    raw: dict[str, Any] = {"epoch": 1, "state_dict": state}
    if mask:
        logits = torch.randn(features.shape[1])
        logits[0] = -200.0  # as a sigmoid mask, 0 in float32
        state |= {"mask.logits": logits, "mask._extra_state": torch.tensor(0)}  # sigmoid
        features = features * torch.sigmoid(logits)
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(OmegaConf.to_container(config)))
    torch.save(raw, folder / "run-ep=1.ckpt")
    return folder / "run-ep=1.ckpt", images, features
