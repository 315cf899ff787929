"""Folded features are the masked features, for every backbone of the installed solo-learn."""

import copy
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torchvision
from omegaconf import DictConfig, OmegaConf
from packaging.version import Version
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from metamask_solo.checkpoints.folding import fold_checkpoint, fold_mask
from metamask_solo.errors import UserError
from metamask_solo.hosts import (
    BACKBONE_PREFIX,
    METHODS,
    RELEASE,
    backbone_names,
    build_backbone,
    build_method,
    pl,
)
from metamask_solo.method.mask import mask_from_logits

CASES = [(name, "imagenet100") for name in backbone_names()]
CASES += [(name, "cifar10") for name in ("resnet18", "resnet50")]  # the 3x3 stem
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4}

# Settings that some cases below need, with the release of timm that brought them: older ones, down
# to the lower bound in pyproject.toml, build no such backbone.
LATER_SETTINGS: list[tuple[str, dict[str, Any], str]] = [
    ("vit_tiny", {"global_pool": "map"}, "0.9.8"),
    ("vit_tiny", {"global_pool": "max"}, "1.0.7"),
    ("vit_tiny", {"final_norm": False}, "1.0.11"),
    ("swin_tiny", {"global_pool": "max"}, "1.0.31"),
    ("swin_tiny", {"global_pool": "avgmax"}, "1.0.31"),
]


def timm_has(release: str) -> bool:
    return Version(timm.__version__) >= Version(release)


def make_config(name: str, dataset: str = "imagenet100", method: str = "metamask", **kwargs):
    if name.startswith("vit"):
        kwargs = {"img_size": 32, "patch_size": 16, **kwargs}
    elif name.startswith("swin"):
        kwargs = {"img_size": 64, "window_size": 2, **kwargs}
    return OmegaConf.create(
        {
            "method": method,
            "backbone": {"name": name, "kwargs": kwargs},
            "data": {"dataset": dataset},
        }
    )


