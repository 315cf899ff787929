"""Folds a mask into the weights of an ordinary backbone.

The masked features of MetaMask (section 4.2) are h ⊙ m, with h the backbone's features. For every
backbone of solo-learn there is another set of weights of the same backbone whose plain features
are h ⊙ m, so that tools which know nothing of masks can use the result.
"""

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from metamask_solo.atomic_files import atomic_write
from metamask_solo.checkpoints.exporting import (
    check_timm_folder,
    is_timm_folder,
    write_timm_folder,
)
from metamask_solo.checkpoints.reading import MASK_KEY, Checkpoint, load_backbone
from metamask_solo.errors import UserError
from metamask_solo.hosts import BACKBONE_PREFIX
from metamask_solo.method.mask import DimensionalMask

# Smallest and largest size of a mask entry that a ResNet's weights are multiplied and divided by.
# Within float32 and bfloat16 (about 2^-126 to 2^127) both leave room for the weights themselves.
SMALLEST = 2.0**-60
LARGEST = 2.0**60
# The same lower limit where the backbone's own weights are float16 (2^-14 to 2^16).
SMALLEST_IN_HALF = 2.0**-10

# Relative error of float64 that a fold may have, many layers later.
ROUNDING = 1e-7

# Where the last normalisation layer is, per family of backbones: the first that exists and is not
# an identity. Written as paths of attributes.
FINAL_NORMS = {
    "vit": ("fc_norm", "norm"),
    "swin": ("norm",),
    "convnext": ("head.norm", "norm_pre"),
    "poolformer": ("norm",),
    "wide_resnet": ("bn1",),
}
# Norms that act on features already pooled: whatever the pooling, they come last.
NORMS_AFTER_POOLING = ("fc_norm", "head.norm")

# What a folded checkpoint can be written as, and why some backbones have no such form.
FORMS = ("host", "timm", "torchvision")
NO_TIMM = {
    "poolformer": "timm's PoolFormer normalises after pooling, solo-learn's before",
    "wide_resnet": "timm has no such model",
}
FOLDED_NAME = "folded.ckpt"
# Parts of a Lightning checkpoint that belong to the weights; the others resume a training run.
KEPT_PARTS = ("state_dict", "epoch", "global_step", "pytorch-lightning_version", "hyper_parameters")


class Folded(NamedTuple):
    """What :func:`fold_checkpoint` wrote: the file, mask entries in all, and floored ones."""

    path: Path
    dims: int
    floored: int


def fold_checkpoint(
    path: str | Path, out: str | Path, form: str = "host", force: bool = False
) -> Folded:
    """Writes a checkpoint whose plain backbone computes the masked features.

    ``host`` writes a solo-learn checkpoint, with its args.json beside it, in a folder that holds
    no other: the layout that main_linear.py, main_knn.py and main_umap.py of solo-learn's GitHub
    main read. Its mask is 1 in every dimension and stays so, hence the method's own features and
    projections are those of before; heads and classifier are kept, optimiser states are not.

    ``timm`` writes a folder that ``timm.create_model("local-dir:OUT", pretrained=True)`` opens.
    Where ``out`` ends as a file does (``.pth``), it and ``torchvision`` write the bare state dict
    of the backbone, to be loaded with
    ``strict=True`` into the library's own model without classifier (``num_classes=0``, or
    ``model.fc = nn.Identity()``). A ResNet of the CIFAR data sets fits a model whose ``conv1``
    and ``maxpool`` were replaced as solo-learn does it.

    Args:
        path: a checkpoint with a mask, or the folder of its run.
        out: ``host``: a ``.ckpt`` file, or a folder, which gets ``folded.ckpt``; ``timm``: a
            folder or a file; ``torchvision``: a file.
        form: ``host``, ``timm`` or ``torchvision``.
        force: whether to overwrite ``out``. The checkpoint at ``path`` never is.

    Raises:
        UserError: the checkpoint has no mask or a folded one, the mask cannot be folded, the form
            does not exist for the backbone, or ``out`` cannot be written.
    """
    if form not in FORMS:
        raise UserError(f"form={form}: allowed are {', '.join(FORMS)}")
    backbone, checkpoint = load_backbone(path, masked=False)
    mask = _mask_to_fold(checkpoint)
    assert checkpoint.config is not None  # load_backbone needs it
    name = checkpoint.config.backbone.name
    _check_form(form, name)
    target = _target(checkpoint.path, Path(out), form, force)

    weights = checkpoint.backbone_state()
    if any(tensor.dtype == torch.float64 for tensor in weights.values()):
        backbone.double().load_state_dict(weights)  # they were rounded to float32
    floored = fold_mask(backbone, mask, name)
    if form == "timm" and is_timm_folder(target):
        write_timm_folder(backbone, checkpoint.config, target)
        return Folded(target, mask.numel(), floored)
    with atomic_write(target) as file:
        if form != "host":
            torch.save(backbone.state_dict(), file)
        else:
            torch.save(_folded_parts(checkpoint, backbone), file)
            with atomic_write(target.parent / "args.json") as args:
                args.write_text(json.dumps(_folded_config(checkpoint), indent=1))
    return Folded(target, mask.numel(), floored)


