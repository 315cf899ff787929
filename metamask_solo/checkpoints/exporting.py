"""Writes a backbone as a folder that timm opens by itself."""

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn
from torchvision.transforms import CenterCrop, Normalize, Resize

from metamask_solo.atomic_files import atomic_write
from metamask_solo.data.images import evaluation_transform
from metamask_solo.errors import UserError
from metamask_solo.hosts.stem import SMALL, stem_of

WEIGHTS, CONFIG = "model.safetensors", "config.json"
# timm's names of solo-learn's backbones; a ResNet has the same
ARCHITECTURES = {
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "vit_large": "vit_large_patch16_224",
    "swin_tiny": "swin_tiny_patch4_window7_224",
    "swin_small": "swin_small_patch4_window7_224",
    "swin_base": "swin_base_patch4_window7_224",
    "swin_large": "swin_large_patch4_window7_224",
}


def is_timm_folder(out: Path) -> bool:
    """Whether OUT of --timm names a folder; a name with an ending is a bare state dict's."""
    return not out.suffix or out.is_dir()


def check_timm_folder(out: Path, force: bool) -> None:
    """Raises UserError unless ``out`` is new, empty, or with ``force`` an earlier export."""
    if not out.is_dir():
        return
    there = sorted(entry.name for entry in out.iterdir())
    others = [name for name in there if name not in (WEIGHTS, CONFIG)]
    if others:
        raise UserError(f"{out}: is a folder that holds {others[0]}; name a new one")
    if there and not force:
        raise UserError(f"{out}: exists already; --force overwrites it")


def write_timm_folder(backbone: nn.Module, config: DictConfig, out: Path) -> None:
    """Writes config.json and model.safetensors for ``timm.create_model("local-dir:OUT")``.

    The model that timm makes has no classifier: it gives N × D features. Its ``pretrained_cfg``
    holds size, mean and deviation of the images, for ``timm.data.resolve_model_data_config``.
    The 3×3 stem is no setting of timm's ResNets: such a folder names an architecture that timm
    knows once this package was imported.

    Args:
        backbone: with its weights, as solo-learn builds it.
        config: of the run.
    """
    from safetensors.torch import save_file

    state = {name: tensor.contiguous() for name, tensor in backbone.state_dict().items()}
    name = str(config.backbone.name)
    architecture = ARCHITECTURES.get(name, name)
    if name.startswith("resnet") and stem_of(state) == SMALL:
        architecture = f"{name}_3x3"
    content = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": int(_features(backbone)),
        "model_args": _model_args(backbone, config),
        "pretrained_cfg": {**_images(config), "num_classes": 0},
    }
    with atomic_write(out / WEIGHTS) as file:
        save_file(state, file, metadata={"format": "pt"})
    with atomic_write(out / CONFIG) as file:
        file.write_text(json.dumps(content, indent=1) + "\n")


def _features(backbone: Any) -> int:
    return getattr(backbone, "num_features", None) or backbone.inplanes


def _model_args(backbone: Any, config: DictConfig) -> dict[str, Any]:
    """What the architecture was built with beside its name: the settings, and the image size."""
    given = OmegaConf.select(config, "backbone.kwargs", default=None) or {}
    arguments: dict[str, Any] = dict(OmegaConf.to_container(given)) if given else {}  # type: ignore[arg-type]
    size = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
    if size is not None:  # ViT and Swin; solo-learn 1.0.2 takes the crop's
        arguments["img_size"] = size[0] if isinstance(size, tuple | list) else size
    return arguments


def _images(config: DictConfig) -> dict[str, Any]:
    """Size, mean and deviation that the run's evaluation gives its images."""
    steps: dict[type, Any] = {type(t): t for t in evaluation_transform(config).transforms}  # type: ignore[attr-defined]
    normalize, resize, crop = (steps.get(kind) for kind in (Normalize, Resize, CenterCrop))
    size = _side(crop or resize)
    found: dict[str, Any] = {"interpolation": "bicubic"}
    if normalize is not None:
        found |= {"mean": list(map(float, normalize.mean)), "std": list(map(float, normalize.std))}
    if size is not None:
        found |= {"input_size": [3, size, size], "crop_pct": size / (_side(resize) or size)}
    return found


def _side(transform: Any) -> int | None:
    size = getattr(transform, "size", None)
    return int(size[0]) if isinstance(size, tuple | list) else size
