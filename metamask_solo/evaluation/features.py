"""What the commands that evaluate features share: what computes them, and from which images."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from metamask_solo.checkpoints.reading import PREFIXES, Checkpoint, load_backbone, read_checkpoint
from metamask_solo.data.images import loader_failure
from metamask_solo.errors import UserError
from metamask_solo.hosts import BACKBONE_PREFIX, METHODS, build_method


def feature_extractor(
    path: str | Path, features: str = "backbone", masked: bool | None = None
) -> tuple[nn.Module, Checkpoint]:
    """A module from images to the features of a checkpoint.

    Args:
        path: checkpoint file or run folder.
        features: ``backbone`` for N × D features, ``projector`` for what the method's ``forward``
            returns as ``z``.
        masked: True for masked features, False for plain ones, None for masked ones where the
            checkpoint has a mask.

    Raises:
        UserError: the checkpoint does not have the features that are asked for.
    """
    checkpoint = read_checkpoint(path)
    if masked is False and checkpoint.raw.get("metamask", {}).get("folded", False):
        raise UserError(
            f"{checkpoint.path}: its mask is folded into the backbone, so there are no plain "
            "features; take the checkpoint that it was folded from"
        )
    if features == "backbone":
        return load_backbone(checkpoint.path, masked)
    if masked and checkpoint.mask is None:
        raise UserError(f"{checkpoint.path}: holds no mask, so there are no masked features")
    if masked is False and checkpoint.mask is not None:
        raise UserError(f"{checkpoint.path}: its projector takes masked features only")
    return Projection(_build(checkpoint), str(checkpoint.method)), checkpoint


class Projection(nn.Module):
    """A whole method as a module from images to its projected features."""

    def __init__(self, method: nn.Module, name: str):
        super().__init__()
        self.method = method
        self.name = name

    def forward(self, images: Tensor) -> Tensor:
        out = self.method(images)
        if "z" not in out:
            raise UserError(f"method {self.name}: has no projected features (z)")
        return out["z"]


def _build(checkpoint: Checkpoint) -> nn.Module:
    """The method of a checkpoint with its weights, in evaluation mode."""
    if checkpoint.config is None:
        raise UserError(f"{checkpoint.path.parent / 'args.json'}: missing; it names the method")
    if not checkpoint.config.get("method"):
        raise UserError(f"{checkpoint.path}: a probe or fine-tuned model has no projector")
    if checkpoint.method not in METHODS:
        raise UserError(f"{checkpoint.path}: method {checkpoint.method} is unknown here")
    model = build_method(checkpoint.config.copy())
    # the other release may have written it, under its own names
    backbone = {BACKBONE_PREFIX + name: w for name, w in checkpoint.backbone_state().items()}
    rest = {n: w for n, w in checkpoint.state_dict.items() if not n.startswith(PREFIXES)}
    try:
        missing = model.load_state_dict({**rest, **backbone}, strict=False).missing_keys
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{checkpoint.path}: does not fit its args.json: {reason}") from error
    # teachers, which only training needs
    missing = [name for name in missing if not name.startswith("momentum_")]
    if missing:
        raise UserError(f"{checkpoint.path}: does not fit its args.json: {missing[0]} is missing")
    return model.eval()


def pick_device(name: str) -> str:
    """``cuda`` or ``cpu`` for one of ``auto``, ``cpu`` and ``cuda``.

    Raises:
        UserError: there is no GPU that PyTorch can use.
    """
    available = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if available else "cpu"
    if name == "cuda" and not available:
        raise UserError("--device=cuda: this machine has no GPU that PyTorch can use")
    return name


@torch.no_grad()
def extract_features(
    backbone: nn.Module,
    loader: DataLoader[Any],
    device: str | torch.device = "cpu",
    label: str = "features",
) -> tuple[Tensor, Tensor]:
    """Features and labels of a data set, with a progress bar.

    Returns:
        Features, N × D in single precision, and labels, N integers; both on the CPU.
    """
    backbone = backbone.to(device).eval()
    features, labels = [], []
    try:
        for images, targets in tqdm(loader, desc=label, leave=False):
            features.append(backbone(images.to(device)).float().cpu())
            labels.append(targets)
    except RuntimeError as error:
        if (failure := loader_failure(error)) is not None:
            raise failure from error
        raise
    return torch.cat(features), torch.cat(labels)
