"""The command ``metamask-solo embed``."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from metamask_solo.__main__ import main
from metamask_solo.evaluation.features import FeatureReader


@pytest.fixture
def run(runs: dict[str, Path]) -> Path:
    return runs["metamask"]


def embed(run: Path, out: Path, *options: str) -> tuple[np.ndarray, pd.DataFrame]:
    argv = ["embed", str(run), "--out", str(out), "--num-workers", "0", "--batch-size", "8"]
    assert main([*argv, *options]) == 0
    table = pd.read_csv(out.with_suffix(".csv"), encoding_errors="surrogateescape")
    return np.load(out, mmap_mode="r"), table


def test_features_names_and_labels_belong_together(run: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "features.npy"
    out.with_suffix(".csv").write_text("mine")  # overwritten by force
    features, table = embed(run, out, "--data", str(images), "--split", "train", "--force")

    reader = FeatureReader(run, data=images, num_workers=0)
    loader = reader.loader("train")
    expected, labels = reader.extract(loader)
    np.testing.assert_allclose(features, expected.numpy(), rtol=1e-4, atol=1e-4)
    assert features.dtype == np.float32 and isinstance(features, np.memmap)
    assert table["file"].tolist() == loader.dataset.files  # type: ignore[attr-defined]
    assert table["label"].tolist() == labels.tolist()
    assert table["class"].tolist() == [f"class_{label}" for label in labels]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["features.csv", "features.npy"]
    assert len(embed(run, tmp_path / "own.npy")[1]) == 10  # the run's own data, of validation


def test_the_printed_line_reads_the_table(
    run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("007", "NA"):
        shutil.copytree(images / "train/class_0", tmp_path / "data" / name)
    embed(run, tmp_path / "f.npy", "--data", str(tmp_path / "data"))
    read = {"numpy": np, "pandas": pd}
    exec(capsys.readouterr().out.splitlines()[-1].removeprefix("next: "), read)
    assert read["names"]["class"].tolist() == 4 * ["007"] + 4 * ["NA"]  # type: ignore[attr-defined]


def test_images_without_labels_at_any_depth_and_with_odd_names(
    run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [
        "a" * 240 + ".png",
        'b/c/with "quotes", commas\nand lines.png',
        "d/é.png",
        "d/\udcff.png",
    ]
    for name in names:
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(images / "train/class_0/0.png", tmp_path / "photos" / name)
    features, table = embed(run, tmp_path / "f.npy", "--plain", "--data", str(tmp_path / "photos"))
    assert table.columns.tolist() == ["file"]
    assert sorted(table["file"]) == sorted(str(tmp_path / "photos" / name) for name in names)
    assert len(features) == 4
    printed = capsys.readouterr()
    assert f"photos: 1 image, such as {names[0]}, beside folders of images" in printed.err
    assert "f.npy: plain backbone features of 4 images, 512 dimensions" in printed.out
    (tmp_path / "photos/b").rename(tmp_path / "photos/val")
    argv = ["embed", str(run), f"--data={tmp_path / 'photos'}", f"--out={tmp_path / 'g.npy'}"]
    assert main(argv) == 2  # beside d, val may be a class
    assert "names of splits are no classes: val; give --data=" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "photos/d")
    assert len(embed(run, tmp_path / "g.npy", "--data", str(tmp_path / "photos"))[1]) == 1
    printed = capsys.readouterr()
    assert f"photos: 1 image, such as {names[0]}, left out: beside val/" in printed.err
    assert "g.npy: masked backbone features of 1 val image, 512 dimensions" in printed.out


def test_features_that_are_not_finite_leave_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run.parent, tmp_path / "run")
    raw = torch.load(run, weights_only=True)
    raw["state_dict"]["mask.logits"][3] = float("nan")
    torch.save(raw, tmp_path / "run/run.ckpt")
    out = tmp_path / "out/features.npy"
    assert main(["embed", str(tmp_path / "run"), "--out", str(out), "--num-workers", "0"]) == 2
    assert "not finite" in capsys.readouterr().err
    assert list(out.parent.iterdir()) == []
