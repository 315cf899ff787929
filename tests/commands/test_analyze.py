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
from sklearn.neighbors import KNeighborsClassifier
from torchvision.datasets import ImageFolder

from metamask_solo.__main__ import main
from metamask_solo.analysis import figures, loading
from metamask_solo.hosts import BACKBONE_PREFIX, build_backbone

DIMS = 512
CLASSES = ("a", "b", "c")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three classes, told by where a bright square is, on backgrounds of two photographs."""
    root, rng = tmp_path / "data", np.random.default_rng(0)
    rows = ["file,split,label,photograph,row,column,mean_red,mean_green,mean_blue"]
    for split, each in (("train", 8), ("val", 4)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for index in range(each):
                photograph = int(rng.integers(2))
                pixels = rng.integers(0, 60, size=(32, 32, 3)) + 80 * photograph
                pixels[4:14, 10 * label : 10 * label + 10] = 255
                file = f"{split}/{name}/{index}.png"
                Image.fromarray(pixels.astype(np.uint8)).save(root / file)
                colour = ",".join([f"{0.1 + 0.3 * photograph:.3f}"] * 3)
                rows.append(f"{file},{split},{name},{photograph}.jpg,0,0,{colour}")
    (root / "metadata.csv").write_text("\n".join(rows) + "\n")
    return root


AUGMENTATION = {
    "rrc": {"enabled": True, "crop_min_scale": 0.5, "crop_max_scale": 1.0},
    "color_jitter": {
        "prob": 0.8,
        "brightness": 0.4,
        "contrast": 0.4,
        "saturation": 0.2,
        "hue": 0.1,
    },
    "grayscale": {"prob": 0.2},
    "gaussian_blur": {"prob": 0.5},
    "solarization": {"prob": 0.1},
    "equalization": {"prob": 0.0},
    "horizontal_flip": {"prob": 0.0},
    "crop_size": 32,
    "num_crops": 2,
}


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
            "augmentations": [AUGMENTATION],
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
        if not whole:  # the figures and the pixels take most of the time
            monkeypatch.setattr(figures, "FIGURES", {})
            monkeypatch.setattr(loading, "MOST_PIXELS", 0)
        options = {"out": tmp_path / "out", "draws": 2, "num-workers": 0, **more}
        options |= {} if data is None else {"data": data}
        argv = [f"--{name}={value}" for name, value in options.items()]
        assert main(["analyze", *map(str, checkpoints), *argv]) == 0
        return json.loads((Path(options["out"]) / "analysis.json").read_text())

    return run


def knn_of_pixels(data: Path) -> float:
    """scikit-learn's, with k = 20 of 24 images and temperature 0.07."""
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels, labels = {}, {}
    for split in ("train", "val"):
        folder = ImageFolder(str(data / split))
        scaled = [(np.asarray(image) / 255 - mean) / std for image, _ in folder]
        pixels[split], labels[split] = np.stack(scaled).reshape(len(scaled), -1), folder.targets
    knn = KNeighborsClassifier(
        20, metric="cosine", algorithm="brute", weights=lambda far: np.exp((1 - far) / 0.07)
    )
    return knn.fit(pixels["train"], labels["train"]).score(pixels["val"], labels["val"])


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
    assert (of["data"], of["classes"], of["background"]) == (str(data), 3, True)
    for doubt in (".heic 1", "1 of 12 validation images are copies"):
        assert any(doubt in note for note in of["doubts"]), of["doubts"]
    assert all(note in html.unescape(page) for note in of["doubts"])
    first, second = of["checkpoints"]
    assert (first["name"], second["name"]) == ("1: metamask-run", "2: simclr-run")
    assert (second["path"], second["mask"], first["dims"]) == (str(plain), None, DIMS)
    assert list(first["mask"]["information"]) == ["class", "photograph", "colour", "deviation"]
    values = torch.sigmoid(torch.linspace(-2, 2, DIMS))
    np.testing.assert_allclose(first["mask"]["values"], values, rtol=1e-6)
    assert [row["step"] for row in first["mask"]["history"]] == [0, 12]
    assert first["positives"] == second["positives"] == "two views"
    assert first["bounds"]["plain"]["negatives"] == 24
    assert all(of["inside"] for of in first["bounds"].values())
    pixels = knn_of_pixels(data)
    assert of["untrained"]["pixels"]["knn"] == pytest.approx(pixels)
    assert second["subsets"]["untrained"]["pixels"]["knn"] == pytest.approx(pixels)
    assert list(of["untrained"]) == ["untrained backbone (resnet18)", "pixels"]
    accuracy = first["accuracy"]["knn"]
    assert accuracy["difference"][0] == pytest.approx(accuracy["masked"] - accuracy["plain"])
    assert f"kNN {accuracy['masked']:.1%} and {accuracy['plain']:.1%}" in page


