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

from metamask_solo.errors import UserError
from metamask_solo.hosts import backbone_names, build_backbone
from metamask_solo.hosts.stem import stem_of
from metamask_solo.method.mask import DimensionalMask, mask_from_logits

PREFIXES = ("backbone.", "encoder.")
QUERY_PREFIX = "encoder_q."
MASK_KEY = "mask.logits"
NODES = ("AnyNode", "BooleanNode", "FloatNode", "IntegerNode", "PathNode", "StringNode")
# where releases of Lightning keep their AttributeDict
LIGHTNINGS = (
    "lightning.fabric.utilities.data",
    "lightning_fabric.utilities.data",
    "lightning.pytorch.utilities.parsing",
    "pytorch_lightning.utilities.parsing",
)
# how a probe or a fine-tuned model holds a backbone with its mask (MaskedBackbone)
WRAPPED_PREFIX, WRAPPED_MASK_KEY = "backbone.backbone.", "backbone.mask.logits"


@dataclass
class Checkpoint:
    """A checkpoint of solo-learn's form, of any method.

    Attributes:
        path: the file.
        config: the run's config from args.json beside it, or None.
        state_dict: parameter and buffer names to tensors.
        method: name of the pretraining method, or None where there is no config.
        mask: the mask m, shape (D,), or None.
        raw: all that the file holds.
    """

    path: Path
    config: DictConfig | None
    state_dict: dict[str, Tensor]
    method: str | None
    mask: Tensor | None
    raw: dict[str, Any]

    def backbone_state(self) -> dict[str, Tensor]:
        """The state of the plain backbone, without the host's prefix."""
        return {
            name.removeprefix(prefix): tensor
            for prefix in PREFIXES
            for name, tensor in self.state_dict.items()
            if name.startswith(prefix)
        }


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a checkpoint file, or the newest whole one of a run's folder.

    Raises:
        UserError: there is none, it is damaged, or it holds more than tensors and plain data.
    """
    path = Path(path)
    if path.is_dir():
        path = newest_whole(path)
    raw = load_raw(path)
    state = plain_names(raw.get("state_dict"))
    if not isinstance(state, dict) or not any(str(k).startswith(PREFIXES) for k in state):
        raise UserError(f"{path}: not a checkpoint of solo-learn (no backbone in its state_dict)")
    config = _read_config(path.parent / "args.json")
    mask = None
    if WRAPPED_MASK_KEY in state:
        state = _unwrapped(state)
        mask = state[MASK_KEY]
    elif MASK_KEY in state:
        kind = raw.get("metamask", {}).get("kind")
        if kind is None and config is not None:
            kind = OmegaConf.select(config, "method_kwargs.mask.kind", default="sigmoid")
        mask = mask_from_logits(state[MASK_KEY], kind or "sigmoid")
    method = (config.get("method") or config.get("pretrain_method")) if config else None
    return Checkpoint(path, config, state, method, mask, raw)


def plain_names(state: Any) -> Any:
    """A state without what wrappers add to names, and with MoCo's query encoder as the backbone.

    ``module.`` is DataParallel's and DDP's, ``_orig_mod.`` torch.compile's, anywhere in a name.
    """
    if not isinstance(state, dict):
        return state
    result: dict[str, Any] = {}
    for name, tensor in state.items():
        parts = str(name).split(".")
        if parts[0] == "module":
            parts = parts[1:]
        plain = ".".join(part for part in parts if part != "_orig_mod")
        if plain.startswith(QUERY_PREFIX):
            plain = PREFIXES[0] + plain.removeprefix(QUERY_PREFIX)
        result[plain] = tensor
    return result


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a probe on masked features, with backbone and mask where a method has them.

    Its mask is held as it is multiplied with, whatever its kind was in pretraining.
    """
    names = {WRAPPED_MASK_KEY: MASK_KEY}
    kind = WRAPPED_MASK_KEY.removesuffix("logits") + "_extra_state"
    names[kind] = kind.removeprefix(PREFIXES[0])
    for name in state:
        if name.startswith(WRAPPED_PREFIX):
            names[name] = PREFIXES[0] + name.removeprefix(WRAPPED_PREFIX)
    return {names.get(name, name): tensor for name, tensor in state.items()}


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
            found = re.search(r"(?:GLOBAL|class|global) `?([\w.]+)", str(error))
            what = f" ({found[1]})" if found else ""
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
    steps = {}
    refusals = []
    for candidate in sorted(folder.glob("*.ckpt"), key=lambda p: p.stat().st_mtime):
        try:
            found = load_raw(candidate).get("global_step")
        except UserError as error:
            refusals.append(f"skipped: {error}")
            continue
        steps[candidate] = found if isinstance(found, int) else -1
    for refusal in reversed(refusals):
        print(refusal)
    if steps:  # of equal steps, the one written last
        return max(reversed(steps), key=lambda path: steps[path])
    deeper = [path for depth in range(1, 4) for path in folder.glob("*/" * depth + "*.ckpt")]
    hint = f"; look in {min(deeper).parent}" if deeper else ""
    raise UserError(f"{folder}: holds no whole checkpoint (*.ckpt){hint}")