def _mask_to_fold(checkpoint: Checkpoint) -> Tensor:
    if checkpoint.folded:
        raise UserError(f"{checkpoint.path}: its mask is folded already")
    if checkpoint.mask is None:
        raise UserError(f"{checkpoint.path}: has no mask to fold (method: {checkpoint.method})")
    return checkpoint.mask


def _check_form(form: str, name: str) -> None:
    if form == "torchvision" and not name.startswith("resnet"):
        raise UserError(f"--torchvision: solo-learn's {name} is not torchvision's model")
    for family, reason in NO_TIMM.items():
        if form == "timm" and name.startswith(family):
            raise UserError(f"--timm: {name} cannot be written, because {reason}")


def _target(source: Path, out: Path, form: str, force: bool) -> Path:
    """The file to write, after making sure that nothing of value stands in its place."""
    if form == "timm" and is_timm_folder(out):
        check_timm_folder(out, force)
        return out
    if form == "host":
        target = out if out.suffix == ".ckpt" else out / FOLDED_NAME
        written = [target, target.parent / "args.json"]
        if target.parent.resolve() == source.parent.resolve():
            raise UserError(f"{out}: is in the folder of {source.name}; give another folder")
        others = [file.name for file in target.parent.glob("*.ckpt") if file.name != target.name]
        if others:
            raise UserError(
                f"{target.parent}: holds {others[0]} already; solo-learn wants one .ckpt a folder"
            )
    else:
        target, written = out, [out]
        if out.resolve() in (source.resolve(), (source.parent / "args.json").resolve()):
            raise UserError(f"{out}: is what to fold; give another file")
    for file in written:
        if file.is_dir():
            raise UserError(f"{file}: is a folder; give a file")
        if file.exists() and not force:
            raise UserError(f"{file}: exists already; --force overwrites it")
    return target


def _folded_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The run's config, with a mask that is 1 and stays so."""
    fixed = {"mask": {"kind": "linear", "initial_logit": None}, "meta": {"enabled": False}}
    config = OmegaConf.merge(checkpoint.config, {"method_kwargs": fixed})
    return OmegaConf.to_container(config)  # type: ignore[return-value]


