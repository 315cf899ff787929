"""The data of a config: folders, torchvision's data sets, and what evaluation reads."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from omegaconf import DictConfig
from runs import pretrain_config, write_images
from sklearn.model_selection import train_test_split
from torchvision.datasets import STL10

from metamask_solo.data.datasets import write_fingerprints
from metamask_solo.data.loaders import (
    check_folders,
    classification_dataset,
    classification_datasets,
    count_classes,
    pretrain_dataset,
)
from metamask_solo.errors import UserError


def size_of(image: Any) -> torch.Tensor:
    return torch.tensor(image.size)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_images(tmp_path / "data", classes=3, train=4, val=2)


@pytest.fixture
def cfg(data: Path) -> DictConfig:
    return pretrain_config(data, data / "runs")


def test_pretraining_has_views_and_evaluation_has_images(cfg: DictConfig) -> None:
    check_folders(cfg)
    Path(cfg.data.train_path, ".hidden").mkdir()
    count_classes(cfg)
    assert cfg.data.num_classes == 3
    index, views, label = pretrain_dataset(cfg)[(5, 1)]
    assert (index, label) == (5, 1) and [view.shape for view in views] == [(3, 32, 32)] * 2
    train, val = classification_datasets(cfg, size_of, size_of)
    assert (len(train), len(val), train[5][1]) == (12, 6, 1)
    shutil.copy(train.files[0], Path(cfg.data.train_path, "beside.png"))
    cfg.data.no_labels = True
    count_classes(cfg)
    images = pretrain_dataset(cfg)
    assert (len(images), images.labelled, images[0][2], cfg.data.num_classes) == (13, False, 0, 1)


def test_a_fraction_is_that_of_solo_learn(cfg: DictConfig) -> None:
    cfg.data.fraction = 0.5
    train = classification_dataset(cfg, "train", size_of)
    cfg.data.fraction = -1
    whole = classification_dataset(cfg, "train", size_of)
    kept, _ = train_test_split(
        range(12), train_size=0.5, stratify=sorted([0, 1, 2] * 4), random_state=42
    )
    assert train.files == [whole.files[i] for i in kept]
    assert train.targets == [whole.targets[i] for i in kept] == [train[i][1] for i in range(6)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "svhn"}, "data.dataset=svhn: must be one of"),
        ({"fraction": 0.01}, "data.fraction=0.01: "),
        ({"train_path": None}, "data.train_path: missing"),
        ({"val_path": "/nowhere"}, "data.val_path=/nowhere: no such folder"),
        ({"val_path": "many/val"}, "3 classes in train and 101 in val .* class class_10 is in val"),
        ({"train_path": "many/train", "val_path": None, "dataset": "imagenet100"}, "has 100 class"),
    ],
)
def test_wrong_settings_are_refused(
    settings: dict[str, Any], message: str, cfg: DictConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(cfg.data.train_path).parent)
    write_images(Path("many"), classes=101, train=1, val=1)
    cfg.data.update(settings)
    with pytest.raises(UserError, match=message):
        if cfg.data.train_path:
            check_folders(cfg)
        classification_datasets(cfg, size_of, size_of)


def test_doubts_of_all_kinds_are_said_and_carried(
    cfg: DictConfig, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = data / "run"
    write_fingerprints(pretrain_dataset(cfg), run)
    for split, name in (("train", "x.heic"), ("val", "y.txt")):
        (data / split / "class_0" / name).write_bytes(b"")
    shutil.copy(data / "train" / "class_1" / "0.png", data / "val" / "class_1" / "again.png")
    _, val = classification_datasets(cfg, size_of, size_of, run)
    said = [line.removeprefix("note: ") for line in capsys.readouterr().err.splitlines()]
    assert said == val.notes
    doubts = (".heic 1", ".txt 1", "1 of 7 validation", "1 of 7 images")
    assert all(doubt in note for doubt, note in zip(doubts, said, strict=True))
    shutil.rmtree(data / "val" / "class_2")
    with pytest.raises(UserError, match="class class_2 is in train only"):
        classification_datasets(cfg, size_of, size_of)


LABELLED, UNLABELLED, TESTS = 12, 84, 10


@pytest.fixture
def stl10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DictConfig:
    """A few images in STL-10's binary form: planes column by column, labels from 1."""
    # the files are not the published ones, and nothing is downloaded in a test
    monkeypatch.setattr(STL10, "_check_integrity", lambda self: True)
    folder = tmp_path / STL10.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, count in (("train", LABELLED), ("unlabeled", UNLABELLED), ("test", TESTS)):
        rng.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8).tofile(folder / f"{name}_X.bin")
        (np.arange(count) % 10 + 1).astype(np.uint8).tofile(folder / f"{name}_y.bin")
    (folder / "class_names.txt").write_text("\n".join(f"class {i}" for i in range(10)) + "\n")
    return packed("stl10", tmp_path)


def packed(name: str, folder: Path) -> DictConfig:
    cfg = pretrain_config(folder, folder / "runs", data__dataset=name)
    cfg.data.train_path = cfg.data.val_path = str(folder)
    return cfg


def test_unlabelled_images_are_read_with_the_labelled_ones(stl10: DictConfig) -> None:
    check_folders(stl10)
    dataset = pretrain_dataset(stl10)
    assert len(dataset) == LABELLED + UNLABELLED and not dataset.labelled
    assert dataset.targets == [i % 10 for i in range(LABELLED)] + [-1] * UNLABELLED
    index, views, label = dataset[LABELLED]
    assert (index, label, len(views)) == (LABELLED, 0, 2)
    val = classification_dataset(stl10, "val", size_of)
    assert len(val) == TESTS and val[3][0].tolist() == [96, 96] and val[3][1] == 3


def test_a_folder_without_the_data_set_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*args: Any, **kwargs: Any) -> None:
        raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", no_network)
    for folder, state in ((tmp_path / "none", "no such folder"), (tmp_path, "holds no whole")):
        with pytest.raises(UserError, match=f"data.val_path={folder}: .*{state}.*urlopen"):
            classification_dataset(packed("cifar10", folder), "val", size_of)
