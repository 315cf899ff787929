"""The command line as a whole: overview, help, checks that write nothing, paths and terminals."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torchvision
from checkpoints_of_runs import write_run

import metamask_solo
from metamask_solo import commands
from metamask_solo.__main__ import main
from metamask_solo.benchmark.plan import read_plan
from metamask_solo.commands import COMMANDS
from metamask_solo.method.settings import SETTINGS
from metamask_solo.training.config import Pretraining, Probe
from metamask_solo.training.endings import scripts_folder
from metamask_solo.validation import allowed, fields

SCRIPTS = scripts_folder()


def test_every_command_is_in_the_overview(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    shared = {"__init__", "options", "hydra_help"}
    modules = {path.stem for path in Path(commands.__file__).parent.glob("*.py")} - shared
    assert {name.replace("-", "_") for name in COMMANDS} == modules
    assert all(f"  {name} " in printed for name in COMMANDS)


@pytest.mark.parametrize("command", ["pretrain", "linear"])
def test_help_has_usage_files_and_every_setting(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: metamask-solo {command} --config-path")
    settings = dict(fields(Pretraining if command == "pretrain" else Probe))
    for key, field in (settings | (SETTINGS if command == "pretrain" else {})).items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"  {key}: ")]
        assert allowed(field)[:20] in line
    for folder in (SCRIPTS / command).iterdir():
        if any(folder.glob("*.yaml")):
            assert f"  {command}/{folder.name}: " in text


def test_hydras_own_help_and_the_version(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--hydra-help"]) == 0
    assert "--multirun" in capfd.readouterr().out
    for argv in (["linear", "--version"], ["--version"]):
        assert main(argv) == 0
        line = capfd.readouterr().out
        assert line.startswith(f"metamask-solo {metamask_solo.__version__}, solo-learn ")


def test_traceback_shows_where_an_error_came_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["knn", "--traceback", "gone.ckpt"]) == 2
    printed = capsys.readouterr().err
    assert "Traceback" in printed and "reading.py" in printed


@pytest.mark.parametrize(
    "overrides",
    [
        # known keys need no +, although the file lacks them
        "checkpoint.keep_prev=True max_steps=7 max_time.hours=3 gradient_clip_val=1.0 "
        "backbone.kwargs.zero_init_residual=True optimizer.kwargs.nesterov=True "
        "augmentations.0.crop_size=28 performance.disable_channel_last=True",
        "backbone={kwargs:{zero_init_residual:true}} +check_val_every_n_epoch=null "
        "+val_check_interval=1 knn_eval.enabled=False +root=/somewhere checkpoint.dir=${root}/runs",
        "seed=0,1 -m optimizer.lr=0.1",
    ],
)
def test_a_check_takes_what_the_documentation_names_and_writes_nothing(
    overrides: str,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["pretrain", "--config-path", str(SCRIPTS / "pretrain/digits"), "--cfg-check"]
    command += ["--config-name=metamask", "optimizer.batch_size=10", "data.num_workers=0"]
    command += [f"data.train_path={images / 'train'}", f"data.val_path={images / 'val'}"]
    assert main([*command, *overrides.split()]) == 0
    assert capfd.readouterr().out.count("ok: ") == (2 if "-m" in overrides else 1)
    assert not list(tmp_path.iterdir())


def test_a_check_downloads_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def download(*args: object, **kwargs: object) -> None:
        raise AssertionError

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", download)
    monkeypatch.chdir(tmp_path)
    command = ["pretrain", "--config-path", str(SCRIPTS / "pretrain/cifar"), "--cfg-check"]
    command += ["--config-name=metamask.yaml", "accelerator=cpu", "precision=32", "devices=1"]
    assert main(command) == 0
    assert "ok: " in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_a_tilde_is_the_home_folder_in_every_command(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    shutil.copytree(images, home / "data")
    write_run(home / "run", images, "simclr")
    (home / "run/metrics.csv").write_text("epoch,step,train_loss_epoch\n0,1,2.0\n1,2,1.0\n")
    (home / "digits").symlink_to(SCRIPTS / "pretrain/digits")
    shutil.copy(SCRIPTS / "benchmark/custom.yaml", home / "bench.yaml")
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    for command in (
        "knn ~/run --num-workers=0 --data=~/data --k=3 --json=~/knn.json",
        "embed ~/run --num-workers=0 --data=~/data --out=~/features.npy",
        "fold --timm ~/run ~/exported/",
        "plot ~/run --out=~/plot.png",
        "pretrain --config-path=~/digits --config-name=metamask --cfg-check checkpoint.dir=~/runs "
        "data.train_path=~/data/train data.val_path=~/data/val optimizer.batch_size=10",
    ):
        assert main(command.split()) == 0
    keys = ["out=~/out", "rows=~/rows.csv", "data={train_path: ~/data/train, val_path: ~/data/val}"]
    plan = read_plan("~/bench.yaml", keys)
    assert plan.out == home / "out" and plan.file.rows_file == home / "rows.csv"
    assert plan.file.data.train_path == f"{home}/data/train"  # type: ignore[union-attr]
    assert not list(here.iterdir())
    made = ("knn.json", "features.npy", "exported", "plot.png")
    assert all((home / name).exists() for name in made)


def test_an_ascii_terminal_and_a_closed_pipe_end_in_no_traceback(tmp_path: Path) -> None:
    run = [sys.executable, "-m", "metamask_solo"]
    ascii_only = {"PYTHONIOENCODING": "ascii", "PATH": "/usr/bin", "HOME": str(tmp_path)}
    done = subprocess.run(
        [*run, "run", str(tmp_path / "é.py")], env=ascii_only, capture_output=True, text=True
    )
    assert done.returncode == 2 and "\\xe9" in done.stderr and "Traceback" not in done.stderr
    piped = subprocess.run(
        ["sh", "-c", '"$@" | true; exit 0', "sh", *run, "--help"], capture_output=True, text=True
    )
    assert piped.stderr == ""