class RatesOnTheCpu(TorchFunctionMode):
    """Keeps ``torch.linspace`` off the meta device.

    timm before 1.0.21 reads the blocks' drop path rates from one, and the meta device holds no
    numbers to read. None of the backbones gets weights from it.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.linspace:
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def make_backbone(name: str, dataset: str = "imagenet100", method: str = "metamask", **kwargs):
    """A backbone with random weights; all but the ResNets are cut to one block a stage.

    The constructors fix the depth and spend most of their time on the weights of blocks that the
    fold does not touch, so the large families are laid out without memory, cut, and then filled.
    """
    config = make_config(name, dataset, method, **kwargs)
    hollow = name.startswith(("vit", "convnext", "poolformer"))
    with torch.device("meta" if hollow else "cpu"), RatesOnTheCpu():
        backbone = build_backbone(config)
    if name.startswith("vit"):
        backbone.blocks = backbone.blocks[:1]
    elif name.startswith(("convnext", "swin")):
        for stage in backbone.stages if name.startswith("convnext") else backbone.layers:
            stage.blocks = stage.blocks[:1]
    elif name.startswith("poolformer"):
        backbone.network = nn.ModuleList(
            stage[:1] if isinstance(stage, nn.Sequential) else stage for stage in backbone.network
        )
    if hollow:
        backbone.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.ndim == 1:  # norms, biases, layer scales
                parameter.uniform_(-0.5, 1.5)
            elif hollow:
                parameter.normal_(std=1 / math.sqrt(parameter[0].numel()))
    return backbone.eval()


def make_images(name: str, dataset: str = "imagenet100", count: int = 2) -> Tensor:
    size = 64
    if name.startswith("wide_resnet") or dataset == "cifar10":
        size = 8
    elif name.startswith("vit"):
        size = 32
    return torch.randn(count, 3, size, size)


def train(backbone: nn.Module, name: str, dataset: str = "imagenet100", steps: int = 2) -> None:
    """Steps that move the weights and the statistics of BatchNorm."""
    backbone.train()
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.05)
    for _ in range(steps):
        features = backbone(make_images(name, dataset, count=4))
        loss = (features - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(backbone.parameters(), 1.0)
        optimizer.step()
    backbone.eval()


def make_mask(dims: int, signed: bool) -> Tensor:
    mask = torch.sigmoid(2 * torch.randn(dims, dtype=torch.float64))
    if signed:
        mask = mask * torch.randn(dims).sign()
    edges = [0.0, 1e-8, 1.0, 2.0**-60, 2.0**-61, 1e-30, 3.0, -0.0]
    mask[: len(edges)] = torch.tensor(edges, dtype=torch.float64)
    return mask


def features_of(backbone: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return backbone(images)


def folded_copy(backbone: nn.Module, mask: Tensor, name: str) -> tuple[nn.Module, int]:
    folded = copy.deepcopy(backbone)
    return folded, fold_mask(folded, mask, name)


def installed(cases: list[tuple]) -> list[tuple]:
    """The cases, named by their first entry, that this release of solo-learn has a backbone for."""
    return [case for case in cases if case[0] in backbone_names()]


def buildable(cases: list[tuple]) -> list[tuple]:
    """The installed cases whose settings, their second entry, this release of timm has too."""
    return [
        case
        for case in installed(cases)
        if all(
            timm_has(release) or case[0] != name or not setting.items() <= case[1].items()
            for name, setting, release in LATER_SETTINGS
        )
    ]


def ends_in_norm(name: str) -> bool:
    return not name.startswith(("resnet", "wide_resnet"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dataset"), CASES)
def test_folded_features_are_the_masked_ones(name, dataset):
    torch.manual_seed(0)
    backbone = make_backbone(name, dataset)
    check_fold(backbone, name, dataset)
    train(backbone, name, dataset)
    check_fold(backbone, name, dataset)


def check_fold(backbone: nn.Module, name: str, dataset: str) -> None:
    images = make_images(name, dataset)
    mask = make_mask(features_of(backbone, images).shape[1], signed=ends_in_norm(name))
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
        assert floored == (4 if name.startswith("resnet") else 0)
        print(f"{name} {dataset} {dtype}: {error.max() / expected.abs().max():.1e}")


@pytest.mark.parametrize("method", ["mocov3", "mae"])
def test_vit_variants_of_other_methods_fold(method):
    # GitHub main builds other vision transformers for these; PyPI's 1.0.2 has only the usual one
    backbone = make_backbone("vit_tiny", method=method).double()
    images = make_images("vit_tiny").double()
    mask = make_mask(192, signed=True)
    expected = features_of(backbone, images) * mask
    assert fold_mask(backbone, mask, "vit_tiny") == 0
    assert (features_of(backbone, images) - expected).abs().max() <= 1e-9 * expected.abs().max()


@pytest.mark.parametrize(("name", "setting", "release"), LATER_SETTINGS)
def test_cases_are_left_out_only_for_settings_that_this_timm_lacks(name, setting, release):
    if timm_has(release):
        assert (name, setting) in buildable([(name, setting)])
        make_backbone(name, **setting)
    else:
        assert not buildable([(name, setting)])
        with pytest.raises((AssertionError, TypeError)) as refusal:
            make_backbone(name, **setting)
        assert Path(timm.__file__).parent in Path(refusal.traceback[-1].path).parents


@pytest.mark.parametrize(
    ("name", "kwargs", "signed"),
    buildable(
        [
            ("vit_tiny", {"global_pool": "avg"}, True),  # the last norm comes after pooling
            ("vit_tiny", {"global_pool": "max"}, True),
            ("vit_tiny", {"global_pool": "max", "fc_norm": False}, False),
            ("vit_tiny", {"global_pool": "avg", "fc_norm": False}, True),
            ("swin_tiny", {"global_pool": "avgmax"}, False),
            ("resnet50", {"zero_init_residual": True}, False),
            ("convnext_tiny", {"head_norm_first": True}, True),
        ]
    ),
)
def test_settings_that_move_the_last_norm_or_the_pooling(name, kwargs, signed):
    torch.manual_seed(1)
    backbone = make_backbone(name, **kwargs).double()
    images = make_images(name).double()
    features = features_of(backbone, images)
    mask = make_mask(features.shape[1], signed)
    fold_mask(backbone, mask, name)
    error = features_of(backbone, images) - features * mask
    assert error.abs().max() <= 1e-9 * (features * mask).abs().max()


@pytest.mark.parametrize(
    ("name", "kwargs", "reason"),
    buildable(
        [
            ("resnet18", {}, "3 negative entries of 512.*ReLU"),
            (
                "vit_tiny",
                {"global_pool": "max", "fc_norm": False},
                "3 negative entries of 192.*max",
            ),
            ("swin_tiny", {"global_pool": "max"}, "3 negative entries of 768.*max"),
            ("wide_resnet28w2", {}, "3 negative entries of 128.*LeakyReLU"),
            (
                "convnext_tiny",
                {"head_norm_first": True, "global_pool": "max"},
                "3 negative entries of 768.*max",
            ),
        ]
    ),
)
def test_negative_entries_are_refused_where_they_cannot_be_folded(name, kwargs, reason):
    backbone = make_backbone(name, **kwargs)
    before = copy.deepcopy(backbone.state_dict())
    mask = torch.ones(features_of(backbone, make_images(name)).shape[1])
    mask[[2, 5, 7]] = -0.5
    with pytest.raises(UserError, match=reason):
        fold_mask(backbone, mask, name)
    after = backbone.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_negative_entries_below_the_floor_are_taken_for_zero():
    backbone = make_backbone("resnet18")
    mask = torch.ones(512)
    mask[3] = -(2.0**-70)
    assert fold_mask(backbone, mask, "resnet18") == 1
    assert (features_of(backbone, make_images("resnet18"))[:, 3] == 0).all()


@pytest.mark.parametrize(
    ("name", "kwargs", "mask", "reason"),
    buildable(
        [
            ("vit_tiny", {"global_pool": "map"}, torch.ones(192), "attention pooling"),
            ("vit_tiny", {"final_norm": False}, torch.ones(192), "no norm"),
            ("convnext_tiny", {"head_hidden_size": 64}, torch.ones(64), "hidden layer"),
            ("vit_tiny", {}, torch.ones(512), "512 entries.*192 dimensions"),
            ("resnet18", {}, torch.ones(1, 512), "one row"),
            ("resnet18", {}, torch.full((512,), float("nan")), "finite"),
            ("resnet18", {}, torch.full((512,), 1e20), "above"),
        ]
    ),
)
def test_what_cannot_be_folded_is_refused(name, kwargs, mask, reason):
    with pytest.raises(UserError, match=reason):
        fold_mask(make_backbone(name, **kwargs), mask, name)


@pytest.mark.parametrize("layer", [nn.SiLU, nn.Hardswish])
def test_a_resnet_with_another_activation_is_refused_and_left_alone(layer):
    torch.manual_seed(0)
    backbone = timm.create_model("resnet18", num_classes=0, act_layer=layer).eval()
    before = copy.deepcopy(backbone.state_dict())
    with pytest.raises(UserError, match="backbone resnet18: a mask cannot be folded.*off by"):
        fold_mask(backbone, torch.rand(512) + 0.1, "resnet18")
    after = backbone.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_resnet_whose_activation_commutes_with_the_mask_is_folded():
    torch.manual_seed(0)
    backbone = timm.create_model("resnet18", num_classes=0, act_layer=nn.LeakyReLU).eval().double()
    images, mask = make_images("resnet18").double(), torch.rand(512, dtype=torch.float64) + 0.1
    expected = features_of(backbone, images) * mask
    fold_mask(backbone, mask, "resnet18")
    error = features_of(backbone, images) - expected
    assert error.abs().max() <= 1e-9 * expected.abs().max()
    with pytest.raises(UserError, match="off by"):  # nothing under it can be closed
        fold_mask(backbone, torch.zeros(512), "resnet18")


def test_a_fold_can_be_tried_on_images_of_ones_own():
    backbone = timm.create_model("resnet18", num_classes=0, in_chans=1).eval()
    assert fold_mask(backbone, torch.rand(512) + 0.1, "resnet18") == 0
    assert fold_mask(backbone, torch.rand(512) + 0.1, "resnet18", torch.randn(1, 1, 32, 32)) == 0
    with pytest.raises(UserError, match=r"images of shape \(1, 3, 32, 32\).*images="):
        fold_mask(backbone, torch.rand(512), "resnet18", torch.randn(1, 3, 32, 32))


def test_an_unknown_backbone_is_refused():
    with pytest.raises(UserError, match="backbone alexnet"):
        fold_mask(nn.Identity(), torch.ones(3), "alexnet")


def test_a_backbone_under_the_name_of_another_is_refused():
    for other in ("regnetx_002", "resnetv2_50"):
        backbone = timm.create_model(other, num_classes=0)
        with pytest.raises(UserError, match="backbone resnet18: a mask cannot be folded.*blocks"):
            fold_mask(backbone, torch.ones(backbone.num_features), "resnet18")
    with pytest.raises(UserError, match="mask of type list"):
        fold_mask(backbone, [1.0], "resnet18")


def test_a_mask_of_ones_changes_no_bit():
    for name in ("resnet18", "vit_tiny"):
        backbone = make_backbone(name)
        dims = features_of(backbone, make_images(name)).shape[1]
        folded = copy.deepcopy(backbone)
        assert fold_mask(folded, torch.ones(dims), name) == 0
        after = folded.state_dict()
        assert all(torch.equal(value, after[key]) for key, value in backbone.state_dict().items())


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_zero_entries_are_exactly_zero_and_lose_nothing_elsewhere(name):
    torch.manual_seed(2)
    backbone = make_backbone(name).double()
    images = make_images(name).double()
    features = features_of(backbone, images)
    mask = torch.zeros(features.shape[1])
    mask[::7] = 1.0
    floored = fold_mask(backbone, mask, name)
    assert floored == int((mask == 0).sum())
    folded = features_of(backbone, images)
    assert (folded[:, mask == 0] == 0).all()
    assert torch.allclose(folded[:, ::7], features[:, ::7], rtol=1e-12, atol=0)


def test_training_mode_has_the_masked_features_as_well():
    torch.manual_seed(3)
    backbone = make_backbone("resnet50").double()
    images = make_images("resnet50", count=4).double()
    mask = make_mask(2048, signed=False)
    folded = copy.deepcopy(backbone)
    fold_mask(folded, mask, "resnet50")
    expected = features_of(backbone.train(), images) * mask
    assert (features_of(folded.train(), images) - expected).abs().max() <= 1e-9 * expected.max()


def test_flushing_subnormal_numbers_to_zero_does_no_harm():
    torch.manual_seed(4)
    backbone = make_backbone("resnet18")
    images = make_images("resnet18")
    mask = make_mask(512, signed=False)
    expected = features_of(backbone, images) * mask.float()
    supported = torch.set_flush_denormal(True)
    try:
        fold_mask(backbone, mask, "resnet18")
        error = features_of(backbone, images) - expected
    finally:
        torch.set_flush_denormal(False)
    assert supported
    assert error.abs().max() <= 1e-4 * expected.max()


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)], ids=["bfloat16", "float16"]
)
def test_a_folded_resnet_runs_in_half_precision(dtype, bound):
    torch.manual_seed(5)
    backbone = make_backbone("resnet18")
    images = make_images("resnet18")
    mask = torch.sigmoid(2 * torch.randn(512))
    mask[:2] = torch.tensor([0.0, 1e-3])
    expected = features_of(backbone, images) * mask
    fold_mask(backbone, mask, "resnet18")
    error = features_of(backbone.to(dtype), images.to(dtype)).float() - expected
    assert error.abs().max() <= bound * expected.max()


def test_weights_in_float16_have_a_floor_of_their_own():
    torch.manual_seed(6)
    backbone = make_backbone("resnet18").half()
    images = make_images("resnet18").half()
    mask = torch.ones(512)
    mask[:3] = torch.tensor([1e-8, 2.0**-11, 2.0**-10])
    expected = features_of(backbone, images).float() * mask
    assert fold_mask(backbone, mask, "resnet18") == 2
    error = features_of(backbone, images).float() - expected
    assert error.abs().max() <= 0.01 * expected.max()


# ---- checkpoints


class Run(NamedTuple):
    path: Path
    images: Tensor
    masked: Tensor  # the masked features of the images


def write_run(folder: Path, name: str, dataset: str = "imagenet100", kind: str = "sigmoid") -> Run:
    """The least that can be folded: weights of a backbone, mask logits and args.json."""
    config = make_config(name, dataset)
    backbone = build_backbone(config).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(-0.5, 1.5)
    images = make_images(name, dataset)
    features = features_of(backbone, images)
    logits = torch.randn(features.shape[1])
    logits[0] = -200.0  # as a sigmoid mask, 0 in float32
    folder.mkdir()
    args = OmegaConf.to_container(config) | {"method_kwargs": {"mask": {"kind": kind}}}
    (folder / "args.json").write_text(json.dumps(args))
    weights = {BACKBONE_PREFIX + key: value for key, value in backbone.state_dict().items()}
    path = folder / "run-ep=1.ckpt"
    raw = {
        "state_dict": {**weights, "mask.logits": logits},
        "epoch": 1,
        "metamask": {"kind": kind},
    }
    torch.save(raw, path)
    return Run(path, images, features * mask_from_logits(logits, kind))


def backbone_part(state: dict[str, Tensor]) -> dict[str, Tensor]:
    start = len(BACKBONE_PREFIX)
    return {key[start:]: v for key, v in state.items() if key.startswith(BACKBONE_PREFIX)}


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert expected.abs().max() > 0
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


FULL_CONFIG: dict[str, Any] = {
    "name": "tiny",
    "method": "metamask",
    "backbone": {"name": "resnet18", "kwargs": {}},
    "method_kwargs": {
        "proj_hidden_dim": 16,
        "proj_output_dim": 16,
        "contrastive_hidden_dim": 16,
        "contrastive_output_dim": 8,
        "mask": {"kind": "sigmoid", "initial_logit": 0.5},
        "meta": {"enabled": True},
    },
    "data": {"dataset": "cifar10", "num_classes": 10, "num_large_crops": 2, "num_small_crops": 0},
    "max_epochs": 2,
    "devices": [0],
    "num_nodes": 1,
    "accumulate_grad_batches": 1,
    "optimizer": {
        "name": "sgd",
        "batch_size": 4,
        "lr": 0.01,
        "weight_decay": 5e-4,
        "classifier_lr": 0.01,
        "kwargs": {"momentum": 0.9},
    },
    "scheduler": {"name": "none"},
    "performance": {"disable_channel_last": True},
}


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pl.LightningModule]:
    """A checkpoint as Lightning writes it, and the method it came from."""
    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp("run")
    model = build_method(OmegaConf.create(FULL_CONFIG))
    with torch.no_grad():
        model.mask.logits.normal_(std=2.0)
        model.mask.logits[7] = -200.0
    train(model.backbone, "resnet18", "cifar10")
    history = [(0, torch.full((512,), 0.5)), (12, model.mask.mask().clone())]
    model.mask_optimizer.history = history
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(model)
    model.trainer = trainer
    path = folder / "tiny-ep=1.ckpt"
    trainer.save_checkpoint(path)
    (folder / "args.json").write_text(json.dumps(FULL_CONFIG))
    return path, model.eval()


def load_as_the_host_does(path: Path) -> pl.LightningModule:
    """As main_knn.py and main_umap.py of GitHub main load a method."""
    config = OmegaConf.create(json.loads((path.parent / "args.json").read_text()))
    if RELEASE == "main":
        method = METHODS[config.method]
        return method.load_from_checkpoint(path, strict=False, cfg=config).eval()
    model = build_method(config)  # 1.0.2 has no such script; its methods take keyword arguments
    model.load_state_dict(torch.load(path, weights_only=True)["state_dict"], strict=True)
    return model.eval()


def test_a_folded_checkpoint_serves_the_hosts_tools(full_run, tmp_path):
    path, before = full_run
    folded = fold_checkpoint(path.parent, tmp_path / "folded")
    assert folded == (tmp_path / "folded" / "folded.ckpt", 512, 1)
    assert sorted(file.name for file in folded.path.parent.iterdir()) == [
        "args.json",
        "folded.ckpt",
    ]
    images = make_images("resnet18", "cifar10", count=4)
    with torch.no_grad():
        expected = before(images)
        actual = load_as_the_host_does(folded.path)(images)
    for key in ("feats", "z", "logits"):
        assert_close(actual[key], expected[key])

    # as main_linear.py loads it: the backbone's keys alone, unknown ones dropped without a word
    state = backbone_part(torch.load(folded.path, map_location="cpu")["state_dict"])
    backbone = build_backbone(OmegaConf.create(FULL_CONFIG)).eval()
    assert backbone.load_state_dict(state, strict=False) == ([], [])
    assert_close(features_of(backbone, images), expected["feats"])


def test_a_folded_checkpoint_keeps_the_history_and_drops_what_resumes(full_run, tmp_path):
    path, before = full_run
    source = torch.load(path, weights_only=True)
    folded = torch.load(fold_checkpoint(path, tmp_path / "out").path, weights_only=True)
    assert folded["metamask"]["folded"] is True
    assert folded["metamask"]["kind"] == "linear"
    assert torch.equal(folded["metamask"]["history"]["step"], torch.tensor([0, 12]))
    assert torch.equal(folded["metamask"]["history"]["mask"][1], before.mask.mask())
    assert (folded["state_dict"]["mask.logits"] == 1).all()
    assert folded["pytorch-lightning_version"] == source["pytorch-lightning_version"]
    assert not {"optimizer_states", "lr_schedulers", "loops"} & folded.keys()
    untouched = [k for k in source["state_dict"] if not k.startswith((BACKBONE_PREFIX, "mask."))]
    assert untouched
    for key in untouched:
        assert torch.equal(folded["state_dict"][key], source["state_dict"][key])
    args = json.loads((tmp_path / "out" / "args.json").read_text())
    assert args["method_kwargs"]["mask"] == {"kind": "linear", "initial_logit": None}
    assert args["method_kwargs"]["meta"] == {"enabled": False}
    assert args["method_kwargs"]["proj_hidden_dim"] == 16
    assert args["data"] == FULL_CONFIG["data"]


def test_a_folded_checkpoint_is_not_folded_again(tmp_path):
    path = write_run(tmp_path / "run", "vit_tiny").path
    folded = fold_checkpoint(path, tmp_path / "out")
    with pytest.raises(UserError, match=r"folded\.ckpt: its mask is folded already"):
        fold_checkpoint(folded.path, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def plain_features_of(path: Path, config: DictConfig, images: Tensor) -> Tensor:
    backbone = build_backbone(config).eval().to(images.dtype)
    backbone.load_state_dict(backbone_part(torch.load(path, weights_only=True)["state_dict"]))
    return features_of(backbone, images)


def test_a_linear_mask_folds_with_its_signs(tmp_path):
    run = write_run(tmp_path / "run", "vit_tiny", kind="linear")
    folded = fold_checkpoint(run.path, tmp_path / "out" / "mine.ckpt")
    assert folded.path == tmp_path / "out" / "mine.ckpt"
    assert_close(plain_features_of(folded.path, make_config("vit_tiny"), run.images), run.masked)


def test_a_checkpoint_in_double_precision_stays_one(tmp_path):
    run = write_run(tmp_path / "run", "resnet18")
    config = make_config("resnet18")
    raw = torch.load(run.path, weights_only=True)
    raw["state_dict"] = {
        key: value.double() if value.is_floating_point() else value
        for key, value in raw["state_dict"].items()
    }
    raw["state_dict"][f"{BACKBONE_PREFIX}layer4.1.bn2.weight"] += 1e-12  # lost in float32
    torch.save(raw, run.path)
    images = run.images.double()
    mask = torch.sigmoid(raw["state_dict"]["mask.logits"])
    expected = plain_features_of(run.path, config, images) * mask
    folded = plain_features_of(fold_checkpoint(run.path, tmp_path / "out").path, config, images)
    assert (folded - expected).abs().max() <= 1e-13 * expected.abs().max()


@pytest.mark.parametrize("prefix", ["backbone.", "encoder."])
def test_checkpoints_of_the_other_release_fold_into_the_form_of_this_one(tmp_path, prefix):
    run = write_run(tmp_path / "run", "vit_tiny")
    raw = torch.load(run.path, weights_only=True)
    state = raw["state_dict"]
    raw["state_dict"] = {prefix + key: value for key, value in backbone_part(state).items()}
    raw["state_dict"]["mask.logits"] = state["mask.logits"]
    torch.save(raw, run.path)
    folded = fold_checkpoint(run.path, tmp_path / "out").path
    names = torch.load(folded, weights_only=True)["state_dict"].keys()
    assert names == state.keys() | {"mask._extra_state"}
    assert_close(plain_features_of(folded, make_config("vit_tiny"), run.images), run.masked)


def test_a_checkpoint_without_mask_is_refused(tmp_path):
    path = write_run(tmp_path / "run", "vit_tiny").path
    raw = torch.load(path, weights_only=True)
    del raw["state_dict"]["mask.logits"]
    torch.save(raw, path)
    with pytest.raises(UserError, match="no mask to fold"):
        fold_checkpoint(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_its_config_is_refused(tmp_path):
    path = write_run(tmp_path / "run", "vit_tiny").path
    (path.parent / "args.json").unlink()
    with pytest.raises(UserError, match=r"args\.json"):
        fold_checkpoint(path, tmp_path / "out")


@pytest.mark.parametrize("form", ["host", "timm"])
def test_existing_files_are_overwritten_only_by_force(tmp_path, form):
    path = write_run(tmp_path / "run", "vit_tiny").path
    out = tmp_path / "out" / "model.ckpt"
    fold_checkpoint(path, out, form)
    before = out.stat().st_mtime_ns
    with pytest.raises(UserError, match="exists already; --force"):
        fold_checkpoint(path, out, form)
    assert out.stat().st_mtime_ns == before
    fold_checkpoint(path, out, form, force=True)
    assert out.stat().st_mtime_ns > before


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize(
    ("out", "form", "reason"),
    [
        ("run", "host", "in the folder of"),
        ("run/run-ep=1.ckpt", "host", "in the folder of"),
        ("run/other.ckpt", "host", "in the folder of"),
        ("link", "host", "in the folder of"),
        ("run/run-ep=1.ckpt", "timm", "is what to fold"),
        ("link/run-ep=1.ckpt", "timm", "is what to fold"),
        ("run/args.json", "timm", "is what to fold"),
        ("run", "timm", "is a folder"),
        ("other", "host", "one .ckpt a folder"),
    ],
)
def test_force_never_overwrites_the_input_or_another_run(tmp_path, out, form, reason):
    path = write_run(tmp_path / "run", "vit_tiny").path
    (tmp_path / "link").symlink_to(tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.ckpt").write_bytes(b"precious")
    before = contents(path.parent), contents(tmp_path / "other")
    with pytest.raises(UserError, match=reason):
        fold_checkpoint(path, tmp_path / out, form, force=True)
    assert (contents(path.parent), contents(tmp_path / "other")) == before


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    path = write_run(tmp_path / "run", "vit_tiny").path
    out = fold_checkpoint(path, tmp_path / "out").path
    before = out.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UserError, match="No space left on device"):
        fold_checkpoint(path, out, force=True)
    assert out.read_bytes() == before
    assert sorted(contents(out.parent)) == ["args.json", "folded.ckpt"]
    with pytest.raises(UserError, match="No space left on device"):
        fold_checkpoint(path, tmp_path / "new")
    assert contents(tmp_path / "new") == {}


def test_an_unknown_form_is_refused(tmp_path):
    with pytest.raises(UserError, match="form=onnx"):
        fold_checkpoint(tmp_path, tmp_path / "out", form="onnx")


# ---- bare state dicts for the libraries' own models


def torchvision_model(name: str, dataset: str) -> nn.Module:
    model = getattr(torchvision.models, name)()
    model.fc = nn.Identity()
    if dataset == "cifar10":
        model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=2, bias=False)
        model.maxpool = nn.Identity()
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dataset"),
    [("resnet18", "imagenet100"), ("resnet18", "cifar10"), ("resnet50", "imagenet100")],
)
def test_torchvision_loads_its_state_dict(tmp_path, name, dataset):
    run = write_run(tmp_path / "run", name, dataset)
    out = fold_checkpoint(run.path, tmp_path / "model.pth", "torchvision").path
    model = torchvision_model(name, dataset).eval()
    model.load_state_dict(torch.load(out, weights_only=True), strict=True)
    assert_close(features_of(model, run.images), run.masked)


# by module: GitHub main of solo-learn registers its own models under some of timm's names
TIMM_MODELS = {
    "resnet18": (timm.models.resnet.resnet18, {}),
    "vit_tiny": (timm.models.vision_transformer.vit_tiny_patch16_224, {"img_size": 32}),
    "swin_tiny": (
        timm.models.swin_transformer.swin_tiny_patch4_window7_224,
        {"img_size": 64, "window_size": 2},
    ),
    "convnext_tiny": (timm.models.convnext.convnext_tiny, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TIMM_MODELS if name in backbone_names()])
def test_timm_loads_its_state_dict(tmp_path, name):
    run = write_run(tmp_path / "run", name)
    out = fold_checkpoint(run.path, tmp_path / "model.pth", "timm").path
    constructor, kwargs = TIMM_MODELS[name]
    model = constructor(num_classes=0, **kwargs).eval()
    model.load_state_dict(torch.load(out, weights_only=True), strict=True)
    assert_close(features_of(model, run.images), run.masked)


MISSING_FORMS = [
    ("vit_tiny", "torchvision", "vit_tiny is not torchvision's"),
    ("poolformer_s12", "timm", "normalises after pooling"),
    ("wide_resnet28w2", "timm", "no such model"),
    ("wide_resnet28w2", "torchvision", "wide_resnet28w2 is not torchvision's"),
]


@pytest.mark.parametrize(("name", "form", "reason"), installed(MISSING_FORMS))
def test_forms_that_do_not_exist_are_refused(tmp_path, name, form, reason):
    path = write_run(tmp_path / "run", name).path
    with pytest.raises(UserError, match=reason):
        fold_checkpoint(path, tmp_path / "model.pth", form)
    assert not (tmp_path / "model.pth").exists()
