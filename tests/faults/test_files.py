"""Full disks, folders that cannot be written to, data files that are gone or damaged."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints_of_runs import write_run
from fragile_runs import FullDisk, fragile_config, run
from omegaconf import DictConfig, OmegaConf
from runs import pretrain_config, train

from metamask_solo import atomic_files
from metamask_solo.__main__ import main
from metamask_solo.atomic_files import atomic_folder, atomic_write
from metamask_solo.checkpoints.reading import load_raw
from metamask_solo.data.datasets import Images, read_folder
from metamask_solo.errors import UserError
from metamask_solo.hosts import pl


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


@pytest.fixture
def data(images: Path, tmp_path: Path) -> Path:
    """A copy of the images that a test may damage."""
    return Path(shutil.copytree(images, tmp_path / "data"))


class AtEpoch(pl.Callback):  # type: ignore[name-defined]
    def __init__(self, epoch: int, action: Callable[[], Any]):
        self.epoch = epoch
        self.action = action

    def on_train_epoch_start(self, trainer: Any, model: Any) -> None:
        if trainer.current_epoch == self.epoch:
            self.action()


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
    if failing == "replace":
        with pytest.raises(UserError, match="No space left"), atomic_folder(tmp_path / "data"):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["run.ckpt"]


@pytest.mark.parametrize("error", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written_to(
    error: int,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Root may write anywhere, so the refusal is acted."""
    allowed = Path.mkdir

    def mkdir(self: Path, *args: Any, **kwargs: Any) -> None:
        if self.is_relative_to(tmp_path / "readonly"):
            raise OSError(error, os.strerror(error), str(self))
        allowed(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    out = tmp_path / "readonly" / "runs"
    assert pretrain(pretrain_config(images, out), tmp_path) == 2
    line = error_line(capsys)
    assert f"checkpoint.dir={out}: cannot be written ({os.strerror(error)})" in line


def test_a_path_below_a_file_is_one_line_in_every_command(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    checkpoint = str(write_run(tmp_path / "run", images))
    assert pretrain(pretrain_config(images, out), tmp_path) == 2
    assert f"checkpoint.dir={out}: cannot be written (Not a directory)" in error_line(capsys)
    for argv in (
        ["fold", checkpoint, str(out)],
        ["data", "digits", "--out", str(out)],
        ["knn", checkpoint, "--json", str(out / "knn.json")],
        ["analyze", checkpoint, "--data", str(images), "--out", str(out)],
    ):
        assert main(argv) in (1, 2), argv
        assert str(out) in error_line(capsys), argv
    assert (tmp_path / "file").read_text() == ""


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "gone": lambda path: path.unlink(),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:200]),
    "garbage": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256))),
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_image_that_cannot_be_read_is_named(damage: str, data: Path) -> None:
    dataset = Images(read_folder(data / "train", "data"), lambda image: image)
    index = len(dataset) - 2
    image, label = dataset[index]
    assert image.size == (32, 32) and label == 4
    path = Path(dataset.samples[index][0])
    DAMAGES[damage](path)
    with pytest.raises(UserError, match=f"{path}: cannot be read") as caught:
        dataset[index]
    assert "\n" not in str(caught.value)


def test_a_data_file_that_vanishes_leaves_the_checkpoint_before(data: Path, tmp_path: Path) -> None:
    image = data / "train" / "class_3" / "1.png"
    cfg = pretrain_config(data, tmp_path / "runs", max_epochs=2)
    with pytest.raises(UserError, match=f"{image}: cannot be read"):
        train(cfg, AtEpoch(1, lambda: DAMAGES["gone"](image)))
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert load_raw(checkpoint)["epoch"] == 0


@pytest.mark.parametrize("split, workers", [("train", 2), ("val", 0)])
def test_a_damaged_image_ends_the_command_with_2(
    split: str, workers: int, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = data / split / "class_3" / "1.png"
    DAMAGES["truncated"](image)
    cfg = pretrain_config(data, tmp_path / "runs", data__num_workers=workers)
    assert pretrain(cfg, tmp_path) == 2
    assert error_line(capsys).startswith(f"metamask-solo pretrain: error: {image}: cannot be read")


def test_a_damaged_image_without_labels_is_named(data: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (data / "train").rglob("*.png"):
        path.rename(flat / f"{path.parent.name}-{path.name}")
    image = flat / "class_3-1.png"
    DAMAGES["truncated"](image)
    cfg = pretrain_config(data, tmp_path / "runs", data__no_labels=True, data__val_path=None)
    cfg.data.train_path = str(flat)
    with pytest.raises(UserError, match=f"{image}: cannot be read"):
        train(cfg)


@pytest.mark.parametrize("command", ["knn", "analyze"])
def test_a_damaged_image_is_named_by_what_reads_checkpoints(
    command: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(write_run(tmp_path / "run", data))
    image = data / "val" / "class_3" / "1.png"
    DAMAGES["truncated"](image)
    out = [] if command == "knn" else ["--out", str(tmp_path / "out")]
    assert main([command, checkpoint, "--data", str(data), *out]) == 2
    assert f"{image}: cannot be read" in error_line(capsys)
