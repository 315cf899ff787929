"""ResNets with the 3×3 stem under names of their own, such as ``resnet18_3x3``, for timm.

Importing it lets ``timm.create_model("local-dir:FOLDER")`` open what
:mod:`metamask_solo.checkpoints.exporting` writes of such a run.
"""

from collections.abc import Callable
from typing import Any

from timm.models import load_pretrained, register_model, resnet
from torch import nn

NAMES = ("resnet18", "resnet50")
__all__ = [f"{name}_3x3" for name in NAMES]


def _model(name: str) -> Callable[..., nn.Module]:
    standard = getattr(resnet, name)

    def create(pretrained: bool = False, **settings: Any) -> nn.Module:
        model = standard(pretrained=False, **settings)
        model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=2, bias=False)
        model.maxpool = nn.Identity()
        if pretrained:
            load_pretrained(model, num_classes=model.num_classes, in_chans=3)
        return model

    create.__name__ = f"{name}_3x3"
    create.__module__ = __name__
    create.__doc__ = f"timm's {name} with a first convolution of 3×3, stride 1, and no max pooling."
    return create


for _name in NAMES:
    globals()[f"{_name}_3x3"] = register_model(_model(_name))
