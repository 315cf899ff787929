"""What is said of features alone: finite or not, collapsed, their rank, classes of unequal size."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints_of_runs import write_run
from sklearn.metrics import balanced_accuracy_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from metamask_solo.errors import UserError
from metamask_solo.evaluation import features as module
from metamask_solo.evaluation.features import (
    FeatureReader,
    NotFinite,
    effective_rank,
    extract_features,
    imbalance_note,
    mean_over_classes,
    rankme,
    second_moments,
)
from metamask_solo.evaluation.knn import knn_hits
from metamask_solo.evaluation.linear import linear_probe


def extract(features: Tensor) -> tuple[Tensor, Tensor]:
    data = TensorDataset(features, torch.arange(len(features)))
    return extract_features(nn.Identity(), DataLoader(data, batch_size=8), label="run")


def test_a_gpu_without_room_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(nn.Identity, "forward", full)
    with pytest.raises(UserError, match="the GPU's memory is full; lower --batch-size"):
        extract(torch.ones(8, 2))


def test_images_are_those_of_the_run_or_of_a_folder(images: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", images)
    data = Path(shutil.copytree(images, tmp_path / "data"))

    def read(split: str, folder: Path | None = None, labels: bool | None = True) -> Any:
        reader = FeatureReader(run, data=folder, batch_size=2, num_workers=0)
        return reader.loader(split, labels).dataset

    of_run, of_folder = read("val"), read("val", data)
    assert of_run.split == of_folder.split == "val" and of_run.labelled
    assert of_run.files == [file.replace(str(data), str(images)) for file in of_folder.files]
    with pytest.raises(UserError, match=f"--data={data}/train/val: no such folder"):
        read("val", data / "train")
    folder = read("val", data / "train", None)  # holds no splits: all of it
    assert folder.split == "" and folder.classes == [f"class_{i}" for i in range(5)]

    args = json.loads((run.parent / "args.json").read_text())
    args["data"] |= {"val_path": None, "no_labels": True}
    (run.parent / "args.json").write_text(json.dumps(args))
    with pytest.raises(UserError, match="data.val_path: missing; give .*--data FOLDER"):
        read("val")
    unlabelled = read("val", None, None)
    assert len(unlabelled) == 20 and not unlabelled.labelled and unlabelled[0][1] == -1
    assert unlabelled.split == "train"
    assert read("val", data / "train", None).classes == folder.classes


def test_features_that_are_not_finite_are_refused() -> None:
    features = torch.randn(20, 4)
    features[9, 1], features[11] = float("nan"), float("inf")
    with pytest.raises(NotFinite, match="not finite, for 2 of the first 16 images"):
        extract(features)
    labels = torch.arange(20) % 2
    for evaluate in (knn_hits, linear_probe):
        with pytest.raises(NotFinite, match="val features"):
            evaluate(torch.randn(20, 4), labels, features, labels)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("features", "collapsed"),
    [
        (torch.zeros(20, 4), True),
        (100 + 1e-4 * torch.randn(20, 4), True),  # what rounding leaves
        (100 + 0.1 * torch.randn(20, 4), False),
        (torch.eye(20)[:, :4], False),
    ],
)
def test_collapse_is_said(
    features: Tensor, collapsed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    read, labels = extract(features)
    assert torch.equal(read, features) and labels.tolist() == list(range(20))
    assert ("all features are (nearly) the same" in capsys.readouterr().err) is collapsed


@pytest.mark.parametrize("shape", [(200, 16), (10, 32)])
def test_rankme_is_the_entropy_of_the_singular_values(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 100)  # several blocks
    features = torch.randn(shape) * torch.logspace(0, -2, shape[1]) + 1
    mask = torch.rand(shape[1])
    singular = np.linalg.svd((features * mask).double().numpy(), compute_uv=False)
    share = singular / singular.sum()
    expected = np.exp(-(share * np.log(share)).sum())
    assert rankme(features * mask) == pytest.approx(expected, rel=1e-6)
    weights = mask.double()
    masked = effective_rank(second_moments(features) * weights * weights[:, None])
    assert masked == pytest.approx(expected, rel=1e-6)
    assert rankme(torch.zeros(5, 3)) == 0.0


def test_classes_of_unequal_size() -> None:
    rng = np.random.default_rng(0)
    train, val = rng.choice(3, 200, p=[0.8, 0.1, 0.1]), rng.choice(3, 100, p=[0.8, 0.1, 0.1])
    guess = np.where(rng.random(100) < 0.3, rng.integers(0, 3, 100), val)
    correct, labels = torch.from_numpy(guess == val), torch.from_numpy(val)
    expected = 100 * balanced_accuracy_score(val, guess)
    assert mean_over_classes(correct, labels) == pytest.approx(expected)

    largest = 100 * np.mean(val == 0)
    note = imbalance_note(largest, torch.from_numpy(train), labels)
    assert note is not None and f"training images ({largest:.2f} %)" in note
    assert imbalance_note(largest + 1, torch.from_numpy(train), labels) is None
    equal: Any = torch.arange(90) % 3
    assert imbalance_note(33.3, torch.from_numpy(train), equal) is None
