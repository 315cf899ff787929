"""What Hydra's command line takes, and the one line for what it cannot."""

import subprocess
import sys
from pathlib import Path

import pytest
from runs import pretrain_config

from metamask_solo.__main__ import main
from metamask_solo.errors import UserError
from metamask_solo.training.config_checks import check_linear_config, check_pretrain_config
from metamask_solo.training.config_keys import NOT_FROM_A_CONFIG, trainer_arguments
from metamask_solo.training.endings import scripts_folder
from metamask_solo.training.overrides import add_known_keys, composed_config
from metamask_solo.training.pretraining import check_run
from metamask_solo.validation import unknown

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


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line that a command ends with."""
    code = main(arguments)
    printed = capsys.readouterr()
    assert code == 2, printed
    lines = [line for line in printed.err.splitlines() if not line.startswith("INFO")]
    assert len(lines) == 1 and "Error executing" not in printed.err + printed.out, printed.err
    return lines[0].removeprefix("metamask-solo pretrain: error: ")


@pytest.mark.parametrize(
    "override, line",
    [
        ("augmentations.crop_size=32", "write augmentations.0.crop_size=32"),
        ("data.train_path=/data/a=b", "quote it: 'data.train_path=\"/data/a=b\"'"),
        ("name=a{b", "quote it: 'name=\"a{b\"'"),
        ("name=it's", """quote it: 'name="it'"'"'s"'"""),
        ("data.train_path=${oc.env:NO_SUCH_PLACE}/train", "NO_SUCH_PLACE is not set"),
        ("data.train_path=${oc.env:NO_SUCH_PLACE}/train", "data.train_path="),
        ("name=${oc.env:NO_SUCH_PLACE}", "name="),
        ("+optimizer.lrr=1", "did you mean optimizer.lr?"),
        ("+learning_rate=1", "learning_rate: unknown setting; did you mean optimizer.lr?"),
        ("+max_epoch=3", "did you mean max_epochs?"),
        ("max_epoch=3", "max_epoch: unknown setting; did you mean max_epochs?"),
        ("optimizer.momentum=0.9", "optimizer.momentum: unknown setting"),
        ("+optimizer.brightness=3", "did you mean augmentations.0.color_jitter.brightness?"),
        ("+checkpoint.zoom=3", "zoom: unknown setting; allowed are enabled, dir, frequency, kee"),
        ("+batch_size=64", "did you mean optimizer.batch_size?"),
        ("+augmentations.0.grayscale.p=0.5", "augmentations.0.grayscale.p: unknown setting"),
        ("+augmentations.0.colour_jitter.prob=0.5", "did you mean augmentations.0.color_jitter?"),
        ("+method_kwargs.temprature=0.5", "temprature"),
        ("+auto_umap.enabled=True", "`metamask-solo umap` draws a run's features"),
        ("+logger=False", "wandb.enabled=True"),
        ("+max_time=12h", "must be a time above 0, such as 00:12:00:00"),
        ("+max_steps=0", "at least 1 or -1"),
        ("+check_val_every_n_epoch=null", "val_check_interval"),
        ("+profiler=quick", "simple, advanced, pytorch"),
        ("precision=8", "trainer: "),
    ],
)
def test_what_cannot_work_is_one_line(
    override: str, line: str, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert line in refused(capsys, command(images, override))


def test_a_baselines_own_settings_are_known(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(capsys, command(images, "+method_kwargs.temprature=0.5", file="simclr"))
    assert (
        told == "method_kwargs.temprature: unknown setting; did you mean method_kwargs.temperature?"
    )


@pytest.mark.parametrize(
    "overrides",
    [
        # without a +, although the file lacks them
        ("checkpoint.keep_prev=True", "wandb.entity=somebody", "max_steps=7", "fold_at_end=False"),
        ("max_time.hours=3", "gradient_clip_val=1.0", "performance.compile=True"),
        ("backbone.kwargs.zero_init_residual=True", "optimizer.kwargs.nesterov=True"),
        ("+root=/somewhere", "checkpoint.dir=${root}/runs"),
        ("+check_val_every_n_epoch=null", "+val_check_interval=1"),
        ("augmentations.0.crop_size=28", "data.persistent_workers=False"),
    ],
)
def test_what_the_documentation_names_works(
    overrides: tuple[str, ...], images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(images, *overrides)) == 0
    assert "ok: " in capsys.readouterr().out


def test_a_key_that_stands_in_the_file_stays_as_it_was_given(images: Path) -> None:
    given = ["--config-path", DIGITS, "--config-name", "metamask", "seed=1,2", "max_time=a"]
    given += ["performance.compile=True", "+max_steps=3", "hydra/launcher=basic", "-m"]
    added = add_known_keys(given, "pretrain", composed_config(given))
    changed = {new for new, old in zip(added, given, strict=True) if new != old}
    assert changed == {"++max_time=a", "++performance.compile=True"}


def test_the_home_is_found(
    images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(images.parent))
    inside = f"'~/{images.name}/train'"
    assert main(command(images, f"data.train_path={inside}")) == 0
    told = refused(capsys, command(images, "data.train_path='~/nowhere'"))
    assert f"{images.parent}/nowhere" in told


def test_a_file_that_is_not_utf8_is_one_line(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "latin.yaml").write_bytes("name: Größe\n".encode("latin-1"))
    told = refused(capsys, command(images, file="latin", folder=str(tmp_path)))
    assert "UTF-8" in told


@pytest.mark.parametrize("argument", sorted(trainer_arguments()))
def test_no_argument_of_lightnings_trainer_is_lost(argument: str, images: Path) -> None:
    """One that is not Lightning's own default either reaches the Trainer or is refused."""
    if argument not in NOT_FROM_A_CONFIG:
        return  # the tests of the trainer give each to it
    cfg = pretrain_config(images, images, **{argument: 1 if "limit" in argument else "something"})
    with pytest.raises(UserError, match=f"^{argument}=.*not from a config"):
        check_pretrain_config(cfg)


