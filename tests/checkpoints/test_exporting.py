"""Exports: files by their ending, timm's models, and what must not be overwritten."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from checkpoints_of_runs import backbone_config, random_backbone, write_backbone_run
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import nn

from metamask_solo.checkpoints.exporting import fold_checkpoint
from metamask_solo.checkpoints.reading import MaskedBackbone
from metamask_solo.errors import UserError
from metamask_solo.hosts import RELEASE
from metamask_solo.training.linear import ScaledLinear

OPEN = """
import sys, timm, torch
import metamask_solo.checkpoints.timm_stems
expected = torch.load("expected.pt")
for folder, (images, features) in expected.items():
    open = lambda **settings: timm.create_model(f"local-dir:{folder}", pretrained=True, **settings)
    torch.testing.assert_close(open().eval()(images), features, rtol=1e-5, atol=1e-5)
    model = open(num_classes=7)
    torch.nn.functional.cross_entropy(model(images), torch.tensor([0, 6])).backward()
    model = open(num_classes=7).eval()
    read = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(read, features, rtol=1e-5, atol=1e-5)
    assert open(in_chans=1, num_classes=2)(images[:, :1]).shape == (2, 2)
assert "solo" not in sys.modules
"""


@pytest.mark.slow
def test_timm_opens_the_folders_and_fine_tunes_them(tmp_path: Path) -> None:
    """In a process that knows nothing of solo-learn; the large ones are tried by hand."""
    expected = {}
    cases = [(name, "imagenet100", "metamask") for name in ("resnet18", "vit_tiny")]
    cases += [("resnet18", "cifar10", "metamask")]
    if tuple(map(int, timm.__version__.split(".")[:3])) >= (1, 0, 31):
        # an older timm takes one without a classifier for an old form of weights
        cases += [("swin_tiny", "imagenet100", "metamask")]
    if RELEASE == "main":  # where the ViT of mae has another number of heads
        cases += [("convnext_tiny", "imagenet100", "metamask"), ("vit_tiny", "imagenet100", "mae")]
    for name, dataset, method in cases:
        run, images, features = write_backbone_run(
            tmp_path / "runs" / f"{name}-{dataset}-{method}", name, dataset, method=method
        )
        made = fold_checkpoint(run, tmp_path / f"{name}-{dataset}-{method}", "timm")
        assert sorted(p.name for p in made.path.iterdir()) == ["config.json", "model.safetensors"]
        expected[str(made.path)] = images, features
    torch.save(expected, tmp_path / "expected.pt")
    command = [sys.executable, "-c", OPEN]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("mask", [True, False])
def test_the_ending_decides_the_format(mask: bool, tmp_path: Path) -> None:
    run, images, features = write_backbone_run(tmp_path / "run", "resnet18", mask=mask)
    for ending in (".safetensors", ".pth"):
        made = fold_checkpoint(run, tmp_path / f"model{ending}", "timm")
        assert made.dims == (512 if mask else 0)
        safe = ending == ".safetensors"
        state = load_file(made.path) if safe else torch.load(made.path, weights_only=True)
        torchvisions = torchvision.models.resnet18()
        torchvisions.fc = nn.Identity()
        for model in (timm.models.resnet.resnet18(num_classes=0), torchvisions):
            model.load_state_dict(state, strict=True)
            torch.testing.assert_close(model.eval()(images), features, rtol=1e-5, atol=1e-5)


def test_a_fine_tuned_model_keeps_its_classifier_and_the_names_of_its_classes(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    config = backbone_config("resnet18", "custom")
    del config["method"]
    config.pretrain_method = "metamask"
    config.data.class_names = ["cat", "dog"]
    model = nn.Module()
    model.backbone = MaskedBackbone(random_backbone(config), torch.rand(512) + 0.1)
    model.classifier = ScaledLinear(nn.Linear(512, 2), 4.0)  # of scale_features=True
    (tmp_path / "run").mkdir()
    (tmp_path / "run/args.json").write_text(json.dumps(OmegaConf.to_container(config)))
    torch.save({"state_dict": model.state_dict()}, tmp_path / "run/a.ckpt")
    images = torch.randn(2, 3, 64, 64)
    expected = model.classifier(model.backbone.eval()(images))

    made = fold_checkpoint(tmp_path / "run", tmp_path / "out", "timm")
    opened: Any = timm.create_model(f"local-dir:{made.path}", pretrained=True).eval()
    torch.testing.assert_close(opened(images), expected, rtol=1e-5, atol=1e-5)
    assert opened.pretrained_cfg["label_names"] == ["cat", "dog"]
    made = fold_checkpoint(tmp_path / "run", tmp_path / "m.pth", "timm")
    library = torchvision.models.resnet18(num_classes=2).eval()
    library.load_state_dict(torch.load(made.path, weights_only=True), strict=True)
    torch.testing.assert_close(library(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(RELEASE != "main", reason="1.0.2 has only backbones that timm has, too")
@pytest.mark.parametrize(
    ("name", "reason"),
    [("poolformer_s12", "is another model"), ("wide_resnet28w2", "has no model")],
)
def test_models_that_timm_lacks_are_refused(name: str, reason: str, tmp_path: Path) -> None:
    run, *_ = write_backbone_run(tmp_path / "run", name)
    with pytest.raises(UserError, match=reason):
        fold_checkpoint(run, tmp_path / "model.pth", "timm")
    assert not (tmp_path / "model.pth").exists()


REFUSED = [
    ("run", "m.onnx", "timm", "must end in .safetensors, .pt, .pth, .ckpt, or in / for a folder"),
    ("run", "v1.0", "timm", "must end in"),
    ("run", "f.pt", "host", "must end in .ckpt, or in / for a folder"),
    ("run", "m.pth", "onnx", "form=onnx: allowed are host, timm"),
    ("run", "run", "host", "in the folder of"),
    ("run", "run/other.ckpt", "host", "in the folder of"),
    ("run", "link", "host", "in the folder of"),
    ("run", "link/run-ep=1.ckpt", "timm", "is the checkpoint to fold"),
    ("run", "run", "timm", "is a folder that holds args.json"),
    ("run", "other", "host", "a folder is to hold one .ckpt"),
    ("plain", "none", "host", "has no mask to fold"),
]


def test_force_never_overwrites_the_input_or_another_run(tmp_path: Path) -> None:
    write_backbone_run(tmp_path / "run", "vit_tiny")
    write_backbone_run(tmp_path / "plain", "vit_tiny", mask=False)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/precious.ckpt").write_bytes(b"precious")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.*")}
    for run, out, form, reason in REFUSED:
        with pytest.raises(UserError, match=reason):
            fold_checkpoint(tmp_path / run, tmp_path / out, form, force=True)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.*")} == before


def test_existing_files_are_overwritten_only_by_force_and_never_by_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, *_ = write_backbone_run(tmp_path / "run", "vit_tiny")
    for out, form in (("model.ckpt", "timm"), ("v1.0/", "timm"), ("host/mine.ckpt", "host")):
        made = fold_checkpoint(run, f"{tmp_path}/{out}", form)
        assert made.path == tmp_path / out and made.path.is_dir() == out.endswith("/")
        with pytest.raises(UserError, match="exists already; --force"):
            fold_checkpoint(run, f"{tmp_path}/{out}", form)
        assert fold_checkpoint(run, f"{tmp_path}/{out}", form, force=True) == made
    before = {file: file.read_bytes() for file in (tmp_path / "host").iterdir()}

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    for out in ("host/mine.ckpt", "new/"):
        with pytest.raises(UserError, match="No space left on device"):
            fold_checkpoint(run, f"{tmp_path}/{out}", force=True)
    assert {file: file.read_bytes() for file in (tmp_path / "host").iterdir()} == before
    assert not list((tmp_path / "new").iterdir())
