"""A backbone of a millisecond in the place of solo-learn's ResNet-18, on both releases."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import metamask_solo.hosts  # noqa: F401  imports solo-learn as the package does


class SmallResNet(nn.Module):
    """Stem and head of a ResNet: images to N × 64 features."""

    inplanes = 64

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=4, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool: nn.Module = nn.MaxPool2d(2)
        self.fc: nn.Module = nn.Linear(64, 1000)

    def forward(self, images: Tensor) -> Tensor:
        h = self.maxpool(torch.relu(self.bn1(self.conv1(images))))
        return self.fc(h.mean((2, 3)))


def replace_resnet18(setattr: Callable[[Any, str, Any], None] = setattr) -> None:
    """Puts it where solo-learn looks for torchvision's."""
    setattr(torchvision.models, "resnet18", SmallResNet)  # 1.0.2
    try:
        from solo.backbones import resnet
    except ImportError:
        return
    setattr(resnet, "default_resnet18", SmallResNet)


def write_module(folder: Path) -> str:
    """Writes ``small``, a module for ``imports`` of commands in other processes.

    Returns:
        The PYTHONPATH that they need for it.
    """
    (folder / "small.py").write_text("import small_resnet\nsmall_resnet.replace_resnet18()\n")
    return os.pathsep.join([str(Path(__file__).parent), str(folder)])