def linear_config(images: Path) -> object:
    cfg = pretrain_config(images, images)
    del cfg.augmentations, cfg.method, cfg.method_kwargs, cfg.optimizer.classifier_lr
    cfg.pretrained_feature_extractor = "some.ckpt"
    return cfg


def test_mixup_needs_pairs(images: Path) -> None:
    cfg = linear_config(images)
    cfg.mixup, cfg.optimizer.batch_size = 0.2, 7
    with pytest.raises(UserError, match="batch_size=7: must be even"):
        check_linear_config(cfg)


def test_sync_batchnorm_needs_gpus(images: Path) -> None:
    cfg = pretrain_config(images, images, sync_batchnorm=True, devices=2)
    with pytest.raises(UserError, match="sync_batchnorm=True: needs GPUs"):
        check_run(cfg)


@pytest.mark.slow
def test_an_ascii_terminal_and_a_closed_pipe_end_in_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "é").mkdir()
    run = [sys.executable, "-m", "metamask_solo"]
    ascii_only = {"PYTHONIOENCODING": "ascii", "PATH": "/usr/bin", "HOME": str(tmp_path)}
    done = subprocess.run(
        [*run, "knn", str(tmp_path / "é")], env=ascii_only, capture_output=True, text=True
    )
    assert done.returncode == 2 and "\\xe9" in done.stderr and "Traceback" not in done.stderr
    piped = subprocess.run(
        ["sh", "-c", '"$@" | true; exit 0', "sh", *run, "--help"], capture_output=True, text=True
    )
    assert piped.stderr == ""


def test_m_may_stand_between_overrides(
    images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sweep = f"hydra.sweep.dir={tmp_path}"
    assert main(command(images, "seed=0,1", "-m", sweep, "optimizer.lr=0.1")) == 0
    assert capfd.readouterr().out.count("ok: ") == 2


def test_a_mapping_may_hold_what_the_file_lacks(images: Path) -> None:
    kwargs = "method_kwargs={temperature:0.2,proj_hidden_dim:64,proj_output_dim:32}"
    assert main(command(images, kwargs, file="simclr")) == 0


def test_a_key_is_no_hint_for_itself() -> None:
    error = unknown("method_kwargs.temperature", ["method_kwargs.lamb"], elsewhere=["a.b"])
    assert "did you mean" not in str(error)
    again = unknown("a.temperature", ["a.lamb"], elsewhere=["a.temperature", "b.temperature"])
    assert "did you mean b.temperature?" in str(again)
