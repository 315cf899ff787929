"""The command ``metamask-solo analyze``, on checkpoints of untrained runs and small images."""

import html
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints_of_runs import read_by_torchvision, write_run

from metamask_solo.__main__ import main
from metamask_solo.analysis import figures
from metamask_solo.checkpoints.reading import load_backbone, read_checkpoint
from metamask_solo.evaluation.features import rankme


@pytest.fixture
def data(images: Path, tmp_path: Path) -> Path:
    """Class folders whose table says which of two photographs is behind each object."""
    root = Path(shutil.copytree(images, tmp_path / "data"))
    files = [file.relative_to(root).as_posix() for file in sorted(root.rglob("*.png"))]
    rows = [f"{file},{number % 2}.jpg" for number, file in enumerate(files)]
    (root / "metadata.csv").write_text("\n".join(["file,photograph", *rows]))
    return root


@pytest.fixture
def run(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs the command quickly and returns analysis.json."""
    monkeypatch.setitem(figures.STYLE, "savefig.dpi", 40)

    def run(
        *checkpoints: Path, data: Path | None = data, whole: bool = False, code: int = 0
    ) -> Any:
        if not whole:  # the figures take most of the time
            monkeypatch.setattr(figures, "FIGURES", {})
        argv = [f"--out={tmp_path / 'out'}", "--draws=2", "--num-workers=0"]
        argv += [] if data is None else [f"--data={data}"]
        assert main(["analyze", *map(str, checkpoints), *argv]) == code
        return json.loads((tmp_path / "out" / "analysis.json").read_text())

    return run


@pytest.mark.slow
def test_two_methods_side_by_side(run, runs, data, tmp_path, capsys):
    # of training, such as a copied image, and a file that is no image
    shutil.copy(data / "train/class_0/0.png", data / "val/class_0/0.png")
    (data / "train/class_0/notes.heic").write_text("")
    of = run(runs["metamask"], runs["simclr"].parent, whole=True)
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'report.html'}: 2 checkpoints\n"
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == set(figures.FIGURES)
    assert of["images"] == {"train": 20, "val": 10}
    assert (of["data"], of["classes"], of["photographs"]) == (str(data), 5, True)
    page = html.unescape((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    for doubt in (".heic 1", "1 of 10 validation images are copies"):
        assert any(doubt in note and note in page for note in of["doubts"]), of["doubts"]
    first, second = of["checkpoints"]
    assert (first["name"], second["name"]) == ("1: metamask-test", "2: simclr-test")
    assert (second["path"], second["mask"], first["dims"]) == (str(runs["simclr"]), None, 512)
    np.testing.assert_allclose(first["mask"], read_checkpoint(runs["metamask"]).mask, rtol=1e-6)
    assert list(first["information"]) == ["class", "photograph", "deviation"]
    accuracy = first["accuracy"]["knn"]
    assert f"kNN {accuracy['masked']:.1%} and {accuracy['plain']:.1%}" in page


def test_images_without_labels_have_their_redundancy_measured(runs, images, tmp_path, run):
    own = run(runs["metamask"], data=None)
    assert own["images"] == {"train": 20, "val": 10} and own["classes"] == 5
    backbone, checkpoint = load_backbone(runs["metamask"], masked=False)
    features = backbone(read_by_torchvision(images / "train")[0]).detach()
    expected = {"plain": rankme(features), "masked": rankme(features * checkpoint.mask)}
    for kind in ("split", "folders of any depth"):
        for number, file in enumerate(sorted((images / "train").rglob("*.png"))):
            below = "train" if kind == "split" else f"{number % 2}/{number % 3}"
            folder = tmp_path / kind / below
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number:02}.png").write_bytes(file.read_bytes())
        of = run(runs["metamask"], data=tmp_path / kind)
        numbers = of["checkpoints"][0]
        assert numbers["accuracy"] is numbers["subsets"] is numbers["bounds"] is None
        for one in (own["checkpoints"][0], numbers):
            measured = {version: of["rankme"] for version, of in one["redundancy"].items()}
            assert measured == pytest.approx(expected, rel=1e-3)
        assert of["classes"] is None and list(numbers["information"]) == ["deviation"]
        page = " ".join((tmp_path / "out" / "report.html").read_text().split())
        assert "Accuracies need labels" in page
        assert f"20 {'training ' if kind == 'split' else ''}images" in page


def test_a_collapsed_and_a_diverged_run_beside_a_good_one(run, data, tmp_path, capsys):
    """On the runs' own images, whose background is known."""
    good = write_run(tmp_path / "good", data)
    for name, factor in (("collapsed", 0.0), ("diverged", float("nan"))):
        shutil.copytree(good.parent, tmp_path / name)
        raw = torch.load(good, weights_only=True)
        for key, value in raw["state_dict"].items():
            if "layer4" in key and "running" not in key and value.is_floating_point():
                value *= factor
        torch.save(raw, tmp_path / name / "run.ckpt")
    of = run(good, tmp_path / "collapsed", tmp_path / "diverged", data=None)
    assert of["photographs"] is True
    one, two, three = of["checkpoints"]
    assert 0 <= one["accuracy"]["knn"]["plain"] <= 1 and one["notes"] == []
    assert "the same" in two["notes"][0]
    assert "not finite" in three["notes"][0]
    assert three["redundancy"] is three["accuracy"] is None
    assert three["mask_statistics"]["max"] == pytest.approx(one["mask_statistics"]["max"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert two["notes"][0] in page and "features not measured" in page
    capsys.readouterr()
    run(tmp_path / "diverged", data=None, code=1)  # nothing to show but the mask
    assert "run.ckpt: its features are not finite" in capsys.readouterr().err
