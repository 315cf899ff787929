"""The command ``metamask-solo analyze``, on small generated checkpoints and images."""

import json
import re
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

from metamask_solo.analysis import drawing, figures, loading, output, study
from metamask_solo.checkpoints.reading import read_checkpoint
from metamask_solo.commands import analyze
from metamask_solo.data import images
from metamask_solo.data.splitting import split_folder
from metamask_solo.errors import UserError
from metamask_solo.hosts import BACKBONE_PREFIX, build_backbone

DIMS = 512
CLASSES = ("a", "b", "c")
FIGURES = set(figures.FIGURES)


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes much of the time of these tests; nothing here depends on the resolution."""
    monkeypatch.setitem(drawing.STYLE, "savefig.dpi", 40)


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


def write_run(folder: Path, method: str, masked: bool, **changes: Any) -> Path:
    """A checkpoint of an untrained ResNet-18, with a mask or none, and its args.json."""
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
    raw: dict[str, Any] = {"state_dict": state}
    if masked:
        logits = torch.linspace(-2, 2, DIMS)
        state["mask.logits"] = logits
        masks = torch.stack([torch.full((DIMS,), 0.5), torch.sigmoid(logits)])
        raw["metamask"] = {
            "kind": "sigmoid",
            "history": {"step": torch.tensor([0, 12]), "mask": masks},
        }
    folder.mkdir(parents=True)
    torch.save(raw, folder / "last.ckpt")
    (folder / "args.json").write_text(json.dumps(OmegaConf.to_container(config)))
    return folder / "last.ckpt"


@pytest.fixture
def run(data: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs the command quickly and returns analysis.json."""

    def run(*checkpoints: Path, out: str = "out", seed: int = 0) -> dict[str, Any]:
        options = ["--data", data, "--out", tmp_path / out, "--seed", seed]
        options += ["--draws", 2, "--num-workers", 0]
        assert analyze.main([str(value) for value in (*checkpoints, *options)]) == 0
        return json.loads((tmp_path / out / "analysis.json").read_text())

    return run


@pytest.mark.slow
def test_two_methods_side_by_side(run, tmp_path, capsys):
    masked = write_run(tmp_path / "masked", "metamask", True)
    plain = write_run(tmp_path / "plain", "simclr", False)
    found = run(masked, plain.parent)

    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'report.html'}: 2 checkpoints\n"
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == FIGURES
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == len(FIGURES)
    assert "http" not in page
    assert found["data"] == {
        "folder": str(tmp_path / "data"),
        "classes": 3,
        "train_images": 24,
        "val_images": 12,
        "background": True,
    }
    first, second = found["checkpoints"]
    assert (first["name"], second["name"]) == ("1: metamask-run", "2: simclr-run")
    assert second["path"] == str(plain)
    assert first["dims"] == DIMS
    assert list(first["mask"]["information"]) == ["class", "photograph", "colour", "deviation"]
    np.testing.assert_allclose(
        first["mask"]["values"], torch.sigmoid(torch.linspace(-2, 2, DIMS)), rtol=1e-6
    )
    assert first["mask"]["history"]["step"] == [0, 12]
    assert second["mask"] is None
    assert first["bracket"]["positives"] == second["bracket"]["positives"] == "two views"
    assert first["bracket"]["plain"]["negatives"] == 24
    for bracket in (first["bracket"]["plain"], first["bracket"]["masked"]):
        assert bracket["inside"] and 0 < bracket["intra_class_variance"] < 1
    assert second["bracket"]["masked"] is None


