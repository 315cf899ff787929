"""How a run ends: by a limit, by Ctrl-C, and what is left of it."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from runs import pretrain_config, train

from metamask_solo.checkpoints.reading import load_raw
from metamask_solo.errors import RunStopped
from metamask_solo.hosts import pl

SIMCLR = {"proj_hidden_dim": 16, "proj_output_dim": 16, "temperature": 0.2}


def config(images: Path, out: Path, **overrides: Any) -> Any:
    """Epochs of two steps, with a checkpoint at every hundredth of them."""
    given = {"max_epochs": 6, "checkpoint__frequency": 100, "auto_resume__enabled": True}
    cfg = pretrain_config(images, out, "simclr", **{**given, **overrides})
    cfg.method_kwargs = SIMCLR
    return cfg


class At(pl.Callback):  # type: ignore[name-defined]
    """Does something in a step, counted from 1."""

    def __init__(self, step: int, do: Any):
        self.step, self.do = step, do

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step - 1:
            self.do(trainer)


def end(trainer: Any) -> None:
    trainer.should_stop = True


@pytest.mark.parametrize("steps", [5, 6])
def test_a_run_ended_by_max_steps_keeps_its_last_state(
    steps: int, images: Path, tmp_path: Path
) -> None:
    cfg = config(images, tmp_path, max_steps=steps)
    _, fit = train(cfg)
    assert load_raw(fit.checkpoint)["global_step"] == steps
    assert len(list(fit.folder.glob("*.ckpt"))) == 1
    # it ended as planned: the same command makes another run
    model, again = train(config(images, tmp_path, max_steps=steps))
    assert again.folder != fit.folder and model.trainer.global_step == steps


@pytest.mark.parametrize("left", [0, 1])
def test_more_steps_go_on_from_the_last_state(left: int, images: Path, tmp_path: Path) -> None:
    _, fit = train(config(images, tmp_path, max_steps=6 - left))
    cfg = config(images, tmp_path / "on", max_steps=8, resume_from_checkpoint=str(fit.checkpoint))
    model, _ = train(cfg)
    assert model.trainer.global_step == 8


def test_max_time_ends_a_run_and_keeps_its_last_state(images: Path, tmp_path: Path) -> None:
    def wait(trainer: Any) -> None:
        import time

        time.sleep(1.1)

    cfg = config(images, tmp_path, max_time="00:00:00:01")
    _, fit = train(cfg, At(3, wait))
    steps = load_raw(fit.checkpoint)["global_step"]
    assert 1 <= steps <= 3
    assert (fit.folder / "finished.json").is_file()


def test_a_callback_that_ends_a_run_leaves_its_last_state(images: Path, tmp_path: Path) -> None:
    _, fit = train(config(images, tmp_path), At(3, end))
    assert load_raw(fit.checkpoint)["global_step"] == 3


def test_ctrl_c_saves_after_the_step(images: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(
        RunStopped, match="stopped by SIGINT.*after step 3.*last checkpoint"
    ) as caught:
        train(config(images, tmp_path), At(3, lambda _: os.kill(os.getpid(), signal.SIGINT)))
    assert caught.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) == before
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert load_raw(checkpoint)["global_step"] == 3
    model, fit = train(config(images, tmp_path))
    assert fit.folder == checkpoint.parent and model.trainer.global_step == 12


def test_a_second_ctrl_c_waits_for_nothing(images: Path, tmp_path: Path) -> None:
    def twice(_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(config(images, tmp_path), At(3, twice))
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert load_raw(checkpoint)["global_step"] == 2  # of the first epoch
    assert not list(tmp_path.rglob("finished.json"))


def test_a_signal_after_the_last_step_is_told_when_all_is_written(
    images: Path, tmp_path: Path
) -> None:
    cfg = config(images, tmp_path, max_epochs=1)

    class Late(pl.Callback):  # type: ignore[name-defined]
        def on_train_end(self, trainer: Any, model: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    _, fit = train(cfg, Late())
    assert fit.stopped is not None and fit.stopped.exit_code == 143
    assert json.loads((fit.folder / "finished.json").read_text())["metrics"]
