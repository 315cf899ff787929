"""torchvision's data sets, on small sets in their own file formats; STL-10 to its end."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from omegaconf import OmegaConf
from runs import SMALL_HEADS
from torchvision.datasets import STL10

from metamask_solo.data.datasets import classification_dataset, pretrain_dataset
from metamask_solo.errors import UserError
from metamask_solo.training.hydra_app import compose_config
from metamask_solo.training.pretraining import pretrain_run
from metamask_solo.training.resume import read_metrics

LABELLED, UNLABELLED, TESTS = 12, 84, 10


def write_stl10(root: Path) -> Path:
    """A few images in STL-10's binary form: planes column by column, labels from 1."""
    folder = root / STL10.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def images(count: int) -> Any:
        return rng.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8)

    def labels(count: int) -> Any:
        return (np.arange(count) % 10 + 1).astype(np.uint8)

    images(LABELLED).tofile(folder / "train_X.bin")
    labels(LABELLED).tofile(folder / "train_y.bin")
    images(UNLABELLED).tofile(folder / "unlabeled_X.bin")
    images(TESTS).tofile(folder / "test_X.bin")
    labels(TESTS).tofile(folder / "test_y.bin")
    names = [f"class {i}" for i in range(10)]
    (folder / "class_names.txt").write_text("\n".join(names) + "\n")
    return root


@pytest.fixture
def stl10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # the files are not the published ones, and nothing is downloaded in a test
    monkeypatch.setattr(STL10, "_check_integrity", lambda self: True)
    return write_stl10(tmp_path / "stl10")


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["variant=null", "variant=fast", "method_kwargs=simclr"])
def test_the_stl10_files_run_to_their_end(choice: str, stl10: Path, tmp_path: Path) -> None:
    overrides = [
        choice,
        f"data.train_path={stl10}",
        f"data.val_path={stl10}",
        "data.num_workers=0",
        "optimizer.batch_size=12",
        "max_epochs=2",
        f"checkpoint.dir={tmp_path / 'runs'}",
        "accelerator=cpu",
        "precision=32",
        "augmentations.0.crop_size=32",
        "+log_every_n_steps=1",
        "+enable_progress_bar=False",
        "++backbone.kwargs={}",
    ]
    if "simclr" not in choice:
        overrides += [f"method_kwargs.{key}={value}" for key, value in SMALL_HEADS.items()]
    result = pretrain_run(compose_config("stl10", "metamask", overrides))
    rows = read_metrics(result.folder)
    assert result.checkpoint is not None and result.checkpoint.name.endswith("ep=1.ckpt")
    knn = [float(row["val_knn_acc1"]) for row in rows if row.get("val_knn_acc1")]
    assert len(knn) == 2 and all(0 <= value <= 100 for value in knn)
    losses = [float(v) for r in rows for k, v in r.items() if "loss" in k and v not in (None, "")]
    assert losses and np.isfinite(losses).all()


def test_unlabelled_images_are_read_with_the_labelled_ones(stl10: Path) -> None:
    overrides = ["method_kwargs=simclr", f"data.train_path={stl10}", f"data.val_path={stl10}"]
    cfg = compose_config("stl10", "metamask", overrides)
    cfg = OmegaConf.create(OmegaConf.to_container(cfg))
    dataset = pretrain_dataset(cfg)
    assert len(dataset) == LABELLED + UNLABELLED
    assert dataset.targets == [i % 10 for i in range(LABELLED)] + [-1] * UNLABELLED
    index, views, label = dataset[LABELLED]
    assert (index, label, len(views)) == (LABELLED, -1, 2)
    val = classification_dataset(cfg, "val", lambda image: torch.tensor(image.size))
    assert len(val) == TESTS and val[3][0].tolist() == [96, 96] and val[3][1] == 3


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10"])
@pytest.mark.parametrize("there", [False, True])
def test_a_folder_without_the_data_set_is_named(
    name: str, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*args: Any, **kwargs: Any) -> None:
        raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")

    kind = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10"}[name]
    monkeypatch.setattr(getattr(torchvision.datasets, kind), "download", no_network)
    folder = tmp_path / "here"
    if there:
        folder.mkdir()
    cfg = OmegaConf.create(
        {"data": {"dataset": name, "train_path": str(folder), "val_path": str(folder)}}
    )
    message = "holds no whole" if there else "no such folder"
    with pytest.raises(UserError, match=f"data.val_path={folder}: .*{name}: {message}.*urlopen"):
        classification_dataset(cfg, "val", lambda image: image)