@pytest.mark.slow
def test_it_is_deterministic(run, tmp_path, monkeypatch):
    checkpoint = write_run(tmp_path / "masked", "metamask", True)
    first = run(checkpoint, out="first")
    assert run(checkpoint, out="second") == first
    for name in ("report.html", "subsets.png", "bracket.png"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    monkeypatch.setattr(output, "draw_figures", lambda studies: {})
    other = run(checkpoint, out="other", seed=1)
    views = [analysis["checkpoints"][0]["bracket"]["plain"] for analysis in (first, other)]
    assert views[0]["contrastive_loss"] != views[1]["contrastive_loss"]


def test_without_views_for_all_the_positives_are_of_the_same_class(run, tmp_path, monkeypatch):
    monkeypatch.setattr(output, "draw_figures", lambda studies: {})
    several = write_run(tmp_path / "several", "simclr", False)
    single = write_run(
        tmp_path / "single", "metamask", False, augmentations=[{**AUGMENTATION, "num_crops": 1}]
    )
    (tmp_path / "data" / "metadata.csv").unlink()
    found = run(several, single)
    assert [c["bracket"]["positives"] for c in found["checkpoints"]] == ["same class"] * 2
    assert found["data"]["background"] is False


def test_views_are_scaled_as_in_training(data, tmp_path):
    config = {"data": {"dataset": "cifar10"}, "backbone": {"name": "resnet18", "kwargs": {}}}
    still = {
        **AUGMENTATION,
        "rrc": {"enabled": True, "crop_min_scale": 1.0, "crop_max_scale": 1.0},
        **{
            name: {**AUGMENTATION[name], "prob": 0.0}
            for name in (  # type: ignore[dict-item]
                "color_jitter",
                "grayscale",
                "gaussian_blur",
                "solarization",
            )
        },
    }
    checkpoint = read_checkpoint(
        write_run(tmp_path / "run", "simclr", False, augmentations=[still], **config)
    )
    views = loading.two_view_data(checkpoint, data / "val")
    _, (view, _), label = views[0]
    pixel = np.asarray(Image.open(data / "val" / "a" / "0.png"))[5, 3] / 255
    mean, std = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2470, 0.2435, 0.2616])
    np.testing.assert_allclose(view[:, 5, 3], (pixel - mean) / std, atol=0.05)
    assert label == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", "999"], "--samples=999: must be from 1000 to 50000"),
        (["--samples", "50001"], "--samples=50001"),
        (["--draws", "1"], "--draws=1: must be from 2"),
        (["--seed", "-1"], "--seed=-1"),
        (["--batch-size", "0"], "--batch-size=0"),
        (["--num-workers", "-1"], "--num-workers=-1"),
        (["--device", "tpu"], "--device=tpu: must be auto, cpu or cuda"),
        (["--data", "nowhere"], "--data=nowhere: no such folder"),
    ],
)
def test_wrong_settings_are_named_before_anything_is_read(options, message, data, tmp_path):
    given = ["gone.ckpt", "--data", str(data), "--out", str(tmp_path / "out"), *options]
    with pytest.raises(UserError, match=message):
        analyze.main(given)
    assert not (tmp_path / "out").exists()


def test_wrong_files_are_named(data, tmp_path):
    options = ["--data", str(data), "--out"]
    with pytest.raises(UserError, match="gone.ckpt: no such checkpoint"):
        analyze.main(["gone.ckpt", *options, str(tmp_path / "out")])
    with pytest.raises(UserError, match="holds other files"):
        analyze.main(["gone.ckpt", *options, str(data)])
    (data / "val" / "d").mkdir()
    with pytest.raises(UserError, match="class d is in val only"):
        analyze.main(["gone.ckpt", *options, str(tmp_path / "out")])


