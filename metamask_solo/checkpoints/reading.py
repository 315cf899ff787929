"""Reading checkpoints: without running code, and with one clear line when one is unusable."""

import collections
import functools
import json
import pathlib
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from metamask_solo.data.transforms import DEFAULT_SIZES
from metamask_solo.errors import UserError
from metamask_solo.hosts import (
    BACKBONE_PREFIX,
    METHODS,
    backbone_names,
    build_backbone,
    build_method,
)
from metamask_solo.hosts.stem import stem_of
from metamask_solo.method.mask import KINDS, DimensionalMask, mask_from_logits
from metamask_solo.paths import user_path

# how names of a backbone's weights begin in either release of solo-learn, and in MoCo's own code
MOCO_PREFIX, MOCO_PROJECTOR = "encoder_q.", "fc."
PREFIXES = ("backbone.", "encoder.", MOCO_PREFIX)
# what torch.compile, DataParallel, DDP and training scripts put in front
WRAPPERS = ("_orig_mod", "module", "model")
MASK_KEY, KIND_KEY = "mask.logits", "mask._extra_state"
NODES = ("AnyNode", "BooleanNode", "FloatNode", "IntegerNode", "PathNode", "StringNode")
# where releases of Lightning keep their AttributeDict
LIGHTNINGS = (
    "lightning.fabric.utilities.data",
    "lightning_fabric.utilities.data",
    "lightning.pytorch.utilities.parsing",
    "pytorch_lightning.utilities.parsing",
)


@dataclass
class Checkpoint:
    """A checkpoint of solo-learn's form, of any method.

    Attributes:
        path: the file.
        config: the run's config from args.json beside it, or None.
        backbone: state of the plain backbone.
        rest: state of all else, such as heads and classifier.
        method: name of the pretraining method, or None where there is no config.
        mask: the mask m, shape (D,), or None; a folded one is in the backbone.
        raw: all that the file holds.
    """

    path: Path
    config: DictConfig | None
    backbone: dict[str, Tensor]
    rest: dict[str, Tensor]
    method: str | None
    mask: Tensor | None
    raw: dict[str, Any]

    @property
    def folded(self) -> bool:
        """Whether a mask was folded into the backbone, or into that of the run that it probes."""
        probed = self.config is not None and OmegaConf.select(self.config, "started_from.folded")
        return bool(probed or _is_folded(self.raw))


def read_checkpoint(path: str | Path | Checkpoint) -> Checkpoint:
    """Reads a checkpoint file, or the newest whole one of a run's folder.

    What was read already is given back as it is.

    Raises:
        UserError: there is none, it is damaged, it holds more than tensors and plain data, or two
            networks that may be the backbone.
    """
    if isinstance(path, Checkpoint):
        return path
    path = user_path(path)
    if path.is_dir():
        path = newest_whole(path)
    raw = load_raw(path)
    config = config_beside(path)
    method = (config.get("method") or config.get("pretrain_method")) if config else None
    mask = None
    try:
        backbone, rest = _backbone_and_rest(raw.get("state_dict"))
        if MASK_KEY in rest and not _is_folded(raw):
            kinds = dict(enumerate(KINDS))
            if (kind := kinds.get(int(rest.get(KIND_KEY, -1)))) is None:
                raise ValueError(f"its mask is of no kind; {KIND_KEY} must be one of {kinds}")
            mask = mask_from_logits(rest[MASK_KEY], kind)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    return Checkpoint(path, config, backbone, rest, method, mask, raw)


def _is_folded(raw: dict[str, Any]) -> bool:
    return bool(raw.get("metamask", {}).get("folded", False))


