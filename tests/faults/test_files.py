"""Full disks, folders that cannot be written to, damaged images, workers that are killed."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints_of_runs import write_run
from fragile_runs import FullDisk, fragile_config, run
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from runs import image_loader, pretrain_config

from metamask_solo import atomic_files
from metamask_solo.__main__ import main
from metamask_solo.atomic_files import atomic_write
from metamask_solo.checkpoints.reading import load_raw
from metamask_solo.errors import UserError
from metamask_solo.evaluation.features import extract_features
from metamask_solo.training.pretrain import prepare_pretraining
from metamask_solo.training.trainer import fit

pytestmark = pytest.mark.usefixtures("small_backbone")


def pretrain(cfg: DictConfig, folder: Path) -> int:
    """The command on a config, in this process; returns its exit code."""
    (folder / "run.yaml").write_text(OmegaConf.to_yaml(cfg))
    argv = ["pretrain", "--config-path", str(folder), "--config-name", "run.yaml"]
    quiet = ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=disabled"]
    return main([*argv, *quiet])


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    (line,) = [line for line in errors.splitlines() if line.startswith("metamask-solo ")]
    return line


def test_a_full_disk_leaves_the_checkpoint_before(images: Path, tmp_path: Path) -> None:
    cfg = fragile_config(images, tmp_path / "runs")
    assert run(tmp_path / "log.txt", cfg, FullDisk(1)) == 2
    (checkpoint,) = (tmp_path / "runs").rglob("*.ckpt")
    assert load_raw(checkpoint)["epoch"] == 0
    assert not list(checkpoint.parent.glob(".*"))
    last_line = (tmp_path / "log.txt").read_text().splitlines()[-1]
    assert str(checkpoint).replace("ep=0", "ep=1") in last_line
    assert "cannot be written" in last_line


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_full_disk_at_any_moment_of_writing(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = tmp_path / "run.ckpt"
    target.write_text("before")
    monkeypatch.setattr(atomic_files.os, failing, full)
    message = rf"{target}: cannot be written \(No space left on device\)"
    with pytest.raises(UserError, match=message), atomic_write(target) as path:
        torch.save({"a": torch.ones(3)}, path)
    assert target.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["run.ckpt"]


def test_a_path_below_a_file_is_one_line(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    checkpoint = str(write_run(tmp_path / "run", images))
    assert pretrain(pretrain_config(images, out), tmp_path) == 2
    assert f"checkpoint.dir={out}: cannot be written (Not a directory)" in error_line(capsys)
    for argv in (
        ["data", "digits", "--out", str(out)],
        ["knn", checkpoint, "--json", str(out / "knn.json")],
    ):
        assert main(argv) in (1, 2), argv
        assert str(out) in error_line(capsys), argv
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize("workers", [2, 0])
def test_a_damaged_image_ends_a_command_with_2(
    workers: int, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(shutil.copytree(images, tmp_path / "data"))
    image = data / ("train" if workers else "val") / "class_3" / "1.png"
    image.write_bytes(image.read_bytes()[:200])
    cfg = pretrain_config(data, tmp_path / "runs", data__num_workers=workers)
    assert pretrain(cfg, tmp_path) == 2
    assert error_line(capsys).startswith(f"metamask-solo pretrain: error: {image}: cannot be read")


class Killed:
    """A transform that the system ends, as it does for want of memory."""

    def __call__(self, image: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_line(images: Path, tmp_path: Path) -> None:
    words = "^data.num_workers: a process that reads images was killed"
    loader = image_loader(images / "val", num_workers=1)
    loader.dataset.transform = Killed()
    with pytest.raises(UserError, match=words):
        extract_features(torch.nn.Flatten(), loader)
    cfg = pretrain_config(images, tmp_path / "runs", data__num_workers=1)
    model, cfg, train_loader, val_loader = prepare_pretraining(cfg)
    train_loader.dataset.transform = Killed()
    with pytest.raises(UserError, match=words):
        fit(model, cfg, train_loader, val_loader, "metamask")


def test_a_process_ends_though_workers_are_left(images: Path) -> None:
    """As where an exception still holds the loader; Python ends workers by SIGTERM, and waits."""
    code = f"""
        import sys, pathlib, runs
        loader = runs.image_loader(pathlib.Path({str(images / "val")!r}), num_workers=1)
        sys.left = iter(loader)
        next(sys.left)
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    assert subprocess.run(command, env=environment, timeout=100).returncode == 0


def test_mixed_sizes_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for size in (8, 9):
        Image.new("RGB", (size, size)).save(tmp_path / "a" / f"{size}.png")
    with pytest.raises(UserError, match="the images of a batch have different sizes"):
        extract_features(torch.nn.Flatten(), image_loader(tmp_path))
