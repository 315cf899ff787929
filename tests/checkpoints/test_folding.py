"""Folded features are the masked features, for every backbone of the installed solo-learn."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
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

# the smallest of each family; one size is folded as another, and a fold proves itself on its model
SMALLEST = ["resnet18", "resnet50", "vit_tiny", "swin_tiny"]
if RELEASE == "main":
    SMALLEST += ["convnext_tiny", "poolformer_s12", "wide_resnet28w2"]
CASES: list[tuple[str, str, dict[str, Any]]] = [(name, "imagenet100", {}) for name in SMALLEST]
CASES += [("resnet18", "cifar10", {})]  # the 3x3 stem
CASES += [  # settings that move the last norm or the pooling
    ("vit_tiny", "imagenet100", {"global_pool": "avg"}),  # the norm comes after pooling
    ("vit_tiny", "imagenet100", {"global_pool": "max"}),
    ("vit_tiny", "imagenet100", {"global_pool": "avg", "fc_norm": False}),
]
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4}


def backbone_of(name: str, dataset: str = "imagenet100", **kwargs: Any) -> nn.Module:
    return random_backbone(backbone_config(name, dataset, **kwargs))


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


def test_every_backbone_is_of_a_family() -> None:
    families = tuple(name.split("_")[0].rstrip("0123456789") for name in SMALLEST)
    assert all(name.startswith(families) for name in backbone_names())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dataset", "kwargs"), CASES)
def test_folded_features_are_the_masked_ones(name: str, dataset: str, kwargs: Any) -> None:
    torch.manual_seed(0)
    backbone = backbone_of(name, dataset, **kwargs)
    images = random_images(name)
    if dataset == "cifar10":
        images = images[..., :32, :32]
    features_of(backbone.train(), images)  # moves the statistics of BatchNorm
    backbone.eval()
    residual = name.startswith("resnet")
    signed = not residual and not name.startswith("wide")
    mask = make_mask(features_of(backbone, images).shape[1], signed)
    for dtype, bound in BOUNDS.items():
        plain = copy.deepcopy(backbone).to(dtype)
        features = features_of(plain, images.to(dtype))
        expected = features * mask.to(dtype)
        floored = fold_mask(plain, mask, name, images)
        error = (features_of(plain, images.to(dtype)) - expected).abs()
        assert features.abs().max() > 1e-3
        assert error.max() <= bound * expected.abs().max()
        # and dimension by dimension, however small its mask; floored ones are below 2^-60
        allowed = (bound * mask.abs()).clamp(min=2.0**-60 if floored else 0.0)
        assert (error <= allowed.to(dtype) * features.abs().max()).all()
        assert floored == (4 if residual else 0)


SIGNED = torch.tensor([1.0, -0.5]).repeat(256)


@pytest.mark.parametrize(
    ("name", "kwargs", "mask", "reason"),
    [
        ("resnet18", {}, SIGNED, "256 negative entries of 512.*ReLU"),
        ("resnet18", {}, torch.ones(1, 512), "one row"),
        ("resnet18", {}, torch.full((512,), float("nan")), "finite"),
        ("resnet18", {}, torch.full((512,), 1e20), "above"),
        ("vit_tiny", {}, torch.ones(512), r"512 entries.*shape \(2, 192\)"),
        ("vit_tiny", {"global_pool": "max", "fc_norm": False}, SIGNED[:192], "off by.*pooling"),
        ("vit_tiny", {"final_norm": False}, torch.ones(192), "end in a norm with weights"),
    ],
)
def test_what_cannot_be_folded_is_refused_and_left_alone(
    name: str, kwargs: Any, mask: Tensor, reason: str
) -> None:
    backbone = backbone_of(name, **kwargs)
    before = copy.deepcopy(backbone.state_dict())
    with pytest.raises(UserError, match=reason) as caught:
        fold_mask(backbone, mask, name)
    assert "\n" not in str(caught.value)
    after = backbone.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_other_networks_than_solo_learns_are_refused_unless_they_fold_as_these() -> None:
    def of_timm(name: str, **settings: Any) -> nn.Module:
        return timm.create_model(name, num_classes=0, **settings).eval()

    for backbone, dims, reason in (
        (of_timm("regnetx_002"), 368, "cannot be folded.*not those that the name stands for"),
        (of_timm("resnet18", act_layer=nn.SiLU), 512, "folded.*off by"),
        (of_timm("resnet18").half(), 512, "holds float16"),
    ):
        with pytest.raises(UserError, match=f"backbone resnet18: .*{reason}"):
            fold_mask(backbone, torch.full((dims,), 0.5), "resnet18")
    with pytest.raises(UserError, match="supported only for"):
        fold_mask(nn.Flatten(), torch.ones(3 * 64 * 64), "pixels")
    grey, mask = of_timm("resnet18", in_chans=1), torch.rand(512) + 0.1
    assert fold_mask(grey, mask, "resnet18", torch.randn(1, 1, 32, 32)) == 0
    with pytest.raises(UserError, match=r"images of shape \(1, 3, 32, 32\).*images="):
        fold_mask(grey, mask, "resnet18", torch.randn(1, 3, 32, 32))


def test_zero_entries_are_exactly_zero_and_lose_nothing_elsewhere() -> None:
    torch.manual_seed(2)
    backbone = backbone_of("resnet50").double()
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
    backbone, images = backbone_of("resnet18"), random_images("resnet18", 4)
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
    np.save(path.parent / "images.npy", np.arange(3, dtype=np.uint64))  # trained on these

    folded = fold_checkpoint(path.parent, tmp_path / "folded")

    assert folded == (tmp_path / "folded" / "folded.ckpt", 512, 1, "")
    names = sorted(file.name for file in folded.path.parent.iterdir())
    assert names == ["args.json", "folded.ckpt", "images.npy"]
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