def test_the_same_seed_gives_the_same_numbers(run, tmp_path):
    checkpoint = write_run(tmp_path / "masked", "metamask", True)
    first = run(checkpoint)
    # views do not depend on the workers that draw them
    assert run(checkpoint, **{"num-workers": 2}) == first
    other = run(checkpoint, seed=1)
    losses = [o["checkpoints"][0]["bounds"]["plain"]["contrastive_loss"] for o in (first, other)]
    assert losses[0] != losses[1]


def test_views_are_scaled_as_in_training():
    off = {"prob": 0.0}
    still = {
        **AUGMENTATION,
        "rrc": {"enabled": True, "crop_min_scale": 1.0, "crop_max_scale": 1.0},
        "color_jitter": {**AUGMENTATION["color_jitter"], **off},  # type: ignore[dict-item]
        **dict.fromkeys(("grayscale", "gaussian_blur", "solarization"), off),
    }
    config = OmegaConf.create({"data": {"dataset": "cifar10"}, "augmentations": [still]})
    pixels = np.full((32, 32, 3), (10, 100, 200), dtype=np.uint8)
    first, second = loading.view_transform(config)(Image.fromarray(pixels))
    mean, std = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2470, 0.2435, 0.2616])
    for view in (first, second):
        np.testing.assert_allclose(view[:, 9, 9], (pixels[0, 0] / 255 - mean) / std, atol=0.05)


def test_without_views_for_all_the_positives_are_of_the_same_class(run, tmp_path):
    several = write_run(tmp_path / "several", "simclr", False)
    one_view = [{**AUGMENTATION, "num_crops": 1}]
    single = write_run(tmp_path / "single", "metamask", False, augmentations=one_view)
    of = run(several, single)
    assert [one["positives"] for one in of["checkpoints"]] == ["same class"] * 2


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--samples=999", "--samples=999: must be from 1000 to 50000"),
        ("--draws=1", "--draws=1: must be from 2"),
        ("--seed=-1", "--seed=-1"),
        ("--data=nowhere", "nowhere"),
        ("--out=data", "holds other files"),
        ("--samples=1000", "gone.ckpt: no such checkpoint"),
    ],
)
def test_wrong_settings_are_one_line(option, message, data, monkeypatch, capsys):
    monkeypatch.chdir(data.parent)
    checkpoint = "gone.ckpt"
    if "nowhere" in option:
        checkpoint = str(write_run(data.parent / "run", "simclr", False))
    assert main(["analyze", checkpoint, "--data=data", "--out=out", option]) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1
    assert not Path("out").exists()


@pytest.mark.parametrize("kind", ["split", "folders of any depth"])
def test_images_without_labels_have_their_redundancy_measured(data, tmp_path, run, kind):
    flat = tmp_path / "flat"
    for number, file in enumerate(sorted((data / "train").rglob("*.png"))):
        place = flat / ("train" if kind == "split" else f"{number % 2}/{number % 3}")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:02}.png").write_bytes(file.read_bytes())
    checkpoint = write_run(tmp_path / "run", "metamask", True)
    of = run(checkpoint, data=flat)
    numbers = of["checkpoints"][0]
    page = (tmp_path / "out" / "report.html").read_text()
    labelled = run(checkpoint)["checkpoints"][0]
    assert numbers["accuracy"] is numbers["subsets"] is numbers["bounds"] is of["classes"] is None
    for version, measures in numbers["redundancy"].items():
        expected = labelled["redundancy"][version]["rankme"]
        assert measures["rankme"] == pytest.approx(expected, rel=1e-4)
    assert list(numbers["mask"]["information"]) == ["deviation"]
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
    assert three["mask"]["statistics"]["max"] == pytest.approx(0.88, abs=0.01)
    page = (tmp_path / "out" / "report.html").read_text()
    assert two["notes"][0] in page and "3: metamask-run" in page and "not measured" in page


def test_the_runs_own_data_are_the_default(data, tmp_path, run):
    own = {"dataset": "custom", "num_classes": 3}
    own |= {f"{split}_path": str(data / split) for split in ("train", "val")}
    checkpoint = write_run(tmp_path / "run", "metamask", True, data=own)
    of = run(checkpoint, data=None)
    asked = run(checkpoint)
    assert of["images"] == {"train": 24, "val": 12} and of["classes"] == 3
    for name in ("accuracy", "bounds", "redundancy"):
        assert of["checkpoints"][0][name] == asked["checkpoints"][0][name]
