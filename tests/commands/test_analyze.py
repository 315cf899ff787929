"""The command ``metamask-solo analyze``, on small generated checkpoints and images."""

import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from metamask_solo.__main__ import main
from metamask_solo.analysis import figures
from metamask_solo.hosts import BACKBONE_PREFIX, build_backbone

DIMS = 512
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


def write_run(folder: Path, method: str, masked: bool, factor: float = 1.0, **changes: Any) -> Path:
    """A checkpoint of an untrained ResNet-18, with a mask or none, and its args.json.

    Args:
        factor: of weights: with 0 all features are the same, with NaN none is a number.
    """
    config = OmegaConf.create(
        {
            "name": f"{method}-run",
            "method": method,
            "backbone": {"name": "resnet18", "kwargs": {}},
            "data": {"dataset": "custom", "train_path": "gone", "num_classes": 3},
            "optimizer": {"name": "sgd", "batch_size": 8, "lr": 0.1, "weight_decay": 0.0},
            "max_epochs": 1,
            **changes,
        }
    )
    torch.manual_seed(len(method))
    backbone = build_backbone(config)
    state = {BACKBONE_PREFIX + name: value for name, value in backbone.state_dict().items()}
    for name, value in state.items():
        if "layer4" in name and "running" not in name and value.is_floating_point():
            value *= factor
    state[f"{BACKBONE_PREFIX}layer4.1.bn2.bias"] += 1.0
    raw: dict[str, Any] = {"state_dict": state}
    if masked:
        logits = torch.linspace(-2, 2, DIMS)
        state["mask.logits"] = logits
        masks = torch.stack([torch.full((DIMS,), 0.5), torch.sigmoid(logits)])
        history = {"step": torch.tensor([0, 12]), "mask": masks}
        raw["metamask"] = {"kind": "sigmoid", "history": history}
    folder.mkdir(parents=True)
    torch.save(raw, folder / "last.ckpt")
    (folder / "args.json").write_text(json.dumps(OmegaConf.to_container(config)))
    return folder / "last.ckpt"


@pytest.fixture
def run(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs the command quickly and returns analysis.json."""
    monkeypatch.setitem(figures.STYLE, "savefig.dpi", 40)

    def run(*checkpoints: Path, data: Path | None = data, whole: bool = False, **more: Any) -> Any:
        if not whole:  # the figures take most of the time
            monkeypatch.setattr(figures, "FIGURES", {})
        options = {"out": tmp_path / "out", "draws": 2, "num-workers": 0, **more}
        options |= {} if data is None else {"data": data}
        argv = [f"--{name}={value}" for name, value in options.items()]
        assert main(["analyze", *map(str, checkpoints), *argv]) == 0
        return json.loads((Path(options["out"]) / "analysis.json").read_text())

    return run


@pytest.mark.slow
def test_two_methods_side_by_side(run, data, tmp_path, capsys):
    masked = write_run(tmp_path / "masked", "metamask", True)
    plain = write_run(tmp_path / "plain", "simclr", False)
    # of training, such as a copied image, and a file that is no image
    (data / "val" / "a" / "0.png").write_bytes((data / "train" / "a" / "0.png").read_bytes())
    (data / "train" / "a" / "notes.heic").write_text("")
    of = run(masked, plain.parent, whole=True)
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
    assert (first["name"], second["name"]) == ("1: metamask-run", "2: simclr-run")
    assert (second["path"], second["mask"], first["dims"]) == (str(plain), None, DIMS)
    assert list(first["information"]) == ["class", "photograph", "deviation"]
    np.testing.assert_allclose(first["mask"], torch.sigmoid(torch.linspace(-2, 2, DIMS)), rtol=1e-6)
    assert all(of["inside"] for of in first["bounds"].values())
    accuracy = first["accuracy"]["knn"]
    assert accuracy["difference"] == pytest.approx(accuracy["masked"] - accuracy["plain"])
    assert f"kNN {accuracy['masked']:.1%} and {accuracy['plain']:.1%}" in page


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--draws=0", "--draws=0: must be at least 1"),
        ("--seed=-1", "--seed=-1"),
        ("--data=nowhere", "nowhere"),
        ("--out=data", "holds other files"),
        ("--samples=1000", "gone.ckpt: no such checkpoint"),
    ],
)
def test_wrong_settings_are_one_line(option, message, data, monkeypatch, capsys):
    monkeypatch.chdir(data.parent)
    checkpoint = "gone.ckpt"
    if option in ("--data=nowhere", "--out=data"):
        checkpoint = str(write_run(data.parent / "run", "simclr", False))
    assert main(["analyze", checkpoint, "--data=data", "--out=out", option]) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1
    assert not Path("out").exists()


@pytest.mark.parametrize("kind", ["split", "folders of any depth"])
def test_images_without_labels_have_their_redundancy_measured(data, tmp_path, run, kind):
    flat = tmp_path / "flat"
    for number, file in enumerate(sorted((data / "train").rglob("*.png"))):
        folder = flat / ("train" if kind == "split" else f"{number % 2}/{number % 3}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:02}.png").write_bytes(file.read_bytes())
    checkpoint = write_run(tmp_path / "run", "metamask", True)
    of = run(checkpoint, data=flat)
    numbers = of["checkpoints"][0]
    page = (tmp_path / "out" / "report.html").read_text()
    labelled = run(checkpoint)["checkpoints"][0]
    assert numbers["accuracy"] is numbers["subsets"] is numbers["bounds"] is of["classes"] is None
    for version, measures in numbers["redundancy"].items():
        expected = labelled["redundancy"][version]["rankme"]
        assert measures["rankme"] == pytest.approx(expected, rel=1e-4)
    assert list(numbers["information"]) == ["deviation"]
    assert "Accuracies need labels" in page
    assert f"24 {'training ' if kind == 'split' else ''}images" in " ".join(page.split())


def test_a_collapsed_and_a_diverged_run_beside_a_good_one(run, tmp_path, capsys):
    good = write_run(tmp_path / "good", "metamask", True)
    collapsed = write_run(tmp_path / "collapsed", "simclr", False, factor=0.0)
    diverged = write_run(tmp_path / "diverged", "metamask", True, factor=float("nan"))
    one, two, three = run(good, collapsed, diverged)["checkpoints"]
    assert one["accuracy"]["knn"]["plain"] > 0.5 and one["notes"] == []
    assert "the same" in two["notes"][0]
    assert two["redundancy"]["plain"]["rankme"] == pytest.approx(1, abs=1e-3)
    assert "not finite" in three["notes"][0]
    assert three["redundancy"] is three["accuracy"] is None
    assert three["mask_statistics"]["max"] == pytest.approx(0.88, abs=0.01)
    page = (tmp_path / "out" / "report.html").read_text()
    assert two["notes"][0] in page and "metamask,\nfeatures not measured" in page


def test_the_runs_own_data_are_the_default(data, tmp_path, run):
    own = {"dataset": "custom", "num_classes": 3}
    own |= {f"{split}_path": str(data / split) for split in ("train", "val")}
    checkpoint = write_run(tmp_path / "run", "metamask", True, data=own)
    of = run(checkpoint, data=None)
    asked = run(checkpoint)
    assert of["images"] == {"train": 24, "val": 12} and of["classes"] == 3
    for name in ("accuracy", "bounds", "redundancy"):
        assert of["checkpoints"][0][name] == asked["checkpoints"][0][name]
