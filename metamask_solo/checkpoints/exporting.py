"""Folded checkpoints: of solo-learn's form, or as a model of timm."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from metamask_solo.atomic_files import atomic_write
from metamask_solo.checkpoints.folding import fold_mask, random_images
from metamask_solo.checkpoints.reading import Checkpoint, load_backbone, read_checkpoint
from metamask_solo.data.datasets import FINGERPRINTS, write_fingerprints
from metamask_solo.data.transforms import timm_image_config
from metamask_solo.errors import UserError
from metamask_solo.hosts import BACKBONE_PREFIX
from metamask_solo.hosts.stem import SMALL, stem_of
from metamask_solo.method.mask import DimensionalMask
from metamask_solo.paths import user_path

FORMS = ("host", "timm")
FOLDED_NAME = "folded.ckpt"
WEIGHTS, CONFIG = "model.safetensors", "config.json"  # of a folder for timm
ENDINGS = (".safetensors", ".pt", ".pth", ".ckpt")
# Parts of a Lightning checkpoint that belong to the weights; the others resume a training run.
KEPT_PARTS = ("state_dict", "epoch", "global_step", "pytorch-lightning_version", "hyper_parameters")
# what timm adds to the name of an architecture in solo-learn
TIMM_SIZES = {"vit": "_patch16_224", "swin": "_patch4_window7_224"}
TOLERANCE = 1e-4  # of the largest feature, in single precision, after many layers


class Folded(NamedTuple):
    """What was written: file or folder, mask entries in all and floored ones, Python that opens it.

    Of weights alone, the Python makes the model that takes them.
    """

    path: Path
    dims: int
    floored: int
    code: str


def fold_checkpoint(
    path: str | Path, out: str | Path, form: str = "host", force: bool = False
) -> Folded:
    """Writes a checkpoint whose plain backbone computes the masked features.

    ``host`` writes a solo-learn checkpoint, with its args.json beside it, in a folder that holds
    no other: the layout that main_linear.py, main_knn.py and main_umap.py of solo-learn's GitHub
    main read. Its mask is 1 in every dimension and stays so, hence the method's own features and
    projections are those of before; heads and classifier are kept, optimiser states are not.

    ``timm`` writes timm's own model, also of a checkpoint without a mask: its features are compared
    with the backbone's on one batch before anything is written. A probe or a fine-tuned model keeps
    its classifier; other models have none (``num_classes=0``). A folder is what
    ``timm.create_model("local-dir:OUT", pretrained=True)`` opens, with any ``num_classes`` and
    ``in_chans``; a file is a bare state dict for ``strict=True``. That of a ResNet fits
    torchvision's, too (without a classifier, ``model.fc = nn.Identity()``).

    Args:
        path: a checkpoint, or the folder of its run.
        out: the ending decides the format: ``.ckpt`` or a folder (``host``), ``.safetensors``,
            ``.pt``, ``.pth``, ``.ckpt`` or a folder (``timm``). A folder is a name without an
            ending, or one that ends in ``/``.
        form: ``host`` or ``timm``.
        force: whether to overwrite ``out``. The checkpoint at ``path`` never is.

    Raises:
        UserError: the checkpoint has no mask or a folded one (``host``), the mask cannot be folded,
            timm has no such model, or ``out`` cannot be written.
    """
    checkpoint = read_checkpoint(path)
    backbone, _ = load_backbone(checkpoint, None if checkpoint.folded else False)
    assert checkpoint.config is not None  # load_backbone needs it
    target, is_folder = _target(checkpoint.path, out, form, force)
    if form == "host" and (checkpoint.folded or checkpoint.mask is None):
        reason = "its mask is folded already" if checkpoint.folded else "has no mask to fold"
        raise UserError(
            f"{checkpoint.path}: {reason} (method: {checkpoint.method}); --timm writes it as it is"
        )
    weights = checkpoint.backbone
    if any(tensor.dtype == torch.float64 for tensor in weights.values()):
        backbone.double().load_state_dict(weights)  # they were rounded to float32
    dims = floored = 0
    if checkpoint.mask is not None:
        dims = checkpoint.mask.numel()
        floored = fold_mask(backbone, checkpoint.mask, checkpoint.config.backbone.name)
    if form == "host":
        _write_host(backbone, checkpoint, target)
        code = ""
    else:
        code = _write_timm(backbone, checkpoint, target, is_folder)
    return Folded(target, dims, floored, code)


def _target(source: Path, out: str | Path, form: str, force: bool) -> tuple[Path, bool]:
    """The file to write, or the folder for timm, and whether it is one; see fold_checkpoint."""
    if form not in FORMS:
        raise UserError(f"form={form}: allowed are {', '.join(FORMS)}")
    target = user_path(out)
    is_folder = str(out).endswith(("/", os.sep)) or target.is_dir() or not target.suffix
    endings = (".ckpt",) if form == "host" else ENDINGS
    if not is_folder and target.suffix not in endings:
        more = f" (with --timm, in {', '.join(ENDINGS)})" if form == "host" else ""
        raise UserError(f"{out}: must end in {', '.join(endings)}, or in / for a folder{more}")
    if is_folder and form == "timm":
        written = [target / WEIGHTS, target / CONFIG]
        names = {entry.name for entry in target.iterdir()} if target.is_dir() else set()
        if unexpected := sorted(names - {WEIGHTS, CONFIG}):
            raise UserError(f"{out}: is a folder that holds {unexpected[0]}; name a new one")
    elif form == "host":
        target = target / FOLDED_NAME if is_folder else target
        written = [target, target.parent / "args.json", target.parent / FINGERPRINTS]
        if target.parent.resolve() == source.parent.resolve():
            raise UserError(f"{out}: is in the folder of {source.name}; give another folder")
        if ckpts := [file.name for file in target.parent.glob("*.ckpt") if file != target]:
            raise UserError(
                f"{target.parent}: holds {ckpts[0]} already; a folder is to hold one .ckpt"
            )
    else:
        written = [target]
        if target.resolve() == source.resolve():
            raise UserError(f"{out}: is the checkpoint to fold; name another file")
    there = [file for file in written if file.exists()]
    if there and not target.exists():
        raise UserError(f"{there[0]}: exists already, and is not of {out}; name a new folder")
    if there and not force:
        raise UserError(f"{there[0]}: exists already; --force overwrites it")
    return target, is_folder and form == "timm"


def _write_host(backbone: nn.Module, checkpoint: Checkpoint, target: Path) -> None:
    """Writes a checkpoint of solo-learn with a folded backbone and a mask of ones."""
    assert checkpoint.mask is not None  # what has none is refused
    mask = DimensionalMask(checkpoint.mask.numel(), "linear", dtype=torch.float32).state_dict()
    rest = checkpoint.rest | {f"mask.{name}": value for name, value in mask.items()}
    weights = {BACKBONE_PREFIX + name: value for name, value in backbone.state_dict().items()}
    content = {key: checkpoint.raw[key] for key in KEPT_PARTS if key in checkpoint.raw}
    content |= {"state_dict": rest | weights, "metamask": {"kind": "linear", "folded": True}}
    if (history := checkpoint.raw.get("metamask", {}).get("history")) is not None:
        content["metamask"]["history"] = history
    fixed = {"mask": {"kind": "linear", "initial_logit": None}, "meta": {"enabled": False}}
    config = OmegaConf.merge(checkpoint.config, {"method_kwargs": fixed})
    with atomic_write(target) as file, atomic_write(target.parent / "args.json") as args:
        torch.save(content, file)
        write_fingerprints(None, target.parent, checkpoint.path.parent)
        args.write_text(json.dumps(OmegaConf.to_container(config), indent=1))


@torch.no_grad()
def _write_timm(backbone: nn.Module, checkpoint: Checkpoint, target: Path, is_folder: bool) -> str:
    """Writes timm's model that gives what backbone and classifier give; its Python."""
    import timm

    from metamask_solo.checkpoints import timm_stems

    config = checkpoint.config
    assert config is not None  # load_backbone needs it
    name = str(config.backbone.name)
    small = name.startswith("resnet") and stem_of(backbone.state_dict()) == SMALL
    classifier = _classifier(checkpoint)
    classes = 0 if classifier is None else classifier.out_features
    stems = f"import {timm_stems.__name__}; " if small else ""
    architecture = f"{name}_3x3" if small else name + TIMM_SIZES.get(name.split("_")[0], "")
    arguments = _timm_arguments(backbone, config)
    try:
        constructor = getattr(timm_stems if small else timm.models, architecture)
        model = constructor(num_classes=classes, **arguments)
    except (AttributeError, TypeError) as error:
        raise UserError(f"--timm: has no model for solo-learn's {name}") from error
    state, whole = backbone.state_dict(), nn.Sequential(backbone)
    dtype = next(backbone.parameters()).dtype
    images = random_images(backbone).to(dtype)
    if classifier is not None:
        head = _head(model)
        state |= {f"{head}.{part}": value for part, value in classifier.state_dict().items()}
        whole.append(classifier.to(dtype))
    expected = whole(images)
    try:
        model.load_state_dict(state)
        off = (model.eval().to(dtype)(images) - expected).abs().max()
        off /= expected.abs().max().clamp(min=torch.finfo(dtype).tiny)  # may all be 0
    except RuntimeError as error:
        raise UserError(
            f"--timm: its {name} is another model than solo-learn's, with weights of other names "
            "or shapes"
        ) from error
    if not off <= TOLERANCE:
        raise UserError(f"--timm: its {name} gives other features than solo-learn's ({off:.0e})")
    if not is_folder:
        _write_state(state, target)
        settings = "".join(f", {key}={value!r}" for key, value in arguments.items())
        return f'{stems}timm.create_model("{architecture}", num_classes={classes}{settings})'
    first = next(name for name, part in model.named_modules() if isinstance(part, nn.Conv2d))
    model.reset_classifier(max(1, classes))
    content = {
        "architecture": architecture,
        "num_classes": classes,
        "num_features": expected.shape[1] if classifier is None else classifier.in_features,
        "model_args": arguments,
        "pretrained_cfg": {
            **timm_image_config(config),
            "num_classes": classes,
            "first_conv": first,
            "classifier": _head(model),
        },
    }
    names = OmegaConf.select(config, "data.class_names", default=None)
    if names and len(names) == classes:
        content["label_names"] = list(names)
    _write_state(state, target / WEIGHTS)
    with atomic_write(target / CONFIG) as file:
        file.write_text(json.dumps(content, indent=1) + "\n")
    return f'{stems}timm.create_model("local-dir:{target}", pretrained=True)'


