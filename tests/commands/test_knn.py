"""The command ``metamask-solo knn``, and the way to features that it shares with others."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints_of_runs import write_run
from omegaconf import OmegaConf
from torchvision.datasets import ImageFolder

from metamask_solo.checkpoints.folding import fold_checkpoint
from metamask_solo.checkpoints.reading import load_backbone
from metamask_solo.commands import knn
from metamask_solo.commands.options import feature_reader
from metamask_solo.data.datasets import write_fingerprints
from metamask_solo.data.loaders import pretrain_dataset
from metamask_solo.errors import UserError
from metamask_solo.evaluation.features import percent
from metamask_solo.evaluation.knn import knn_hits
from metamask_solo.evaluation.linear import linear_probe
from metamask_solo.hosts import build_method


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, images: Path) -> dict[str, Path]:
    """Checkpoints of MetaMask, of the same folded, and of SimCLR."""
    root = tmp_path_factory.mktemp("runs")
    paths = {name: write_run(root / name, images, name) for name in ("metamask", "simclr")}
    paths["folded"] = fold_checkpoint(paths["metamask"], root / "folded").path
    return paths


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
        ("metamask", [], "masked"),
        ("metamask", ["--plain"], "plain"),
        ("folded", [], "folded"),
        ("simclr", ["--features", "projector"], "projector"),
        ("metamask", ["--features", "projector", "--masked"], "projector"),
    ],
)
def test_the_features_that_are_asked_for_are_read(
    runs: dict[str, Path], images: Path, run: str, options: list[str], features: str
) -> None:
    arguments = knn._parse([str(runs[run]), *options, "--num-workers", "0"])
    reader = feature_reader(arguments)
    train, _ = reader.extract(reader.loaders()[0])

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
    assert reader.kind.split()[0] == (
        "plain" if run == "simclr" or "--plain" in options else "masked"
    )


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
    assert "always naming the largest class" in err and "33.33 %" in err


def test_images_that_the_run_was_trained_on_are_counted(
    runs: dict[str, Path], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs["simclr"].parent, tmp_path / "run")
    config = OmegaConf.create(json.loads((tmp_path / "run/args.json").read_text()))
    write_fingerprints(pretrain_dataset(config), tmp_path / "run")
    shutil.copytree(images, tmp_path / "data")
    for label in range(3):
        old = images / f"train/class_{label}/0.png"
        shutil.copy(old, tmp_path / f"data/val/class_{label}/1.png")
    rows_of(tmp_path, tmp_path / "run", "--data", str(tmp_path / "data"))
    assert "3 of 10 images to evaluate on were training images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("run", "options", "message"),
    [
        ("simclr", ["--masked"], "holds no mask"),
        ("folded", ["--plain"], "folded into the backbone"),
        ("metamask", ["--plain", "--features", "projector"], "masked features only"),
        ("simclr", ["--k", "5", "21"], "only 20 training images"),
        ("simclr", ["--k", "0"], "--k=0"),
        ("simclr", ["--temperature", "0"], "--temperature=0"),
        ("simclr", ["--num-workers", "-1"], "--num-workers=-1"),
        ("simclr", ["--data", "gone"], "gone"),
    ],
)
def test_what_cannot_be_done_is_said(
    runs: dict[str, Path], tmp_path: Path, run: str, options: list[str], message: str
) -> None:
    file = tmp_path / "result.json"
    with pytest.raises(UserError, match=message) as caught:
        knn.main([str(runs[run]), *options, "--json", str(file)])
    assert "\n" not in str(caught.value)
    assert not file.exists()
