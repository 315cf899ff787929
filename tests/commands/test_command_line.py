"""What Hydra's command line takes, and the one line for what it cannot."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torchvision
from checkpoints_of_runs import write_run

from metamask_solo.__main__ import main
from metamask_solo.benchmark.plan import read_plan
from metamask_solo.training.endings import scripts_folder

Refused = Callable[[list[str]], str]
DIGITS = str(scripts_folder() / "pretrain" / "digits")


def command(
    images: Path, *arguments: str, file: str = "metamask", folder: str = DIGITS
) -> list[str]:
    return [
        *("pretrain", "--config-path", folder, "--config-name", file),
        *("--cfg-check", f"data.train_path={images / 'train'}", f"data.val_path={images / 'val'}"),
        *("optimizer.batch_size=10", "data.num_workers=0", "knn_eval.k=3"),
        *arguments,
    ]


@pytest.mark.parametrize(
    "override, line",
    [
        ("data.train_path=/data/a=b", "quote the value: 'data.train_path=\"/data/a=b\"'"),
        ("name=it's", """quote the value: 'name="it'"'"'s"'"""),
        ("augmentations.crop_size=32", "write augmentations.0.KEY=VALUE"),
        ("augmentations.rrc.crop_min_scale=0.1", "write augmentations.0.KEY=VALUE"),
        ("augmentations=null", "config: Config group override must be a string or a list"),
        ("max_epochs", "max_epochs: must be KEY=VALUE"),
        ("resume_from_checkpoint=no.ckpt", "no.ckpt: no such"),
        (
            "callbacks=[{_target_: nowhere.Callback}]",
            "nowhere.Callback': .*No module named 'nowhere'",
        ),
        (
            "data.train_path=${oc.env:NO_SUCH_PLACE}/train",
            "data.train_path: .*'NO_SUCH_PLACE' not found",
        ),
        ("max_epoch=3", "max_epoch: unknown setting; did you mean max_epochs?"),
        ("+optimizer.lrr=1", "optimizer.lrr: unknown setting; did you mean optimizer.lr?"),
        ("+method_kwargs.temprature=0.5", "did you mean method_kwargs.temperature?"),
        ("+logger=False", "logger=false: the command sets it itself"),
        ("hydra.job.chdir=True", "hydra.job.chdir=True: not supported"),
        ("hydra/launcher=nowhere", "Could not find 'hydra/launcher/nowhere'"),
        ("hydra/hydra_logging=no", "in 'hydra/hydra_logging': default; disabled; .*none$"),
    ],
)
def test_what_cannot_work_is_one_line(
    override: str,
    line: str,
    images: Path,
    tmp_path: Path,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert re.search(line.replace("?", r"\?"), refused(command(images, override)))
    assert os.getcwd() == str(tmp_path)


def test_a_wrong_job_of_a_checked_sweep_is_an_error(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for launcher in ("basic", "joblib"):
        sweep = ["-m", f"hydra/launcher={launcher}", "max_epochs=0,1"]
        assert main(command(images, *sweep)) == 2
        assert "error: max_epochs=0: " in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_read_is_one_line(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Refused,
) -> None:
    (tmp_path / "latin.yaml").write_bytes("name: Größe\n".encode("latin-1"))
    (tmp_path / "odd.yaml").write_text("name: {a\n")
    assert "UTF-8" in refused(command(images, file="latin", folder=str(tmp_path)))
    assert "odd.yaml" in refused(command(images, file="odd", folder=str(tmp_path)))
    assert "no such folder" in refused(command(images, folder=str(tmp_path / "nowhere")))
    monkeypatch.chdir(tmp_path)
    packaged = refused(command(images, folder="scripts/pretrain/digits"))
    assert "no such folder; the package has pkg://metamask_solo.scripts.pretrain.digits" in packaged
    assert "nothing" in refused(command(images, file="nothing"))
    assert "--config-name: missing" in refused(["pretrain", "--config-path", DIGITS])


@pytest.mark.parametrize(
    "overrides",
    [
        # without a +, although the file lacks them
        ("checkpoint.keep_prev=True", "wandb.entity=somebody", "max_steps=7", "fold_at_end=False"),
        ("max_time.hours=3", "gradient_clip_val=1.0", "performance.disable_channel_last=True"),
        ("backbone.kwargs.zero_init_residual=True", "optimizer.kwargs.nesterov=True"),
        ("+root=/somewhere", "checkpoint.dir=${root}/runs"),
        ("+check_val_every_n_epoch=null", "+val_check_interval=1", "knn_eval.enabled=False"),
        ("augmentations.0.crop_size=28", "data.persistent_workers=False"),
        ("backbone={kwargs:{zero_init_residual:true}}",),  # beside the name in the file
        ("seed=0,1", "-m", "optimizer.lr=0.1"),
    ],
)
def test_what_the_documentation_names_works_and_writes_nothing(
    overrides: tuple[str, ...],
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command(images, *overrides)) == 0
    assert capfd.readouterr().out.count("ok: ") == (2 if "-m" in overrides else 1)
    assert not list(tmp_path.iterdir())


def test_a_check_downloads_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def download(*args: object, **kwargs: object) -> None:
        raise AssertionError

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", download)
    monkeypatch.chdir(tmp_path)
    folder = str(scripts_folder() / "pretrain" / "cifar")
    argv = ["--config-path", folder, "--config-name", "metamask.yaml", "--cfg-check"]
    assert main(["pretrain", *argv, "accelerator=cpu", "precision=32", "devices=1"]) == 0
    assert "ok: " in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_a_tilde_is_the_home_folder_in_every_command(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    shutil.copytree(images, home / "data")
    write_run(home / "run", images, "simclr")
    (home / "run" / "metrics.csv").write_text("epoch,step,train_loss_epoch\n0,1,2.0\n1,2,1.0\n")
    (home / "digits").symlink_to(DIGITS)
    shutil.copy(scripts_folder() / "benchmark" / "custom.yaml", home / "bench.yaml")
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    small = ["--num-workers=0", "--data=~/data"]
    assert main(["knn", "~/run", *small, "--k=3", "--json=~/knn.json"]) == 0
    assert main(["embed", "~/run", *small, "--out=~/features.npy"]) == 0
    assert main(["fold", "--timm", "~/run", "~/exported/"]) == 0
    assert main(["plot", "~/run", "--out=~/plot.png"]) == 0
    assert main(["data", "split", "~/data/train", "--val=0.5", "--out=~/split"]) == 0
    paths = ["data.train_path=~/data/train", "data.val_path=~/data/val", "checkpoint.dir=~/runs"]
    checked = ["--config-path=~/digits", "--config-name=metamask", "--cfg-check", *paths]
    assert main(["pretrain", *checked, "optimizer.batch_size=10"]) == 0
    keys = ["out=~/out", "data={train_path: ~/data/train, val_path: ~/data/val}", "rows=~/rows.csv"]
    assert main(["benchmark", "~/bench.yaml", "--tables-only", "data=~/data", *keys[::2]]) == 1
    plan = read_plan("~/bench.yaml", keys)
    assert plan.out == home / "out" and plan.file.rows_file == home / "rows.csv"
    assert plan.file.data.train_path == f"{home}/data/train"  # type: ignore[union-attr]
    assert not list(here.iterdir())
    made = ("knn.json", "features.npy", "exported", "plot.png", "split")
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
