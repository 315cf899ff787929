"""Folds a mask into the weights of an ordinary backbone.

The masked features of MetaMask (section 4.2) are h ⊙ m, with h the backbone's features. For every
backbone of solo-learn there is another set of weights of the same backbone whose plain features
are h ⊙ m, so that tools which know nothing of masks can use the result.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from metamask_solo.errors import UserError

# Smallest and largest size of a mask entry that a ResNet's weights are multiplied and divided by.
# Within float32 and bfloat16 (about 2^-126 to 2^127) both leave room for the weights themselves.
SMALLEST = 2.0**-60
LARGEST = 2.0**60
# Relative error of float64 that a fold may have, many layers later.
ROUNDING = 1e-7
# Where the last normalisation layer is, per family of backbones: the first path of attributes that
# has weights.
FINAL_NORMS = {
    "vit": ("fc_norm", "norm"),
    "swin": ("norm",),
    "convnext": ("head.norm", "norm_pre"),
    "poolformer": ("norm",),
    "wide_resnet": ("bn1",),
}


def fold_mask(backbone: nn.Module, mask: Tensor, name: str, images: Tensor | None = None) -> int:
    """Changes ``backbone`` in place so that its plain features are the masked ones.

    Three cases, by how the backbone ends:

    - *ViT, Swin, ConvNeXt, PoolFormer*: a last normalisation with weight w and bias b, before or
      after pooling. w ⊙ m and b ⊙ m give h ⊙ m, for a mask of any sign; zero stays zero.
    - *Wide ResNet*: the same with its last BatchNorm, but a LeakyReLU comes after, and
      lrelu(m·y) = m·lrelu(y) only for m ≥ 0.
    - *ResNet*: relu(m·(s + t)) = m·relu(s + t) for m > 0. The features are the sum of the last
      stage's blocks, so the whole stage works in the scale m: each block's last BatchNorm and the
      first block's downsample BatchNorm are multiplied by m, and the input channels of the other
      blocks' first convolution, which must see what it saw before, are divided by m.

    In a ResNet an entry of size under 2^-60 cannot be divided by; zero least of all: the next
    block needs the very channel that the output must not show. Such an entry is *floored*, which
    means taken for zero, and zero is folded without a division: the channel keeps the scale 1
    through the stage, and the last block's last BatchNorm gets a bias (-2^60) so low that nothing
    gets over the last ReLU. The channel's feature is then exactly 0, an error of at most 2^-60
    times the unmasked feature. No scale in the stage is below 2^-60, hence nothing gets near the
    subnormal numbers that some devices flush to zero.

    The arithmetic is done in float64 and rounded once, to the type of the weights. In training
    mode too the features are the masked ones, since BatchNorm commutes with m there as well.
    Fold before a conversion to float16, and mind that a ResNet's convolutions then hold weights
    divided by m, and that float16 ends at 65504: entries of 1e-4 and more are safe, smaller ones
    can overflow. bfloat16 has no such limit.

    Args:
        backbone: a backbone of solo-learn, features N × D, on any device.
        mask: shape (D,), finite, no entry above 2^60 in size.
        name: solo-learn's name of the backbone, such as ``resnet18``.
        images: what the result is tried on, N × C × H × W; None: random ones.

    Returns:
        How many entries were floored: always 0 for backbones that are no ResNet.

    Raises:
        UserError: the mask does not fit, the weights are float16, or this backbone cannot hold the
            mask, as a trial on a copy in float64 shows; the backbone is then unchanged.

    Example:
        >>> backbone = timm.create_model("resnet18", num_classes=0).eval()
        >>> fold_mask(backbone, torch.rand(512) + 0.1, "resnet18")
        0
    """
    mask = torch.as_tensor(mask).detach().to("cpu", torch.float64)  # some devices have none
    if mask.ndim != 1 or not torch.isfinite(mask).all() or mask.abs().max() > LARGEST:
        raise UserError(
            f"mask of shape {tuple(mask.shape)}: it must be one row of finite entries, "
            f"none above {LARGEST:.0e} in size"
        )
    if any(parameter.dtype == torch.float16 for parameter in backbone.parameters()):
        raise UserError(f"backbone {name}: holds float16; fold the mask before the conversion")
    _prove(copy.deepcopy(backbone).to("cpu", torch.float64).eval(), mask, name, images)
    return _fold(backbone, mask, name)


@torch.no_grad()
def _prove(plain: nn.Module, mask: Tensor, name: str, images: Tensor | None) -> None:
    """Refuses a fold whose features are not mask × plain features, dimension by dimension."""
    images = (random_images(plain) if images is None else images).to("cpu", torch.float64)
    try:
        features = plain(images)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise UserError(
            f"backbone {name}: the fold cannot be tested on images of shape "
            f"{tuple(images.shape)} ({reason}); pass other images with images="
        ) from error
    if features.shape != (len(images), mask.numel()):
        raise UserError(
            f"mask of {mask.numel()} entries: backbone {name} has features of shape "
            f"{tuple(features.shape)}"
        )
    if not features.isfinite().all():
        raise UserError(f"backbone {name}: its features are not finite; the run diverged")
    folded, reason = copy.deepcopy(plain), ""
    try:
        _fold(folded, mask, name)
        off = (folded(images) - features * mask).abs()
        if not (off <= features.abs().max() * (ROUNDING * mask.abs() + SMALLEST)).all():
            share = float(off.max() / (features * mask).abs().max())
            reason = f"the features would be off by {share:.1e}"
    except (AttributeError, RuntimeError) as error:  # no such layers
        reason = str(error)
    if reason:
        raise UserError(
            f"backbone {name}: a mask cannot be folded into it ({reason}); its layers are not "
            "those that the name stands for (its activation or its pooling, for instance)"
        )


def random_images(backbone: Any) -> Tensor:
    """Two images of a size that the backbone takes, in single precision, always the same."""
    size = getattr(getattr(backbone, "patch_embed", None), "img_size", None) or 64
    height, width = (size, size) if isinstance(size, int) else size
    channels = next((p.shape[1] for p in backbone.parameters() if p.dim() == 4), 3)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, channels, height, width, generator=generator)


def _fold(backbone: nn.Module, mask: Tensor, name: str) -> int:
    if name.startswith("resnet"):
        return _fold_into_residual_stage(backbone, mask, name)
    family = next((family for family in FINAL_NORMS if name.startswith(family)), "")
    for path in FINAL_NORMS.get(family, ()):
        norm: Any = backbone
        for attribute in path.split("."):
            norm = getattr(norm, attribute, None)
        if getattr(norm, "weight", None) is not None:
            if family == "wide_resnet":
                _refuse_negative(mask, name, "LeakyReLU")
            _multiply(norm, mask)
            return 0
    raise UserError(
        f"backbone {name}: folding is supported only for resnet, {', '.join(FINAL_NORMS)}, "
        "and backbones that end in a norm with weights"
    )


def _fold_into_residual_stage(backbone: Any, mask: Tensor, name: str) -> int:
    closed = mask.abs() < SMALLEST
    _refuse_negative(mask.masked_fill(closed, 0.0), name, "ReLU")
    scale = mask.masked_fill(closed, 1.0)
    for block in backbone.layer4:
        last_norm = block.bn3 if hasattr(block, "bn3") else block.bn2
        _multiply(last_norm, scale)
        if block.downsample is not None:
            _multiply(block.downsample[-1], scale)
        else:
            _multiply_parameter(block.conv1.weight, (1 / scale).view(1, -1, 1, 1))
    with torch.no_grad():
        last_norm.bias.masked_fill_(closed.to(last_norm.bias.device), -LARGEST)
    return int(closed.sum())


def _multiply(norm: Any, scale: Tensor) -> None:
    for parameter in (norm.weight, getattr(norm, "bias", None)):
        if parameter is not None:
            _multiply_parameter(parameter, scale)


@torch.no_grad()
def _multiply_parameter(parameter: Tensor, scale: Tensor) -> None:
    parameter.copy_(parameter.to("cpu", torch.float64) * scale)


def _refuse_negative(mask: Tensor, name: str, activation: str) -> None:
    # a trial would not show it of a channel that is 0 for all images tried
    if negative := int((mask < 0).sum()):
        raise UserError(
            f"mask with {negative} negative entries of {mask.numel()}: cannot be folded into "
            f"{name}, because it ends in a {activation}, whose outputs no change of weights makes "
            "negative"
        )
