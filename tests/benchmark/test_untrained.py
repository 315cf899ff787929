"""The CIFAR-10 benchmark on both forms of its data, with what is untrained beside it."""

import csv
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metamask_solo.__main__ import main
from metamask_solo.evaluation.features import percent
from metamask_solo.evaluation.knn import knn_hits
from metamask_solo.evaluation.linear import linear_probe

pytestmark = pytest.mark.slow
CIFAR = Path(__file__).parents[2] / "scripts" / "benchmark" / "cifar10.yaml"
# a ResNet-18 without its last layer; the 3 × 3 stem has 1,728 weights, the standard one 9,408
PARAMETERS = 11_176_512 - 9408 + 1728
SMALL = [
    "optimizer.batch_size=10",
    "data.num_workers=0",
    "accelerator=cpu",
    "precision=32",
    "method_kwargs.proj_hidden_dim=16",
    "method_kwargs.proj_output_dim=16",
]
KEYS = [f"overrides+=[{','.join(SMALL)}]", "only=[vicreg]", "seeds=[3]", "epochs=1"]


def read_csv(out: Path) -> dict[str, dict[str, str]]:
    with (out / "results.csv").open(newline="") as file:
        return {row["method"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def class_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images of each of ten classes for training, and one for validation."""
    root = tmp_path_factory.mktemp("cifar")
    draw = np.random.default_rng(0)
    for split, count in (("train", 2), ("val", 1)):
        for label in range(10):
            folder = root / split / f"class_{label}"
            folder.mkdir(parents=True)
            for image in range(count):
                pixels = draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                pixels[:, :, 0] = 25 * label  # the class can be seen
                Image.fromarray(pixels).save(folder / f"{image}.png")
    return root


@pytest.fixture
def torchvisions_files(
    class_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The same images in the form of the CIFAR-10 archive, whose checksums are not asked for."""
    folder = tmp_path / "root" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = ["data_batch_1", *(f"data_batch_{i}" for i in range(2, 6)), "test_batch"]
    files = {"train": sorted((class_folders / "train").rglob("*.png"))}
    files["val"] = sorted((class_folders / "val").rglob("*.png"))
    for place, name in enumerate(names):
        own = files["val"] if name == "test_batch" else files["train"][place * 4 : place * 4 + 4]
        images = [np.asarray(Image.open(file)).transpose(2, 0, 1).reshape(-1) for file in own]
        labels = [int(file.parent.name.removeprefix("class_")) for file in own]
        (folder / name).write_bytes(pickle.dumps({"data": np.array(images), "labels": labels}))
    meta = {"label_names": [f"class_{label}" for label in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta))
    trusting = tmp_path / "trusting"
    trusting.mkdir()
    (trusting / "sitecustomize.py").write_text(
        "from torchvision.datasets import cifar\n"
        "cifar.check_integrity = lambda *arguments: True\n"
        "cifar.CIFAR10._check_integrity = lambda self: True\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(trusting))
    return tmp_path / "root"


def test_the_cifar_benchmark_on_torchvisions_files(
    torchvisions_files: Path, tmp_path: Path
) -> None:
    paths = [f"data.{split}_path={torchvisions_files}" for split in ("train", "val")]
    out = tmp_path / "out"

    keys = [*KEYS, "untrained=[random]", f"out={out}"]
    assert main(["benchmark", str(CIFAR), *paths, *keys]) == 0

    rows = read_csv(out)
    assert list(rows) == ["random", "vicreg"]
    assert all(row["status"] == "finished" for row in rows.values())
    assert int(rows["random"]["parameters"]) == PARAMETERS


def test_the_cifar_benchmark_on_class_folders(class_folders: Path, tmp_path: Path) -> None:
    paths = [f"data.{split}_path={class_folders / split}" for split in ("train", "val")]
    out = tmp_path / "out"

    assert main(["benchmark", str(CIFAR), *paths, *KEYS, f"out={out}"]) == 0

    rows = read_csv(out)
    assert list(rows) == ["random", "pixels", "vicreg"]
    assert int(rows["random"]["parameters"]) == PARAMETERS  # the same network
    report = (out / "results.md").read_text()
    assert "| untrained backbone | 1 |" in report and "| pixels | 1 |" in report

    # the pixels' accuracies, from the images themselves
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    features, labels = {}, {}
    for split in ("train", "val"):
        files = sorted((class_folders / split).rglob("*.png"))
        images = np.stack([np.asarray(Image.open(file)) / 255 for file in files])
        scaled = ((images - mean) / std).transpose(0, 3, 1, 2).reshape(len(files), -1)
        features[split] = torch.from_numpy(scaled).float()
        labels[split] = torch.tensor([int(f.parent.name.removeprefix("class_")) for f in files])
    data = features["train"], labels["train"], features["val"], labels["val"]
    assert float(rows["pixels"]["knn"]) == pytest.approx(percent(knn_hits(*data)[0]))
    assert float(rows["pixels"]["linear"]) == pytest.approx(percent(linear_probe(*data)[0]))