def _folded_parts(checkpoint: Checkpoint, backbone: nn.Module) -> dict[str, Any]:
    """The checkpoint's content, with the folded backbone and a mask of ones."""
    parts = {key: checkpoint.raw[key] for key in KEPT_PARTS if key in checkpoint.raw}
    rest = checkpoint.other_state()
    weights = {BACKBONE_PREFIX + k: v for k, v in backbone.state_dict().items()}
    mask = DimensionalMask(rest[MASK_KEY].numel(), "linear", dtype=torch.float32).state_dict()
    rest |= {f"mask.{k}": value for k, value in mask.items()}
    parts["state_dict"] = {**rest, **weights}
    history = checkpoint.raw.get("metamask", {}).get("history")
    parts["metamask"] = {"kind": "linear", "folded": True}
    if history is not None:
        parts["metamask"]["history"] = history
    return parts


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

    In a ResNet an entry of size under 2^-60 (2^-10 if the weights are float16) cannot be divided
    by; zero least of all: the next block needs the very channel that the output must not show.
    Such an entry is *floored*, which means taken for zero, and zero is folded without a division:
    the channel keeps the scale 1 through the stage, and the last block's last BatchNorm gets a
    bias (-2^60) so low that nothing gets over the last ReLU. The channel's feature is then
    exactly 0, an error of at most 2^-60 times the unmasked feature. No scale in the stage is
    below 2^-60, hence nothing gets near the subnormal numbers that some devices flush to zero.

    The arithmetic is done in float64 and rounded once, to the type of the weights. In training
    mode too the features are the masked ones, since BatchNorm commutes with m there as well.
    Before a ResNet is run in float16, mind that its convolutions hold weights divided by m, and
    that float16 ends at 65504: entries of 1e-4 and more are safe, smaller ones can overflow.
    bfloat16 has no such limit.

    Args:
        backbone: a backbone of solo-learn, features N × D, on any device, of any floating type.
        mask: shape (D,), finite, no entry above 2^60 in size.
        name: solo-learn's name of the backbone, such as ``resnet18``.
        images: what the result is tried on, N × C × H × W; None: random ones.

    Returns:
        How many entries were floored: always 0 for backbones that are no ResNet.

    Raises:
        UserError: the mask does not fit, or this backbone cannot hold it, as a trial on a copy in
            float64 shows; the backbone is then unchanged.

    Example:
        >>> backbone = timm.create_model("resnet18", num_classes=0).eval()
        >>> fold_mask(backbone, torch.rand(512) + 0.1, "resnet18")
        0
    """
    if not isinstance(mask, Tensor):
        raise UserError(f"mask of type {type(mask).__name__}: must be a tensor of shape (D,)")
    mask = mask.detach().to("cpu", torch.float64)  # some devices have no float64
    plain = copy.deepcopy(backbone).to("cpu", torch.float64).eval()
    folded = copy.deepcopy(plain)
    _fold(folded, mask, name)
    _prove(plain, folded, mask, name, images)
    return _fold(backbone, mask, name)


@torch.no_grad()
def _prove(
    plain: nn.Module, folded: nn.Module, mask: Tensor, name: str, images: Tensor | None
) -> None:
    """Refuses a fold whose features are not mask × plain features, dimension by dimension."""
    if images is None:
        images = _random_images(plain)
    images = images.to("cpu", torch.float64)
    try:
        features, found = plain(images), folded(images)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise UserError(
            f"backbone {name}: a fold cannot be tried on images of shape {tuple(images.shape)} "
            f"({reason}); others can be given as images="
        ) from error
    if features.shape != (len(images), mask.numel()):
        raise UserError(
            f"mask of {mask.numel()} entries: backbone {name} has features of shape "
            f"{tuple(features.shape)}"
        )
    off = (found - features * mask).abs()
    if not (off <= features.abs().max() * (ROUNDING * mask.abs() + SMALLEST)).all():
        raise UserError(
            f"backbone {name}: a mask cannot be folded into it, the features would be off by "
            f"{float(off.max() / (features * mask).abs().max()):.1e}; its layers are not those "
            "that the name stands for (its activation, for instance)"
        )


def _random_images(backbone: Any) -> Tensor:
    size = getattr(getattr(backbone, "patch_embed", None), "img_size", None) or 64
    height, width = (size, size) if isinstance(size, int) else size
    channels = next((p.shape[1] for p in backbone.parameters() if p.dim() == 4), 3)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, channels, height, width, generator=generator, dtype=torch.float64)


def _fold(backbone: nn.Module, mask: Tensor, name: str) -> int:
    if mask.ndim != 1 or not torch.isfinite(mask).all() or mask.abs().max() > LARGEST:
        raise UserError(
            f"mask of shape {tuple(mask.shape)}: it must be one row of finite entries, "
            f"none above {LARGEST:.0e} in size"
        )
    if name.startswith("resnet"):
        return _fold_into_residual_stage(backbone, mask, name)
    path, norm = _final_norm(backbone, name)
    _check_size(mask, norm.weight, name)
    if name.startswith("wide_resnet"):
        _refuse_negative(mask, name, "it ends in a LeakyReLU")
    elif path not in NORMS_AFTER_POOLING and "max" in _pooling(backbone):
        _refuse_negative(mask, name, "it ends in max pooling")
    _multiply(norm, mask)
    return 0


def _final_norm(backbone: nn.Module, name: str) -> tuple[str, Any]:
    family = next((family for family in FINAL_NORMS if name.startswith(family)), None)
    if family is None:
        raise UserError(
            f"backbone {name}: no way to fold a mask into it is known, only into resnet, "
            f"{', '.join(FINAL_NORMS)}"
        )
    attention_pooling = getattr(backbone, "attn_pool", None) is not None
    hidden_layer = not isinstance(_find(backbone, "head.pre_logits"), nn.Identity)
    if attention_pooling or hidden_layer:
        raise UserError(
            f"backbone {name}: no mask can be folded into it, because its settings put "
            f"{'attention pooling' if attention_pooling else 'a hidden layer'} after the last norm"
        )
    for path in FINAL_NORMS[family]:
        norm = _find(backbone, path)
        if getattr(norm, "weight", None) is not None:
            return path, norm
    raise UserError(
        f"backbone {name}: no mask can be folded into it, because its settings leave no "
        f"norm with weights at its end"
    )


def _find(module: nn.Module, path: str) -> nn.Module:
    """The submodule at ``path``, or an identity where there is none."""
    for attribute in path.split("."):
        module = getattr(module, attribute, None) or nn.Identity()
    return module


def _pooling(backbone: nn.Module) -> str:
    """timm's name of the global pooling, such as ``avg``, ``token``, ``max`` or ``avgmax``."""
    pool = getattr(backbone, "global_pool", None)
    if pool is None:
        pool = getattr(_find(backbone, "head.global_pool"), "pool_type", "")
    return str(pool)


