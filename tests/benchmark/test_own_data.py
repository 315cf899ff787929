"""A benchmark on images of one's own: other augmentations, no labels, some methods alone."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import write_images

from metamask_solo.__main__ import main
from metamask_solo.benchmark.plan import read_plan
from metamask_solo.data.splitting import split_folder
from metamask_solo.errors import UserError
from metamask_solo.training.endings import scripts_folder


def test_replaced_data_and_kept_augmentations_are_told_of(
    images: Path, tmp_path: Path, benchmark_file: Callable[..., Path]
) -> None:
    other = write_images(tmp_path / "other", classes=3)
    data = {"train_path": str(other / "train"), "val_path": str(other / "val")}

    (note,) = read_plan(benchmark_file(data=data), []).notes
    assert "simclr, metamask keep the augmentations that were chosen for" in note
    assert str(images / "train") in note and "crop_size 32" in note
    assert "32 × 32 pixels" in note
    assert read_plan(benchmark_file(), []).notes == []  # the data of the methods' files


def test_the_shipped_file_of_ones_own_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "datasets" / "custom", classes=2)
    monkeypatch.chdir(tmp_path)
    small = ["overrides=[augmentations=small,backbone.stem=3x3,optimizer.batch_size=8]"]

    plan = read_plan(
        scripts_folder() / "benchmark" / "custom.yaml", ["only=[simclr,metamask]", *small]
    )
    assert {run.method for run in plan.runs} == {"simclr", "metamask"}
    assert plan.notes == []
    config = plan.runs[0].config
    assert config["backbone"]["stem"] == "3x3" and config["augmentations"][0]["crop_size"] == 32


def test_without_labels_rankme_is_compared_and_called_no_accuracy(
    images: Path,
    tmp_path: Path,
    benchmark_file: Callable[..., Path],
    capfd: pytest.CaptureFixture[str],
) -> None:
    flat = split_folder(images / "train", tmp_path / "flat", 0.2, flat=True)
    data = {"train_path": str(flat.out / "train"), "no_labels": True}
    file = benchmark_file(data=data, seeds=[0])

    assert main(["benchmark", str(file), "only=[metamask]"]) == 0, capfd.readouterr().out
    printed = capfd.readouterr().out
    assert "no accuracy" in printed and "RankMe, no mask" in printed
    assert "ercentage points" not in printed
    (result,) = (tmp_path / "out" / "runs").rglob("result.json")
    metrics = json.loads(result.read_text())["metrics"]
    assert metrics.keys() == {"rankme", "rankme_plain"}
    assert 1 < metrics["rankme_plain"] <= 16  # of sixteen images


def test_labels_that_lack_are_named(benchmark_file: Callable[..., Path], images: Path) -> None:
    data = {"train_path": str(images / "train"), "no_labels": "yes"}
    with pytest.raises(UserError, match="data.no_labels=yes: must be true or false"):
        read_plan(benchmark_file(data=data), [])