def _backbone_and_rest(state: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parts of a state, with names that no wrapper has lengthened.

    The backbone is what either release of solo-learn calls so, or MoCo's query encoder without the
    projector that MoCo calls ``fc``. The mask that a probe has in its backbone is in the rest.

    Raises:
        ValueError: there is no backbone, or two networks may be it.
    """
    if not isinstance(state, dict):
        raise ValueError("not a checkpoint of solo-learn (no state_dict)")
    plain: dict[str, Tensor] = {}
    for name, tensor in state.items():
        new = _without_wrappers(str(name))
        if new in plain:
            raise ValueError(f"holds {new} twice, once with a wrapper's prefix; keep one of them")
        plain[new] = tensor
    prefixes = [p for p in PREFIXES if any(name.startswith(p) for name in plain)]
    if not prefixes:
        raise ValueError("not a checkpoint of solo-learn (no backbone in its state_dict)")
    if len(prefixes) > 1:
        raise ValueError(
            f"holds two networks that may be the backbone, {prefixes[0]}* and {prefixes[1]}*; keep "
            "one of them in its state_dict"
        )
    backbone, rest = _parted(plain, prefixes[0])
    if prefixes[0] == MOCO_PREFIX:
        _, backbone = _parted(backbone, MOCO_PROJECTOR)
    if MASK_KEY in backbone:  # of a MaskedBackbone
        backbone, mask = _parted(backbone, "backbone.")
        rest |= mask
    return backbone, rest


def _parted(state: dict[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What has a prefix, without it, and what has not."""
    inner = {n.removeprefix(prefix): w for n, w in state.items() if n.startswith(prefix)}
    return inner, {n: w for n, w in state.items() if not n.startswith(prefix)}


def _without_wrappers(name: str) -> str:
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    while len(parts) > 1 and parts[0] in WRAPPERS:
        del parts[0]
    while len(parts) > 2 and f"{parts[0]}." in PREFIXES and parts[1] in WRAPPERS:
        del parts[1]
    return ".".join(parts)


def load_raw(path: Path) -> dict[str, Any]:
    """The content of a checkpoint file, on the CPU; nothing in it is executed."""
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        if zipfile.is_zipfile(path):  # torch does not look at the checksums
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"checksum of {damaged}")
        with torch.serialization.safe_globals(known_types()):
            raw = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if zipfile.is_zipfile(path):
            name = re.search(r"(?:GLOBAL|class|global) `?([\w.]+)", str(error))
            what = f" ({name[1]})" if name else ""
            raise UserError(
                f"{path}: refused, it holds objects other than tensors and plain data{what}, and "
                "loading them could run code"
            ) from error
        raise UserError(f"{path}: not a checkpoint, or a damaged one") from error
    except Exception as error:  # a damaged pickle makes its reader fail in any way
        raise UserError(f"{path}: not a checkpoint, or a damaged one") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: not a checkpoint of solo-learn (holds {type(raw).__name__})")
    return raw


@functools.cache
def known_types() -> list[Any]:
    """Containers of settings that solo-learn's own scripts put into checkpoints: they run nothing.

    omegaconf's nodes with what they consist of, and Lightning's AttributeDict.
    """
    from omegaconf import base, listconfig, nodes

    types: list[Any] = [DictConfig, listconfig.ListConfig, base.ContainerMetadata, base.Metadata]
    types += [getattr(nodes, name) for name in NODES]
    types += [Any, dict, list, int, float, str, bool, bytes, tuple, set, type(None)]
    types += [collections.defaultdict, collections.OrderedDict, pathlib.PosixPath]
    # an ordinary dictionary stands for it
    types += [(collections.OrderedDict, f"{module}.AttributeDict") for module in LIGHTNINGS]
    return types


def newest_whole(folder: Path) -> Path:
    """The checkpoint of a folder with the most steps; damaged ones are named and skipped."""
    steps: dict[Path, int] = {}
    for candidate in sorted(folder.glob("*.ckpt"), key=lambda p: p.stat().st_mtime):
        try:
            steps[candidate] = load_raw(candidate).get("global_step", -1)
        except UserError as error:
            print(f"skipped: {error}")
    if steps:  # of equal steps, the one written last
        return max(reversed(steps), key=lambda path: steps[path])
    deeper = [path for depth in range(1, 4) for path in folder.glob("*/" * depth + "*.ckpt")]
    unsaved = "; its run saved none, take another one" if (folder / "args.json").exists() else ""
    hint = f"; look in {min(deeper).parent}" if deeper else unsaved
    raise UserError(f"{folder}: holds no whole checkpoint (*.ckpt){hint}")


def config_beside(path: str | Path) -> DictConfig | None:
    """The config that a run wrote beside its checkpoints, from a checkpoint or the run's folder.

    Returns:
        None where there is none; the flat args.json of 1.0.2's own scripts is none.

    Raises:
        UserError: it is damaged.
    """
    path = user_path(path)
    file = (path if path.is_dir() else path.parent) / "args.json"
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text())
        if isinstance(content, dict) and "backbone" not in content:
            return None
        names = (content["backbone"]["name"], content["data"]["dataset"])
        if not all(isinstance(name, str) for name in names):
            raise TypeError(f"no names: {names}")
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{file}: damaged, or not the settings of a run ({reason})") from error
    config = OmegaConf.create(content)
    if "started_from" not in config and config.data.dataset in DEFAULT_SIZES:
        # main_linear.py fills in a size that it does not use
        config.data.pop("augmentations", None)
    return config


def _no_config(path: Path, part: str) -> UserError:
    """The error where a checkpoint has no config beside it, which would name a part of it."""
    file = path.parent / "args.json"
    if not file.is_file():
        return UserError(f"{file}: missing; it names the {part}")
    return UserError(
        f"{file}: that of solo-learn 1.0.2's own scripts, which is not read; in Python, give the "
        "backbone by load_backbone(..., config={'backbone': {'name': 'resnet18'}})"
    )


