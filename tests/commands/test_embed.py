"""The command ``metamask-solo embed``, and images without labels in ``umap``."""

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints_of_runs import write_run
from torchvision.datasets import ImageFolder

from metamask_solo.__main__ import main
from metamask_solo.checkpoints.reading import load_backbone
from metamask_solo.data.images import evaluation_transform
from metamask_solo.data.splitting import split_folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "metamask", images)


def embed(run: Path, out: Path, *options: str) -> dict[str, np.ndarray]:
    argv = ["embed", str(run), "--out", str(out), "--num-workers", "0", "--batch-size", "8"]
    assert main([*argv, *options]) == 0
    with np.load(out) as data:
        return dict(data)


def test_features_names_and_labels_belong_together(run: Path, images: Path, tmp_path: Path) -> None:
    data = embed(run, tmp_path / "features.npz", "--data", str(images / "train"))

    backbone, checkpoint = load_backbone(run)
    assert checkpoint.config is not None
    folder = ImageFolder(str(images / "train"), evaluation_transform(checkpoint.config))
    expected = torch.cat([backbone(folder[i][0][None]) for i in range(len(folder))]).detach()
    np.testing.assert_allclose(data["features"], expected.numpy(), rtol=1e-3, atol=1e-4)
    assert data["features"].dtype == np.float32
    assert data["files"].tolist() == [path for path, _ in folder.samples]
    assert data["labels"].tolist() == folder.targets
    assert data["classes"].tolist() == folder.classes
    assert [p.name for p in tmp_path.iterdir()] == ["features.npz"]


def test_images_without_labels(run: Path, images: Path, tmp_path: Path) -> None:
    flat = split_folder(images / "train", tmp_path / "flat", 0.2, flat=True)

    data = embed(run, tmp_path / "features.npz", "--plain", "--data", str(flat.out / "train"))
    assert sorted(data) == ["features", "files"]
    assert len(data["files"]) == len(data["features"]) == 16

    pytest.importorskip("umap")
    options = ["--num-workers", "0", "--split", "train", "--out", str(tmp_path / "umap.png")]
    assert main(["umap", str(run), "--data", str(flat.out), *options]) == 0
    assert (tmp_path / "umap.png").stat().st_size > 5_000


def test_the_runs_own_data_are_the_default(run: Path, tmp_path: Path) -> None:
    assert len(embed(run, tmp_path / "val.npz")["labels"]) == 10
    assert len(embed(run, tmp_path / "train.npz", "--split", "train")["labels"]) == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "features.csv"], "must end in .npz"),
        (["--data", "nowhere"], "nowhere: no such folder"),
        (["--batch-size", "0"], "--batch-size=0"),
    ],
)
def test_what_cannot_be_done_is_said(
    run: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["embed", str(run), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_file_is_overwritten_by_force_only(
    run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "features.npz"
    out.write_text("mine")
    assert main(["embed", str(run), "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["embed", str(run), "--data", str(images), "--out", str(out), "--force"]) == 2
    assert "holds train/ and val/" in capsys.readouterr().err
    assert out.read_text() == "mine"
