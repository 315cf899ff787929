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
from checkpoints_of_runs import write_run
from PIL import Image

from metamask_solo.__main__ import main
from metamask_solo.analysis import figures
from metamask_solo.checkpoints.reading import read_checkpoint

CLASSES = ("a", "b", "c")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three classes, told by where a bright square is, on backgrounds of two photographs."""
    root, rng = tmp_path / "data", np.random.default_rng(0)
    rows = ["file,photograph"]
    for split, each in (("train", 8), ("val", 4)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for index in range(each):
                photograph = int(rng.integers(2))
                pixels = rng.integers(0, 60, size=(32, 32, 3)) + 80 * photograph
                pixels[4:14, 10 * label : 10 * label + 10] = 255
                file = f"{split}/{name}/{index}.png"
                Image.fromarray(pixels.astype(np.uint8)).save(root / file)
                rows.append(f"{file},{photograph}.jpg")
    (root / "metadata.csv").write_text("\n".join(rows) + "\n")
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


def changed(run: Path, folder: Path, factor: float) -> Path:
    """A run whose last layers are multiplied: by 0, all features are 0; by NaN, none is finite."""
    shutil.copytree(run.parent, folder)
    raw = torch.load(run, weights_only=True)
    for name, value in raw["state_dict"].items():
        if "layer4" in name and "running" not in name and value.is_floating_point():
            value *= factor
    torch.save(raw, folder / "run.ckpt")
    return folder / "run.ckpt"


@pytest.mark.slow
def test_two_methods_side_by_side(run, runs, data, tmp_path, capsys):
    # of training, such as a copied image, and a file that is no image
    (data / "val" / "a" / "0.png").write_bytes((data / "train" / "a" / "0.png").read_bytes())
    (data / "train" / "a" / "notes.heic").write_text("")
    of = run(runs["metamask"], runs["simclr"].parent, whole=True)
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'report.html'}: 2 checkpoints\n"
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == set(figures.FIGURES)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == len(figures.FIGURES) and "http" not in page
    assert of["images"] == {"train": 24, "val": 12}
    assert (of["data"], of["classes"], of["photographs"]) == (str(data), 3, True)
    for doubt in (".heic 1", "1 of 12 validation images are copies"):
        assert any(doubt in note for note in of["doubts"]), of["doubts"]
    assert all(note in html.unescape(page) for note in of["doubts"])
    first, second = of["checkpoints"]
    assert (first["name"], second["name"]) == ("1: metamask-test", "2: simclr-test")
    assert (second["path"], second["mask"], first["dims"]) == (str(runs["simclr"]), None, 512)
    assert list(first["information"]) == ["class", "photograph", "deviation"]
    np.testing.assert_allclose(first["mask"], read_checkpoint(runs["metamask"]).mask, rtol=1e-6)
    assert all(of["inside"] for of in first["bounds"].values())
    accuracy = first["accuracy"]["knn"]
    assert accuracy["difference"] == pytest.approx(accuracy["masked"] - accuracy["plain"])
    assert f"kNN {accuracy['masked']:.1%} and {accuracy['plain']:.1%}" in page


@pytest.mark.parametrize("kind", ["split", "folders of any depth"])
def test_images_without_labels_have_their_redundancy_measured(runs, images, tmp_path, run, kind):
    flat = tmp_path / "flat"
    for number, file in enumerate(sorted((images / "train").rglob("*.png"))):
        folder = flat / ("train" if kind == "split" else f"{number % 2}/{number % 3}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:02}.png").write_bytes(file.read_bytes())
    of = run(runs["metamask"], data=flat)
    numbers = of["checkpoints"][0]
    page = (tmp_path / "out" / "report.html").read_text()
    analysis = run(runs["metamask"], data=None)  # the run's own images, which are the same
    assert analysis["images"] == {"train": 20, "val": 10} and analysis["classes"] == 5
    assert numbers["accuracy"] is numbers["subsets"] is numbers["bounds"] is of["classes"] is None
    for version, measures in numbers["redundancy"].items():
        expected = analysis["checkpoints"][0]["redundancy"][version]["rankme"]
        assert measures["rankme"] == pytest.approx(expected, rel=1e-4)
    assert list(numbers["information"]) == ["deviation"]
    assert "Accuracies need labels" in page
    assert f"20 {'training ' if kind == 'split' else ''}images" in " ".join(page.split())


def test_the_background_of_a_runs_own_images_is_known(run, data, tmp_path):
    checkpoint = write_run(tmp_path / "run", data)
    assert run(checkpoint, data=None)["photographs"] is True


def test_a_collapsed_and_a_diverged_run_beside_a_good_one(run, runs, tmp_path, capsys):
    collapsed = changed(runs["simclr"], tmp_path / "collapsed", 0.0)
    diverged = changed(runs["metamask"], tmp_path / "diverged", float("nan"))
    one, two, three = run(runs["metamask"], collapsed, diverged)["checkpoints"]
    assert one["accuracy"]["knn"]["plain"] > 0.5 and one["notes"] == []
    assert "the same" in two["notes"][0]
    assert "not finite" in three["notes"][0]
    assert three["redundancy"] is three["accuracy"] is None
    assert three["mask_statistics"]["max"] == pytest.approx(one["mask_statistics"]["max"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert two["notes"][0] in page and "metamask,\nfeatures not measured" in page
    capsys.readouterr()
    run(diverged, code=1)  # nothing to show but the mask
    assert f"note: {diverged}: its features are not finite" in capsys.readouterr().err
