"""The command ``metamask-solo knn``, and the way to features that it shares with others."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torchvision.datasets import ImageFolder

from metamask_solo.checkpoints.reading import load_backbone
from metamask_solo.commands import knn
from metamask_solo.evaluation.features import FeatureReader, percent
from metamask_solo.evaluation.knn import knn_hits
from metamask_solo.evaluation.linear import linear_probe
from metamask_solo.hosts import build_method


def rows_of(tmp_path: Path, checkpoint: Path, *options: str) -> dict[str, Any]:
    """Runs the command and returns what it wrote."""
    file = tmp_path / "result.json"
    assert knn.main([str(checkpoint), *options, "--num-workers", "0", "--json", str(file)]) == 0
    return json.loads(file.read_text())


def transform(image: Any) -> torch.Tensor:
    """The evaluation transform of the runs here, written down."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(32, 32, 3)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((pixels / 255 - mean) / std).permute(2, 0, 1)


def expected_features(run: Path, images: Path, masked: bool | None) -> list[torch.Tensor]:
    """Features and labels of both splits by load_backbone and torchvision."""
    backbone, _ = load_backbone(run, masked)
    tensors = []
    for split in ("train", "val"):
        data = ImageFolder(str(images / split), transform)
        with torch.no_grad():
            tensors.append(backbone(torch.stack([image for image, _ in data])))
        tensors.append(torch.tensor(data.targets))
    return tensors


def test_a_row_for_each_combination(
    runs: dict[str, Path], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = "--k 1 5 --temperature 0.07 0.2 --distance cosine euclidean --linear"

    result = rows_of(tmp_path, runs["simclr"].parent, *grid.split())

    settings = [(row["distance"], row.get("temperature"), row.get("k")) for row in result["rows"]]
    assert settings == [
        (distance, temperature, k)
        for distance, temperature in (("cosine", 0.07), ("cosine", 0.2), ("euclidean", None))
        for k in (1, 5)
    ] + [("linear", None, None)]
    features: Any = expected_features(runs["simclr"], images, None)
    for (distance, temperature, k), row in zip(settings[:-1], result["rows"], strict=False):
        hits = knn_hits(*features, k, distance, temperature)
        assert [row["top1"], row["top5"]] == [percent(correct) for correct in hits]
    correct, c = linear_probe(*features)
    assert (result["rows"][-1]["top1"], result["rows"][-1]["C"]) == (percent(correct), c)
    head, titles, *lines = capsys.readouterr().out.splitlines()
    assert "plain backbone features, 20 training and 10 validation images" in head
    assert titles.split() == ["distance", "temperature", "k", "C", "top1", "top5"]
    assert len({len(line) for line in (titles, *lines)}) == 1
    assert lines[4].split()[:3] == ["euclidean", "-", "1"]


@pytest.mark.parametrize(
    ("run", "options", "features"),
    [
        ("metamask", "", "masked"),
        ("metamask", "--plain", "plain"),
        ("folded", "", "folded"),
        ("simclr", "--features projector", "projector"),
        ("metamask", "--features projector --masked", "projector"),
    ],
)
def test_the_features_that_are_asked_for_are_read(
    runs: dict[str, Path],
    images: Path,
    run: str,
    options: str,
    features: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    read: list[torch.Tensor] = []
    extract = FeatureReader.extract

    def record(self: FeatureReader, loader: Any) -> tuple[torch.Tensor, torch.Tensor]:
        read.extend(extract(self, loader))
        return read[-2], read[-1]

    monkeypatch.setattr(FeatureReader, "extract", record)
    masked = rows_of(tmp_path, runs[run], *options.split())["masked"]
    train = read[0]

    if features == "projector":
        config = OmegaConf.create(json.loads((runs[run].parent / "args.json").read_text()))
        method = build_method(config).eval()
        method.load_state_dict(torch.load(runs[run], weights_only=True)["state_dict"])
        data = ImageFolder(str(images / "train"), transform)
        expected = method(torch.stack([image for image, _ in data]))["z"].detach()
    else:
        original = runs["metamask" if run == "folded" else run]
        expected = expected_features(original, images, features != "plain")[0]
    torch.testing.assert_close(train, expected, rtol=1e-4, atol=1e-4)
    assert masked == (run != "simclr" and options != "--plain")
    assert f": {'masked' if masked else 'plain'} " in capsys.readouterr().out


def test_unequal_classes_get_the_mean_over_classes(
    runs: dict[str, Path], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(images, tmp_path / "data")
    for label in range(1, 5):
        (tmp_path / f"data/val/class_{label}/1.png").unlink()
        for i in range(2, 4):
            (tmp_path / f"data/train/class_{label}/{i}.png").unlink()
    result = rows_of(tmp_path, runs["simclr"], "--data", str(tmp_path / "data"), "--k", "12")
    out, err = capsys.readouterr()
    row, line = result["rows"][0], out.splitlines()[-1].split()
    assert (result["train_images"], result["val_images"]) == (12, 6)
    assert "mean_over_classes" in out.splitlines()[1]
    assert float(line[-1]) == pytest.approx(row["mean_over_classes"], abs=0.01)
    assert row["top1"] == pytest.approx(100 / 3) and row["mean_over_classes"] == 20
    assert "always guessing the largest class" in err and "33.33 %" in err