def _fold_into_residual_stage(backbone: Any, mask: Tensor, name: str) -> int:
    blocks = list(getattr(backbone, "layer4", []))
    last_norms: list[Any] = [
        getattr(block, "bn3", None) or getattr(block, "bn2", None) for block in blocks
    ]
    parts = ("conv1", "downsample")
    if not blocks or None in last_norms or not all(hasattr(b, p) for b in blocks for p in parts):
        raise UserError(
            f"backbone {name}: a mask cannot be folded into it, because a "
            f"{type(backbone).__name__} does not end in the blocks that the name stands for"
        )
    weight = last_norms[-1].weight
    _check_size(mask, weight, name)
    smallest = SMALLEST_IN_HALF if weight.dtype == torch.float16 else SMALLEST
    closed = mask.abs() < smallest
    _refuse_negative(mask.masked_fill(closed, 0.0), name, "it ends in a ReLU")

    scale = mask.masked_fill(closed, 1.0)
    for block, norm in zip(blocks, last_norms, strict=True):
        _multiply(norm, scale)
        if block.downsample is not None:
            _multiply(block.downsample[-1], scale)
        else:
            _multiply_parameter(block.conv1.weight, (1 / scale).view(1, -1, 1, 1))
    lowest = -min(LARGEST, torch.finfo(weight.dtype).max / 2)
    with torch.no_grad():
        last_norms[-1].bias.masked_fill_(closed.to(weight.device), lowest)
    return int(closed.sum())


def _multiply(norm: Any, scale: Tensor) -> None:
    for parameter in (norm.weight, getattr(norm, "bias", None)):
        if parameter is not None:
            _multiply_parameter(parameter, scale)


@torch.no_grad()
def _multiply_parameter(parameter: Tensor, scale: Tensor) -> None:
    parameter.copy_(parameter.to("cpu", torch.float64) * scale)


def _check_size(mask: Tensor, weight: Tensor, name: str) -> None:
    if mask.shape != weight.shape:
        raise UserError(
            f"mask of {mask.numel()} entries: backbone {name} has {weight.numel()} dimensions"
        )


def _refuse_negative(mask: Tensor, name: str, reason: str) -> None:
    negative = int((mask < 0).sum())
    if negative:
        raise UserError(
            f"mask with {negative} negative entries of {mask.numel()}: cannot be folded into "
            f"{name}, because {reason}, which no change of weights can turn around"
        )