def load_backbone(
    path: str | Path | Checkpoint,
    masked: bool | None = None,
    config: DictConfig | Mapping[str, Any] | None = None,
) -> tuple[nn.Module, Checkpoint]:
    """The backbone of a checkpoint in evaluation mode: images to N × D features.

    Args:
        path: checkpoint file or run folder, or what was read of it.
        masked: True for masked features, False for plain ones, None for masked ones where the
            checkpoint has a mask.
        config: overrides the config beside the checkpoint (backbone, data set): a whole config,
            or a dictionary of what differs, such as ``{"backbone": {"name": "vit_tiny"}}``.

    Raises:
        UserError: there are no such features, or the backbone does not fit.

    Example:
        >>> backbone, checkpoint = load_backbone("trained_models/metamask/offline-abc")
        ... # doctest: +SKIP
    """
    checkpoint = read_checkpoint(path)
    if config is None:
        config = checkpoint.config
    elif not isinstance(config, DictConfig):
        known = checkpoint.config or {"method": None, "data": {"dataset": "custom"}}
        config = OmegaConf.merge(known, dict(config))  # type: ignore[assignment]
    if not isinstance(config, DictConfig):
        raise _no_config(checkpoint.path, "backbone")
    _check_masked(checkpoint, masked)
    check_backbone_name(config)
    state = checkpoint.backbone
    if str(config.backbone.name).startswith("resnet") and (stem := stem_of(state)):
        # the weights know it best: a probe's config, or another data set, need not tell of it
        config = OmegaConf.merge(config, {"backbone": {"stem": stem}})  # type: ignore[assignment]
    backbone = build_backbone(config)
    try:
        backbone.load_state_dict(state)
    except RuntimeError as error:
        fresh = backbone.state_dict()
        wrong = [n for n in fresh if n not in state or fresh[n].shape != state[n].shape]
        wrong += [n for n in state if n not in fresh]
        raise UserError(
            f"{checkpoint.path}: backbone.name={config.backbone.name} with its settings does not "
            f"fit; first difference at {wrong[0] if wrong else str(error).splitlines()[0]}"
        ) from error
    if checkpoint.mask is not None and masked is not False:
        backbone = MaskedBackbone(backbone, checkpoint.mask)
    return backbone.eval(), checkpoint


def _check_masked(checkpoint: Checkpoint, masked: bool | None) -> None:
    if masked and checkpoint.mask is None and not checkpoint.folded:
        raise UserError(f"{checkpoint.path}: holds no mask, so there are no masked features")
    if masked is False and checkpoint.folded:
        raise UserError(
            f"{checkpoint.path}: its mask is folded into the backbone, so there are no plain "
            "features; take the checkpoint that it was folded from"
        )


def load_projector(
    path: str | Path | Checkpoint, masked: bool | None = None
) -> tuple[nn.Module, Checkpoint]:
    """A whole method in evaluation mode, as a module from images to its projected features.

    Raises:
        UserError: the checkpoint holds no such method, or ``masked`` asks for other features than
            its projector takes.
    """
    checkpoint = read_checkpoint(path)
    _check_masked(checkpoint, masked)
    if masked is False and checkpoint.mask is not None:
        raise UserError(f"{checkpoint.path}: its projector takes masked features only")
    if checkpoint.config is None:
        raise _no_config(checkpoint.path, "method")
    if not checkpoint.config.get("method"):
        raise UserError(f"{checkpoint.path}: a probe or fine-tuned model has no projector")
    if checkpoint.method not in METHODS:
        raise UserError(f"{checkpoint.path}: method {checkpoint.method} is unknown here")
    model = build_method(checkpoint.config.copy())
    state = {BACKBONE_PREFIX + name: weight for name, weight in checkpoint.backbone.items()}
    try:
        missing = model.load_state_dict(checkpoint.rest | state, strict=False).missing_keys
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{checkpoint.path}: does not fit its args.json: {reason}") from error
    # teachers, which only training needs
    missing = [name for name in missing if not name.startswith("momentum_")]
    if missing:
        raise UserError(f"{checkpoint.path}: does not fit its args.json: {missing[0]} is missing")
    return Projector(model.eval(), str(checkpoint.method)), checkpoint


class Projector(nn.Module):
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


def check_backbone_name(config: DictConfig) -> None:
    """Raises UserError unless solo-learn has the backbone that the config names."""
    name = OmegaConf.select(config, "backbone.name", default=None)
    if name not in backbone_names():
        raise UserError(f"backbone.name={name}: allowed are {', '.join(backbone_names())}")


class MaskedBackbone(nn.Module):
    """A backbone followed by a fixed mask; looks like a backbone to solo-learn's linear model."""

    def __init__(self, backbone: nn.Module, mask: Tensor):
        super().__init__()
        self.backbone = backbone
        self.num_features = mask.numel()
        self.mask = DimensionalMask(mask.numel(), "linear")
        self.mask.logits.data.copy_(mask)

    def forward(self, images: Tensor) -> Tensor:
        return self.mask(self.backbone(images))
