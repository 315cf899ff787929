"""ResNets with the 3×3 stem for timm, as ``resnet18_3x3`` and ``resnet50_3x3``.

timm has no setting for this stem, so ``timm.create_model("local-dir:FOLDER")`` opens an export of
such a run once this module was imported; it needs no solo-learn.
"""

from typing import Any

from timm.models import load_pretrained, register_model, resnet
from torch import nn

__all__ = ["resnet18_3x3", "resnet50_3x3"]


def replace_stem(model: Any, channels: int = 3) -> Any:
    """Gives timm's or torchvision's ResNet a convolution of 3×3, stride 1, and no max pooling."""
    model.conv1 = nn.Conv2d(channels, 64, kernel_size=3, stride=1, padding=2, bias=False)
    model.maxpool = nn.Identity()
    return model


def _create(name: str, pretrained: bool, settings: dict[str, Any]) -> nn.Module:
    channels = settings.get("in_chans", 3)
    model = replace_stem(getattr(resnet, name)(pretrained=False, **settings), channels)
    if pretrained:
        load_pretrained(model, num_classes=model.num_classes, in_chans=channels)
    return model


@register_model
def resnet18_3x3(pretrained: bool = False, **settings: Any) -> nn.Module:
    """timm's resnet18 with the 3×3 stem."""
    return _create("resnet18", pretrained, settings)


@register_model
def resnet50_3x3(pretrained: bool = False, **settings: Any) -> nn.Module:
    """timm's resnet50 with the 3×3 stem."""
    return _create("resnet50", pretrained, settings)