def _classifier(checkpoint: Checkpoint) -> nn.Linear | None:
    """The classifier of a probe or a fine-tuned model; a pretraining's online classifier is none.

    A probe may divide the features by a number first.
    """
    state, config = checkpoint.rest, checkpoint.config
    if config is None or config.get("method") or "classifier.weight" not in state:
        return None
    weight = state["classifier.weight"] / state.get("classifier.scale", 1.0)
    classifier = nn.Linear(weight.shape[1], weight.shape[0])
    classifier.load_state_dict({"weight": weight, "bias": state["classifier.bias"]})
    return classifier


def _head(model: Any) -> str:
    """timm's name of a model's classifier."""
    classifier = model.get_classifier()
    return next(name for name, part in model.named_modules() if part is classifier)


def _write_state(state: Mapping[str, Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    with atomic_write(file) as temporary:
        if file.suffix == ".safetensors":
            contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
            save_file(contiguous, temporary, metadata={"format": "pt"})
        else:
            torch.save(dict(state), temporary)


def _timm_arguments(backbone: Any, config: DictConfig) -> dict[str, Any]:
    """What the architecture was built with beside its name: the settings, and the image size."""
    settings = OmegaConf.select(config, "backbone.kwargs", default=None)
    arguments: Any = OmegaConf.to_container(settings) if settings else {}
    size = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
    if size is not None:  # ViT and Swin; solo-learn 1.0.2 takes the crop's
        arguments["img_size"] = size[0] if isinstance(size, tuple | list) else size
    if config.backbone.name.startswith("vit"):  # solo-learn has its own number for some methods
        arguments["num_heads"] = backbone.blocks[0].attn.num_heads
    return arguments
