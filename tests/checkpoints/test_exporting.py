"""Folders that timm opens by itself, in a process that knows nothing of solo-learn."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints_of_runs import write_run

from metamask_solo.checkpoints.folding import fold_checkpoint
from metamask_solo.checkpoints.reading import load_backbone
from metamask_solo.errors import UserError

RUNS = {
    "resnet18": {"backbone__name": "resnet18"},
    "resnet18_3x3": {"backbone__stem": "3x3"},
    "vit_tiny_patch16_224": {"backbone__name": "vit_tiny", "backbone__kwargs": {"img_size": 32}},
}
OPEN = """
import sys, timm, torch
if "resnet18_3x3" in sys.argv: import metamask_solo.checkpoints.timm_stems
x, features = torch.load(sys.argv[1]), {}
for folder in sys.argv[2:]:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    data = timm.data.resolve_model_data_config(model)
    features[folder] = (model(x).detach(), data["input_size"], list(data["mean"]))
assert "solo" not in sys.modules
torch.save(features, "features.pt")
"""


@pytest.mark.slow
def test_timm_opens_the_folders(images: Path, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 32, 32)
    torch.save(x, tmp_path / "x.pt")
    expected = {}
    for name, changes in RUNS.items():
        run = write_run(tmp_path / "runs" / name, images, **changes)
        made = fold_checkpoint(run, tmp_path / name, "timm")
        assert made.path == tmp_path / name
        assert sorted(p.name for p in made.path.iterdir()) == ["config.json", "model.safetensors"]
        assert json.loads((made.path / "config.json").read_text())["architecture"] == name
        backbone, _ = load_backbone(run)
        expected[name] = backbone(x).detach()

    command = [sys.executable, "-c", OPEN, "x.pt", *RUNS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, (features, size, mean) in torch.load(tmp_path / "features.pt").items():
        torch.testing.assert_close(features, expected[name], rtol=1e-3, atol=1e-4)
        assert tuple(size) == (3, 32, 32)
        assert mean == pytest.approx([0.485, 0.456, 0.406])


@pytest.mark.slow
def test_an_export_is_overwritten_by_force_and_nothing_else_is(
    images: Path, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run", images)
    fold_checkpoint(run, tmp_path / "out", "timm")
    with pytest.raises(UserError, match="exists already; --force"):
        fold_checkpoint(run, tmp_path / "out", "timm")
    fold_checkpoint(run, tmp_path / "out", "timm", force=True)
    with pytest.raises(UserError, match="is a folder that holds args.json"):
        fold_checkpoint(run, run.parent, "timm", force=True)
