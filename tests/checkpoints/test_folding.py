"""Folded features are the masked features, for every backbone of the installed solo-learn."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from checkpoints_of_runs import (
    backbone_config,
    random_backbone,
    random_images,
    write_backbone_run,
    write_run,
)
from omegaconf import OmegaConf
from torch import Tensor, nn

from metamask_solo.checkpoints.exporting import fold_checkpoint
from metamask_solo.checkpoints.folding import fold_mask
from metamask_solo.errors import UserError
from metamask_solo.hosts import (
    BACKBONE_PREFIX,
    METHODS,
    RELEASE,
    backbone_names,
    build_backbone,
    build_method,
)

CASES = [(name, "imagenet100") for name in backbone_names()]
CASES += [(name, "cifar10") for name in ("resnet18", "resnet50")]  # the 3x3 stem
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4}


def shallow_backbone(name: str, dataset: str = "imagenet100", **kwargs: Any) -> nn.Module:
    """A backbone with random weights; all but the ResNets are cut to one block a stage.

    The constructors fix the depth and spend most of their time on the weights of blocks that the
    fold does not touch, so the large families are laid out without memory, cut, and then filled.
    """
    config = backbone_config(name, dataset, **kwargs)
    if not name.startswith(("vit", "convnext", "poolformer", "swin")):
        return random_backbone(config)
    hollow = not name.startswith("swin")
    with torch.device("meta" if hollow else "cpu"):
        backbone: Any = build_backbone(config)
    if name.startswith("vit"):
        backbone.blocks = backbone.blocks[:1]
    elif name.startswith("poolformer"):
        stages = backbone.network
        cut = [stage[:1] if isinstance(stage, nn.Sequential) else stage for stage in stages]
        backbone.network = nn.ModuleList(cut)
    else:
        for stage in backbone.stages if name.startswith("convnext") else backbone.layers:
            stage.blocks = stage.blocks[:1]
    if hollow:
        backbone.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(-0.5, 1.5)
            elif hollow:
                parameter.normal_(std=1 / math.sqrt(parameter[0].numel()))
    return backbone.eval()


def train(backbone: nn.Module, name: str) -> None:
    """Steps that move the weights and the statistics of BatchNorm."""
    backbone.train()
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.05)
    for _ in range(2):
        loss = (backbone(random_images(name, 4)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(backbone.parameters(), 1.0)
        optimizer.step()
    backbone.eval()


def make_mask(dims: int, signed: bool = False) -> Tensor:
    """A mask with zeros and other odd entries in its first eight dimensions."""
    mask = torch.sigmoid(2 * torch.randn(dims, dtype=torch.float64))
    if signed:
        mask = mask * torch.randn(dims).sign()
    edges = [0.0, 1e-8, 1.0, 2.0**-60, 2.0**-61, 1e-30, 3.0, -0.0]
    mask[: len(edges)] = torch.tensor(edges, dtype=torch.float64)
    return mask


@torch.no_grad()
def features_of(backbone: nn.Module, images: Tensor) -> Tensor:
    return backbone(images)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dataset"), CASES)
def test_folded_features_are_the_masked_ones(name: str, dataset: str) -> None:
    torch.manual_seed(0)
    backbone = shallow_backbone(name, dataset)
    if dataset == "cifar10" or name in ("vit_tiny", "swin_tiny", "wide_resnet28w2"):
        train(backbone, name)
    residual = name.startswith("resnet")
    signed = not residual and not name.startswith("wide")
    images = random_images(name)
    mask = make_mask(features_of(backbone, images).shape[1], signed)
    for dtype, bound in BOUNDS.items():
        plain = copy.deepcopy(backbone).to(dtype)
        features = features_of(plain, images.to(dtype))
        expected = features * mask.to(dtype)
        floored = fold_mask(plain, mask, name)
        error = (features_of(plain, images.to(dtype)) - expected).abs()
        assert features.abs().max() > 1e-3
        assert error.max() <= bound * expected.abs().max()
        # and dimension by dimension, however small its mask; floored ones are below 2^-60
        allowed = (bound * mask.abs()).clamp(min=2.0**-60 if floored else 0.0)
        assert (error <= allowed.to(dtype) * features.abs().max()).all()
        assert floored == (4 if residual else 0)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("vit_tiny", {"global_pool": "avg"}),  # the last norm comes after pooling
        ("vit_tiny", {"global_pool": "max"}),
        ("vit_tiny", {"global_pool": "avg", "fc_norm": False}),
        ("swin_tiny", {"global_pool": "avg"}),
    ],
)
def test_settings_that_move_the_last_norm_or_the_pooling(name: str, kwargs: Any) -> None:
    torch.manual_seed(1)
    backbone = shallow_backbone(name, **kwargs).double()
    images = random_images(name).double()
    features = features_of(backbone, images)
    mask = make_mask(features.shape[1], signed=True)
    fold_mask(backbone, mask, name)
    error = features_of(backbone, images) - features * mask
    assert error.abs().max() <= 1e-9 * (features * mask).abs().max()


SIGNED = torch.tensor([1.0, -0.5]).repeat(256)


@pytest.mark.parametrize(
    ("name", "kwargs", "mask", "reason"),
    [
        ("resnet18", {}, SIGNED, "256 negative entries of 512.*ReLU"),
        ("resnet18", {"act_layer": nn.SiLU}, torch.ones(512) / 2, "folded.*off by"),
        ("vit_tiny", {"global_pool": "max", "fc_norm": False}, SIGNED[:192], "off by.*pooling"),
        ("vit_tiny", {"global_pool": "map"}, torch.ones(192) / 2, "off by"),
        ("vit_tiny", {"final_norm": False}, torch.ones(192), "end in a norm with weights"),
        ("vit_tiny", {}, torch.ones(512), r"512 entries.*shape \(2, 192\)"),
        ("resnet18", {}, torch.ones(1, 512), "one row"),
        ("resnet18", {}, torch.full((512,), float("nan")), "finite"),
        ("resnet18", {}, torch.full((512,), 1e20), "above"),
    ],
)
def test_what_cannot_be_folded_is_refused_and_left_alone(
    name: str, kwargs: Any, mask: Tensor, reason: str
) -> None:
    torch.manual_seed(0)
    if "act_layer" in kwargs:
        backbone: nn.Module = timm.create_model("resnet18", num_classes=0, **kwargs).eval()
    else:
        backbone = shallow_backbone(name, **kwargs)
    before = copy.deepcopy(backbone.state_dict())
    with pytest.raises(UserError, match=reason) as caught:
        fold_mask(backbone, mask, name)
    assert "\n" not in str(caught.value)
    after = backbone.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_backbone_under_the_name_of_another_is_refused() -> None:
    with pytest.raises(UserError, match="backbone resnet18: a mask cannot be folded.*not those"):
        fold_mask(timm.create_model("regnetx_002", num_classes=0), torch.ones(368), "resnet18")
    with pytest.raises(UserError, match="folding is supported only for"):
        fold_mask(nn.Flatten(), torch.ones(3 * 64 * 64), "pixels")
    with pytest.raises(UserError, match="float16"):
        fold_mask(shallow_backbone("resnet18").half(), torch.ones(512), "resnet18")
    grey = timm.create_model("resnet18", num_classes=0, in_chans=1).eval()
    assert fold_mask(grey, torch.rand(512) + 0.1, "resnet18", torch.randn(1, 1, 32, 32)) == 0
    with pytest.raises(UserError, match=r"images of shape \(1, 3, 32, 32\).*images="):
        fold_mask(grey, torch.rand(512), "resnet18", torch.randn(1, 3, 32, 32))


def test_zero_entries_are_exactly_zero_and_lose_nothing_elsewhere() -> None:
    torch.manual_seed(2)
    backbone = shallow_backbone("resnet50").double()
    images = random_images("resnet50").double()
    features = features_of(backbone, images)
    mask = torch.zeros(2048)
    mask[::7], mask[1] = 1.0, -(2.0**-70)  # below the floor a sign does not count
    assert fold_mask(backbone, mask, "resnet50") == int((mask <= 0).sum())
    folded = features_of(backbone, images)
    assert (folded[:, mask <= 0] == 0).all()
    assert torch.allclose(folded[:, ::7], features[:, ::7], rtol=1e-12, atol=0)


def test_training_mode_low_precision_and_flushed_numbers_have_the_masked_features_too() -> None:
    torch.manual_seed(3)
    backbone, images = shallow_backbone("resnet18"), random_images("resnet18", 4)
    mask = make_mask(512)
    folded = copy.deepcopy(backbone)
    fold_mask(folded, mask, "resnet18")
    for change, bound in ((nn.Module.train, 1e-4), (nn.Module.bfloat16, 0.05)):
        plain, low = (change(copy.deepcopy(model)) for model in (backbone, folded))
        x = images.to(next(plain.parameters()).dtype)
        expected = features_of(plain, x).float() * mask.float()
        error = features_of(low, x).float() - expected
        assert error.abs().max() <= bound * expected.max()
    expected = features_of(backbone, images) * mask.float()
    assert torch.set_flush_denormal(True)
    try:
        error = features_of(folded, images) - expected
    finally:
        torch.set_flush_denormal(False)
    assert error.abs().max() <= 1e-4 * expected.max()


# ---- checkpoints


def plain_weights(state: dict[str, Tensor], prefix: str = BACKBONE_PREFIX) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): w for name, w in state.items() if name.startswith(prefix)}


def load_as_the_host_does(path: Path) -> Any:
    """As main_knn.py and main_umap.py of GitHub main load a method."""
    config = OmegaConf.create(json.loads((path.parent / "args.json").read_text()))
    if RELEASE == "main":
        method = METHODS[config.method]
        return method.load_from_checkpoint(path, strict=False, cfg=config).eval()
    model = build_method(config)  # 1.0.2 has no such script; its methods take keyword arguments
    model.load_state_dict(torch.load(path, weights_only=True)["state_dict"], strict=True)
    return model.eval()


def test_a_folded_checkpoint_serves_the_hosts_tools(images: Path, tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", images)
    raw = torch.load(path, weights_only=True)
    raw["state_dict"]["mask.logits"][7] = -200.0
    history = {"step": torch.tensor([0, 12]), "mask": torch.rand(2, 512)}
    raw["metamask"] = {"kind": "sigmoid", "history": history}
    torch.save(raw | {"optimizer_states": [], "pytorch-lightning_version": "2.6.0"}, path)
    before = load_as_the_host_does(path)

    folded = fold_checkpoint(path.parent, tmp_path / "folded")

    assert folded == (tmp_path / "folded" / "folded.ckpt", 512, 1, "")
    names = sorted(file.name for file in folded.path.parent.iterdir())
    assert names == ["args.json", "folded.ckpt"]
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected, actual = before(x), load_as_the_host_does(folded.path)(x)
    for key in ("feats", "z", "logits"):
        torch.testing.assert_close(actual[key], expected[key], rtol=1e-3, atol=1e-4)
    # as main_linear.py loads it: the backbone's keys alone, unknown ones dropped without a word
    content = torch.load(folded.path, weights_only=True)
    config = OmegaConf.create(json.loads((path.parent / "args.json").read_text()))
    backbone = build_backbone(config).eval()
    state = plain_weights(content["state_dict"])
    assert backbone.load_state_dict(state, strict=False) == ([], [])
    torch.testing.assert_close(features_of(backbone, x), expected["feats"], rtol=1e-3, atol=1e-4)

    assert content["metamask"].pop("history").keys() == {"step", "mask"}
    assert content["metamask"] == {"kind": "linear", "folded": True}
    assert (content["state_dict"]["mask.logits"] == 1).all()
    assert "optimizer_states" not in content
    args = json.loads((tmp_path / "folded/args.json").read_text())
    mask = {"kind": "linear", "initial_logit": None}
    assert mask.items() <= args["method_kwargs"]["mask"].items()  # GitHub main's has the defaults
    assert args["method_kwargs"]["meta"]["enabled"] is False
    with pytest.raises(UserError, match=r"folded\.ckpt: its mask is folded already"):
        fold_checkpoint(folded.path, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_checkpoint_in_double_precision_and_of_the_other_release(tmp_path: Path) -> None:
    path, x, _ = write_backbone_run(tmp_path / "run", "resnet18")
    raw = torch.load(path, weights_only=True)
    prefix = {"encoder.": "backbone.", "backbone.": "encoder."}[BACKBONE_PREFIX]
    state = {n.replace(BACKBONE_PREFIX, prefix): w for n, w in raw["state_dict"].items()}
    state = {name: w.double() if w.is_floating_point() else w for name, w in state.items()}
    state[f"{prefix}layer4.1.bn2.weight"] += 1e-12  # lost in float32
    torch.save(raw | {"state_dict": state}, path)
    backbone = build_backbone(backbone_config("resnet18")).double().eval()
    backbone.load_state_dict(plain_weights(state, prefix))
    expected = features_of(backbone, x.double()) * torch.sigmoid(state["mask.logits"])

    folded = torch.load(fold_checkpoint(path, tmp_path / "out").path, weights_only=True)
    backbone.load_state_dict(plain_weights(folded["state_dict"]))
    error = features_of(backbone, x.double()) - expected
    assert error.abs().max() <= 1e-13 * expected.abs().max()
