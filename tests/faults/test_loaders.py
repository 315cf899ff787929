"""Loaders in trouble: a worker that is killed, images of mixed sizes."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from runs import image_loader, pretrain_config

from metamask_solo.data.loaders import plain_loader
from metamask_solo.errors import UserError
from metamask_solo.evaluation.features import extract_features
from metamask_solo.training.pretrain import prepare_pretraining
from metamask_solo.training.trainer import fit


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
    cfg = pretrain_config(images, tmp_path / "runs", data__num_workers=1)
    model, cfg, train_loader, val_loader = prepare_pretraining(cfg)
    train_loader.dataset.transform = Killed()
    with pytest.raises(UserError, match=r"data.num_workers: a process that reads images was ended"):
        fit(model, cfg, train_loader, val_loader, "metamask")


def test_a_process_ends_though_workers_are_left(images: Path) -> None:
    """As where an exception still holds the loader; Python ends workers by SIGTERM, and waits."""
    code = f"""
        import sys, pathlib, runs
        loader = runs.image_loader(pathlib.Path({str(images / "val")!r}), num_workers=1)
        sys.left = iter(loader)
        next(sys.left)
    """
    tests = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": tests}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    assert subprocess.run(command, env=environment, timeout=100).returncode == 0


def test_mixed_sizes_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for size in (8, 9):
        Image.new("RGB", (size, size)).save(tmp_path / "a" / f"{size}.png")
    with pytest.raises(UserError, match="the images of a batch have different sizes"):
        extract_features(torch.nn.Flatten(), image_loader(tmp_path))


def test_a_plain_loader_leaves_the_random_numbers_alone(images: Path) -> None:
    dataset: Any = image_loader(images / "val").dataset
    before = torch.get_rng_state()
    list(plain_loader(dataset, 4, 0))
    assert torch.equal(torch.get_rng_state(), before)