def test_cuda_that_is_not_there(data, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no GPU"):
        analyze.main(["gone.ckpt", "--data", str(data), "--device", "cuda"])


def test_help_states_memory_and_ranges(capsys):
    with pytest.raises(SystemExit) as stopped:
        analyze.main(["--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "usage: metamask-solo analyze" in text
    assert "1000 to 50000" in text and "Memory:" in text


def test_images_without_labels_have_their_redundancy_measured(data, tmp_path, run):
    split_folder(data / "train", tmp_path / "flat", 0.5, flat=True)
    checkpoint = write_run(tmp_path / "run", "metamask", True)

    options = ["--data", str(tmp_path / "flat"), "--out", str(tmp_path / "out")]
    assert analyze.main([str(checkpoint), *options, "--num-workers", "0"]) == 0
    found = json.loads((tmp_path / "out" / "analysis.json").read_text())
    labelled = run(checkpoint, out="labelled")
    numbers = found["checkpoints"][0]
    assert numbers["accuracy"] is numbers["subsets"] is numbers["bracket"] is None
    assert found["data"]["classes"] is None and found["data"]["train_images"] == 12
    assert numbers["redundancy"].keys() == labelled["checkpoints"][0]["redundancy"].keys()
    assert numbers["redundancy"]["plain"]["rankme"] > 1
    drawn = {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert drawn == {"correlation", "spectrum", "mask", "information"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Accuracies need labels" in page and "12 training images without labels" in page


@pytest.mark.parametrize("dataset", ["custom", "cifar10"])
def test_the_runs_own_data_are_the_default(data, tmp_path, monkeypatch, dataset, run):
    own = {"dataset": dataset, "num_classes": 3}
    own |= {f"{split}_path": str(data / split) for split in ("train", "val")}
    checkpoint = write_run(tmp_path / "run", "metamask", True, data=own)
    if dataset == "cifar10":  # as torchvision gives it: no files, and no folders
        monkeypatch.setattr(images, "classification_dataset", _cifar(data))

    options = ["--out", str(tmp_path / "out"), "--draws", "2", "--num-workers", "0"]
    assert analyze.main([str(checkpoint), *options]) == 0
    found = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert (found["data"]["train_images"], found["data"]["val_images"]) == (24, 12)
    assert found["data"]["classes"] == 3
    positives = found["checkpoints"][0]["bracket"]["positives"]
    assert positives == ("two views" if dataset == "custom" else "same class")
    if dataset == "custom":
        given = run(checkpoint, out="given")["checkpoints"][0]
        assert found["checkpoints"][0]["accuracy"] == given["accuracy"]
        references = found["checkpoints"][0]["references"]
        assert list(references) == ["random backbone (resnet18)", "raw pixels"]
        assert references == given["references"]


def _cifar(data):
    def dataset(config, split, transform, whole):
        return list(ImageFolder(str(data / split), transform))

    return dataset


def test_pixels_are_those_of_scikit_learn(data, tmp_path, run, monkeypatch):
    """The kNN of raw pixels against scikit-learn's, k = 20 of 24 images and temperature 0.07.

    On all images as the accuracies beside them, however few the subset experiment takes.
    """
    monkeypatch.setattr(study, "SUBSET_TRAIN", 12)
    monkeypatch.setattr(study, "SUBSET_VAL", 6)
    measured, counts = study.reference_accuracies, []

    def counted(references):
        counts.append([len(split.labels) for split in references["raw pixels"]])
        return measured(references)

    monkeypatch.setattr(study, "reference_accuracies", counted)
    found = run(write_run(tmp_path / "run", "simclr", False))["checkpoints"][0]
    pixels, labels = {}, {}
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    for split in ("train", "val"):
        folder = ImageFolder(str(data / split))
        scaled = [(np.asarray(image) / 255 - mean) / std for image, _ in folder]
        pixels[split] = np.stack(scaled).reshape(len(scaled), -1)
        labels[split] = folder.targets

    def weights(distance):
        return np.exp((1 - distance) / 0.07)

    knn = KNeighborsClassifier(20, metric="cosine", algorithm="brute", weights=weights)
    knn.fit(pixels["train"], labels["train"])
    assert found["references"]["raw pixels"]["knn"] == pytest.approx(
        knn.score(pixels["val"], labels["val"])
    )
    assert found["subsets"]["references"].keys() == found["references"].keys()
    assert counts == [[24, 12], [found["subsets"]["train_images"], found["subsets"]["val_images"]]]
    assert counts[1] == [12, 6]


def test_runs_of_different_data_are_not_compared(data, tmp_path):
    def own(name, **changes):
        folders = {f"{split}_path": str(data / split) for split in ("train", "val")}
        own_data = {"dataset": "custom", "num_classes": 3, **folders, **changes}
        return write_run(tmp_path / name, "simclr", False, data=own_data)

    first, same = own("a"), own("b", val_path=f"{data}/train/../val")
    other, packed = own("c", val_path=str(data / "train")), own("d", format="h5")
    for one, said in ((other, "data.val_path is .*val and .*train"), (packed, "data.format is")):
        with pytest.raises(UserError, match=f"runs of different data: {said}.*; analyse"):
            analyze.main([str(first), str(one), "--out", str(tmp_path / "out")])
    loading.check_same_data([read_checkpoint(path) for path in (first, same)])


def test_runs_of_one_name_are_told_apart_and_the_page_begins_with_the_answers(data, tmp_path, run):
    paths = [write_run(tmp_path / f"offline-{name}", "metamask", True) for name in ("a1", "b2")]
    found = run(*paths)

    names = [one["name"] for one in found["checkpoints"]]
    assert names == ["1: metamask-run (a1)", "2: metamask-run (b2)"]
    page = (tmp_path / "out" / "report.html").read_text()
    answer = re.search(r'<p class="answer">(.*?)</p>', page)
    assert answer is not None and page.index("<p") == answer.start()
    assert answer[1].startswith("The mask of 1: metamask-run (a1) spread out, from 0.1")
    assert "evidence" in answer[1] and "Accuracy with the mask and without it" in answer[1]
    accuracy = found["checkpoints"][0]["accuracy"]["knn"]
    assert accuracy["difference"]["mean"] == pytest.approx(accuracy["masked"] - accuracy["plain"])
    assert f"kNN {accuracy['masked']:.1%} and {accuracy['plain']:.1%}" in answer[1]