def config_beside(path: str | Path) -> DictConfig | None:
    """The config that a run wrote beside its checkpoints, from a checkpoint or the run's folder."""
    path = Path(path)
    return _read_config((path if path.is_dir() else path.parent) / "args.json")


def load_backbone(
    path: str | Path,
    masked: bool | None = None,
    config: DictConfig | Mapping[str, Any] | None = None,
) -> tuple[nn.Module, Checkpoint]:
    """The backbone of a checkpoint in evaluation mode: images to N × D features.

    Args:
        path: checkpoint file or run folder.
        masked: True for masked features, False for plain ones, None for masked ones where the
            checkpoint has a mask.
        config: overrides the config beside the checkpoint (backbone, data set): a whole config,
            or a dictionary of what differs, such as ``{"backbone": {"name": "vit_tiny"}}``.

    Raises:
        UserError: ``masked`` is True and there is no mask, or the backbone does not fit.

    Example:
        >>> backbone, checkpoint = load_backbone("trained_models/metamask/offline-abc")
        ... # doctest: +SKIP
    """
    checkpoint = read_checkpoint(path)
    if config is None:
        config = checkpoint.config
    elif not isinstance(config, DictConfig):
        if not isinstance(config, Mapping):
            raise UserError(
                f"config={config!r}: must be a mapping, such as "
                "{'backbone': {'name': 'resnet18'}}"
            )
        known = checkpoint.config or {"method": None, "data": {"dataset": "custom"}}
        config = OmegaConf.merge(known, dict(config))  # type: ignore[assignment]
    if not isinstance(config, DictConfig):
        raise UserError(f"{checkpoint.path.parent / 'args.json'}: missing; it names the backbone")
    if masked and checkpoint.mask is None:
        raise UserError(f"{checkpoint.path}: holds no mask, so there are no masked features")
    check_backbone_name(config)
    state = checkpoint.backbone_state()
    if str(config.backbone.name).startswith("resnet") and (found := stem_of(state)):
        # the weights know it best: a probe's config, or another data set, need not tell of it
        config = OmegaConf.merge(config, {"backbone": {"stem": found}})  # type: ignore[assignment]
    backbone = build_backbone(config)
    try:
        backbone.load_state_dict(state)
    except RuntimeError as error:
        own = backbone.state_dict()
        wrong = [n for n in own if n not in state or own[n].shape != state[n].shape]
        wrong += [n for n in state if n not in own]
        raise UserError(
            f"{checkpoint.path}: backbone.name={config.backbone.name} with its settings does not "
            f"fit; first difference at {wrong[0] if wrong else str(error).splitlines()[0]}"
        ) from error
    if checkpoint.mask is not None and masked is not False:
        backbone = MaskedBackbone(backbone, checkpoint.mask)
    return backbone.eval(), checkpoint


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


def _read_config(path: Path) -> DictConfig | None:
    if not path.is_file():
        return None
    try:
        config = OmegaConf.create(json.loads(path.read_text()))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    # the flat args.json of 1.0.2's own scripts says nothing in the form that is used here
    return config if isinstance(config, DictConfig) and "backbone" in config else None
