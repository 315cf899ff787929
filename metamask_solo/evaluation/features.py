"""What the commands that evaluate features share: what computes them, and from which images."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from metamask_solo.checkpoints.reading import PREFIXES, Checkpoint, load_backbone, read_checkpoint
from metamask_solo.data.images import evaluation_transform, image_loader
from metamask_solo.errors import UserError
from metamask_solo.hosts import BACKBONE_PREFIX, METHODS, build_method, classification_datasets

SPLITS = ("train", "val")


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


def split_loader(
    split: str,
    config: DictConfig,
    data: str | Path | None = None,
    batch_size: int = 256,
    num_workers: int = 0,
    limit: int | None = None,
    seed: int = 0,
) -> DataLoader[Any]:
    """The images of one split, with the evaluation transform of a run's config.

    Args:
        split: ``train`` or ``val``.
        config: config of the run.
        data: folder that holds train/ and val/ with class folders; None for the data of the run.
        limit: at most this many images, drawn by ``seed``; None for all.

    Raises:
        UserError: the data are missing or cannot be read.
    """
    own = config.data
    if data is not None:
        return image_loader(Path(data) / split, config, batch_size, num_workers, limit, seed)
    folder = own.get(f"{split}_path")
    if folder is None:
        raise UserError(f"data.{split}_path: missing in the run's args.json; give --data FOLDER")
    if own.dataset == "custom" and own.get("format") in (None, "image_folder"):
        if not Path(folder).is_dir():
            raise UserError(f"data.{split}_path={folder}: no such folder; give --data FOLDER")
        return image_loader(folder, config, batch_size, num_workers, limit, seed)
    dataset = _datasets_of_run(config)[SPLITS.index(split)]
    if limit is not None and limit < len(dataset):
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
        dataset = Subset(dataset, sorted(order[:limit].tolist()))
    return DataLoader(dataset, batch_size=batch_size, num_workers=num_workers)


def _datasets_of_run(config: DictConfig) -> tuple[Any, Any]:
    """Both splits of what solo-learn reads in a way of its own: CIFAR, STL-10, ImageNet, h5."""
    config = config.copy()
    OmegaConf.update(config, "data.fraction", -1, force_add=True)  # all images, as main_knn.py
    transform = evaluation_transform(config)
    try:
        return classification_datasets(config, transform, transform)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"data.train_path={config.data.train_path}, data.val_path={config.data.val_path}: "
            f"cannot be read as {config.data.dataset} ({reason}); give --data FOLDER"
        ) from error


def class_names(loader: DataLoader[Any]) -> list[str]:
    """The names of the classes in the order of their labels; empty where the data have none."""
    dataset: Any = loader.dataset
    if isinstance(dataset, Subset):
        dataset = dataset.dataset
    return [str(name) for name in getattr(dataset, "classes", [])]


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


def check_counts(**values: int) -> None:
    """Refuses an option below its least value: 0 for workers and seeds, 1 for all others."""
    for name, value in values.items():
        least = 0 if name in ("num_workers", "seed") else 1
        if value < least:
            raise UserError(f"--{name.replace('_', '-')}={value}: must be at least {least}")
