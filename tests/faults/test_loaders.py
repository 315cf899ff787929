"""Loaders in trouble: a worker that is killed, images of mixed sizes, names that are no UTF-8."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints_of_runs import write_run
from omegaconf import ListConfig
from runs import image_loader, pretrain_config, write_images

from metamask_solo.__main__ import main
from metamask_solo.data.loaders import plain_loader
from metamask_solo.errors import UserError
from metamask_solo.evaluation.features import extract_features
from metamask_solo.training.pretrain import prepare_pretraining
from metamask_solo.training.trainer import fit

pytestmark = pytest.mark.faults


class Killed:
    """A transform that the system ends, as it does for want of memory."""

    def __call__(self, image: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_line(images: Path, tmp_path: Path) -> None:
    loader = image_loader(images / "val", num_workers=1)
    dataset: Any = loader.dataset
    dataset.transform = Killed()
    with pytest.raises(UserError, match=r"data.num_workers: a process that reads images was ended"):
        extract_features(torch.nn.Flatten(), loader)
    cfg = pretrain_config(images, tmp_path / "runs", method="simclr", data__num_workers=1)
    cfg.method_kwargs = {"proj_hidden_dim": 16, "proj_output_dim": 16, "temperature": 0.2}
    model, cfg, train_loader, val_loader = prepare_pretraining(cfg)
    train_loader.dataset.transform = Killed()
    with pytest.raises(UserError, match=r"data.num_workers: a process that reads images was ended"):
        fit(model, cfg, train_loader, val_loader, "simclr")


def test_mixed_sizes_are_one_line(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "a").mkdir()
    for size in (8, 9):
        Image.new("RGB", (size, size)).save(tmp_path / "a" / f"{size}.png")
    with pytest.raises(UserError, match="the images of a batch have different sizes"):
        extract_features(torch.nn.Flatten(), image_loader(tmp_path))


def test_names_that_are_no_utf8_in_every_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_images(tmp_path / "data", classes=2, train=12, val=12)
    for split in ("train", "val"):
        odd = os.fsencode(data / split) + b"/caf\xe9"
        try:
            os.mkdir(odd)
        except OSError:
            pytest.skip("this file system takes UTF-8 only")
        for i in range(12):
            name = os.fsdecode(odd + b"/\xff" + str(i).encode() + b".png")
            shutil.copy(data / split / "class_0" / f"{i}.png", name)
    checkpoint = str(write_run(tmp_path / "run", data))
    plain = ["--num-workers", "0"]
    assert main(["knn", checkpoint, *plain, "--k", "3", "--json", str(tmp_path / "a.json")]) == 0
    out = tmp_path / "umap.png"
    assert main(["umap", checkpoint, *plain, "--out", str(out)]) == 0 and out.is_file()
    out = tmp_path / "analysis"
    arguments = ["--data", str(data), "--out", str(out), "--draws", "2", *plain]
    assert main(["analyze", checkpoint, *arguments]) == 0
    damaged = os.fsencode(data / "val") + b"/caf\xe9/\xff3.png"
    Path(os.fsdecode(damaged)).write_bytes(b"")
    capsys.readouterr()
    assert main(["knn", checkpoint, *plain]) == 2
    line = capsys.readouterr().err
    assert "caf\ufffd/\ufffd3.png: cannot be read" in line
    line.encode()


def test_mean_and_deviation_are_plain_numbers(images: Path, tmp_path: Path) -> None:
    """OmegaConf's lists give the same numbers, ten times as slowly."""
    cfg = pretrain_config(images, tmp_path, method="simclr")
    cfg.method_kwargs = {"proj_hidden_dim": 16, "proj_output_dim": 16, "temperature": 0.2}
    cfg.augmentations[0].update({"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]})
    _, _, loader, validation = prepare_pretraining(cfg)
    found = []

    def look(part: Any) -> None:
        if hasattr(part, "mean") and hasattr(part, "std"):
            assert not isinstance(part.mean, ListConfig) and not isinstance(part.std, ListConfig)
            found.append(list(part.mean))
        for name in ("transform", "transforms"):
            inner = getattr(part, name, None)
            for step in inner if isinstance(inner, list) else [inner] if inner is not None else []:
                look(step)

    look(loader.dataset.transform)
    look(validation.dataset.transform)
    assert found == [[0.1, 0.2, 0.3]] * 2


def test_a_plain_loader_leaves_the_random_numbers_alone(images: Path) -> None:
    dataset: Any = image_loader(images / "val").dataset
    before = torch.get_rng_state()
    list(plain_loader(dataset, 4, 0))
    assert torch.equal(torch.get_rng_state(), before)
