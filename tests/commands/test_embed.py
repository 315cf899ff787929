"""The command ``metamask-solo embed``, and the features that it and others read."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from checkpoints_of_runs import read_by_torchvision
from omegaconf import OmegaConf

from metamask_solo.__main__ import main
from metamask_solo.checkpoints.reading import load_backbone
from metamask_solo.hosts import build_method


def command(run: Path, out: Path, *options: str) -> list[str]:
    small = ["--num-workers=0", "--batch-size=3"]
    return ["embed", str(run), f"--out={out}", *small, *options]


@pytest.mark.parametrize(
    ("run", "options", "kind"),
    [
        ("metamask", "", "masked backbone"),
        ("metamask", "--plain", "plain backbone"),
        ("folded", "", "masked backbone"),
        ("simclr", "--features projector", "plain projector"),
        ("metamask", "--features projector --masked", "masked projector"),
    ],
)
def test_the_features_that_are_asked_for_with_names_and_labels(
    run: str,
    options: str,
    kind: str,
    runs: dict[str, Path],
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, out = tmp_path / "data", tmp_path / "out" / "features.npy"
    for number, name in enumerate(("007", "NA")):  # which pandas would read as 7 and as nothing
        shutil.copytree(images / f"train/class_{number}", data / "train" / name)
    out.parent.mkdir()
    out.with_suffix(".csv").write_text("mine")
    force = [f"--data={data}", "--split=train", "--force"]
    assert main(command(runs[run], out, *force, *options.split())) == 0
    printed = capsys.readouterr().out
    assert f"{kind} features of 8 train images" in printed
    read: dict[str, Any] = {"numpy": np, "pandas": pd}
    exec(printed.splitlines()[-1].removeprefix("next: "), read)

    tensors, labels = read_by_torchvision(data / "train")
    if "projector" in kind:
        config = OmegaConf.create(json.loads((runs[run].parent / "args.json").read_text()))
        method = build_method(config).eval()
        method.load_state_dict(torch.load(runs[run], weights_only=True)["state_dict"])
        expected = method(tensors)["z"].detach()
    else:
        backbone, _ = load_backbone(runs["metamask"], masked=kind.startswith("masked"))
        expected = backbone(tensors).detach()
    np.testing.assert_allclose(read["features"], expected, rtol=1e-4, atol=1e-4)
    assert read["names"].columns.tolist() == ["file", "label", "class"]
    files = [data / "train" / name / f"{i}.png" for name in ("007", "NA") for i in range(4)]
    assert read["names"]["file"].tolist() == [str(file) for file in files]
    assert read["names"]["label"].tolist() == labels.tolist()
    assert read["names"]["class"].tolist() == 4 * ["007"] + 4 * ["NA"]
    assert sorted(path.name for path in out.parent.iterdir()) == ["features.csv", "features.npy"]


def test_images_without_labels_at_any_depth_and_with_odd_names(
    runs: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    names = ["a" * 240 + ".png", 'b/with "quotes", commas\nand lines.png', "c/d/é\udcff.png"]
    for name in names:
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(images / "train/class_0/0.png", photos / name)
    assert main(command(runs["metamask"], tmp_path / "f.npy", f"--data={photos}")) == 0
    table = pd.read_csv(tmp_path / "f.csv", encoding_errors="surrogateescape")
    assert table.columns.tolist() == ["file"]
    assert sorted(table["file"]) == sorted(str(photos / name) for name in names)
    # without --data, the validation images of the run
    assert main(command(runs["metamask"], tmp_path / "own.npy")) == 0
    assert np.load(tmp_path / "own.npy").shape == (10, 512)


def test_features_that_are_not_finite_leave_nothing(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(runs["metamask"].parent, tmp_path / "run"), "run.ckpt")
    raw = torch.load(run, weights_only=True)
    raw["state_dict"]["mask.logits"][3] = float("nan")
    torch.save(raw, run)
    out = tmp_path / "out/features.npy"
    assert main(command(run, out)) == 2
    assert "not finite" in capsys.readouterr().err
    assert list(out.parent.iterdir()) == []
