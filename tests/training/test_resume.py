"""How a run ends, and how it goes on: as if it had never been stopped, and only as the same run."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from runs import pretrain_config, train, write_images

from metamask_solo.checkpoints.reading import load_raw, read_checkpoint
from metamask_solo.errors import RunStopped, UserError
from metamask_solo.hosts import pl
from metamask_solo.training.linear import prepare_probe
from metamask_solo.training.pretrain import prepare_pretraining
from metamask_solo.training.resume import (
    FINISHED,
    LOCK,
    checkpoint_to_resume,
    finished_run,
    read_metrics,
    running,
)
from metamask_solo.training.trainer import fit

pytestmark = pytest.mark.resume


class At(pl.Callback):  # type: ignore[name-defined]
    """Does something with the trainer before a step, counted from 0."""

    def __init__(self, step: int, do: Any):
        self.step, self.do = step, do

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.do(trainer)


def crash(trainer: Any) -> None:
    raise InterruptedError


def terminate(trainer: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def config(images: Path, out: Path, method: str = "simclr", **overrides: Any) -> Any:
    """Three epochs of two steps that go on by themselves."""
    settings = {"max_epochs": 3, "auto_resume__enabled": True, "optimizer__lr": 1.0, **overrides}
    cfg = pretrain_config(images, out, method, **settings)
    cfg.scheduler = {"name": "warmup_cosine", "warmup_epochs": 1}
    return cfg


# after an epoch, and within one
@pytest.mark.parametrize(
    "at, stop, error, workers, max_steps",
    [
        (8, crash, InterruptedError, 2, -1),
        (8, crash, InterruptedError, 0, 12),
        (5, terminate, RunStopped, 0, -1),
    ],
)
def test_a_stopped_run_ends_as_a_whole_one(
    at: int, stop: Any, error: Any, workers: int, max_steps: int, images: Path, tmp_path: Path
) -> None:
    def cfg(name: str) -> Any:
        made = config(images, tmp_path / name, "metamask", data__num_workers=workers)
        made.max_steps, made.optimizer.batch_size = max_steps, 5  # four steps an epoch
        made.method_kwargs.mask = {"optimizer": "adam", "lr": 0.1, "schedule": "cosine"}
        made.knn_eval = {"enabled": True, "k": 3, "distance_func": "cosine"}
        return made

    whole, whole_fit = train(cfg("whole"))
    with pytest.raises(error):
        train(cfg("parts"), At(at, stop))
    resumed, resumed_fit = train(cfg("parts"))

    assert resumed.trainer.global_step == whole.trainer.global_step == 12
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    a, b = (read_checkpoint(f.checkpoint).raw["metamask"] for f in (whole_fit, resumed_fit))
    masks = [
        dict(zip(m["history"]["step"].tolist(), m["history"]["mask"], strict=True)) for m in (a, b)
    ]
    assert all(torch.equal(mask, masks[1][step]) for step, mask in masks[0].items())
    states = [raw["mask_optimizer"]["optimizer"]["state"][0] for raw in (a, b)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert a["mask_optimizer"]["updates"] == b["mask_optimizer"]["updates"] == 12
    # one folder, and metrics without gap or repetition
    assert len(list((tmp_path / "parts" / "metamask").iterdir())) == 1
    one, two = (read_metrics(f.folder) for f in (whole_fit, resumed_fit))
    validated = ["step", "val_loss", "val_knn_acc1"]
    assert one[validated].equals(two[validated]) and len(one.dropna(subset="val_loss")) == 3


def test_a_damaged_checkpoint_is_named_and_skipped(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def cfg() -> Any:
        return config(images, tmp_path, checkpoint__keep_prev=True)

    with pytest.raises(InterruptedError):
        train(cfg(), At(4, crash))
    newest, older = sorted(tmp_path.rglob("*.ckpt"), key=lambda p: -p.stat().st_mtime)
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    model, _ = train(cfg())
    printed = capsys.readouterr().out
    assert f"skipped: {newest}" in printed and f"resuming from {older}" in printed
    assert model.trainer.global_step == 6


@pytest.fixture(scope="module")
def stopped(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs with one in it that was stopped after an epoch."""
    out = tmp_path_factory.mktemp("stopped")
    with pytest.raises(InterruptedError):
        train(config(images, out), At(2, crash))
    assert not list(out.rglob(LOCK))
    return out


def resumed(images: Path, out: Path, **overrides: Any) -> Path | None:
    cfg = prepare_pretraining(config(images, out, **overrides))[1]
    return checkpoint_to_resume(cfg, out / "simclr")


def test_where_and_how_to_log_makes_no_other_run(stopped: Path, images: Path) -> None:
    indifferent = {
        **{"checkpoint__frequency": 7, "checkpoint__keep_prev": True, "wandb__project": "b"},
        **{"enable_progress_bar": True, "log_every_n_steps": 3, "fold_at_end": False},
        **{"data__num_workers": 1, "name": "b", "auto_resume__max_hours": 1},
    }
    (checkpoint,) = stopped.rglob("*.ckpt")
    assert resumed(images, stopped, **indifferent) == checkpoint


@pytest.mark.parametrize(
    "key, value",
    [
        ("data__val_path", "train"),
        ("precision", "bf16-mixed"),
        ("gradient_clip_val", 1.0),
        ("accumulate_grad_batches", 2),
        ("max_steps", 3),
        ("limit_train_batches", 1),
        ("seed", 2),
        ("knn_eval__enabled", True),
        ("deterministic", True),
        ("strategy", "ddp"),
        ("augmentations__0__crop_size", 28),
        ("augmentations__0__rrc__crop_min_scale", 0.4),
    ],
)
def test_what_decides_the_result_makes_another_run(
    key: str, value: Any, stopped: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = str(images / value) if value == "train" else value
    assert resumed(images, stopped, **{key: value}) is None
    assert "is another run" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["size", "name", "class"])
def test_other_images_in_the_same_folder_are_another_run(
    change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_images(tmp_path / "data", classes=3)
    with pytest.raises(InterruptedError):
        train(config(data, tmp_path), At(1, crash))
    image = sorted((data / "train").rglob("*.png"))[0]
    if change == "size":
        with image.open("ab") as file:
            file.write(b"\0")
    elif change == "name":
        image.rename(image.with_name("b.png"))
    else:
        image.rename(sorted((data / "train").iterdir())[1] / "b.png")
    assert resumed(data, tmp_path) is None
    assert "is another run, started_from.images differs" in capsys.readouterr().out


def test_a_run_that_is_still_going_is_not_entered(stopped: Path, images: Path) -> None:
    (args,) = stopped.rglob("args.json")
    (checkpoint,) = args.parent.glob("*.ckpt")
    with running(args.parent):
        with pytest.raises(UserError, match="still going.*auto_resume.enabled=False"):
            train(config(images, stopped))
        cfg = config(images, stopped, auto_resume__enabled=False)
        cfg.resume_from_checkpoint = str(checkpoint)
        with pytest.raises(UserError, match="still going"):
            train(cfg)
    (args.parent / LOCK).touch()  # as a killed process leaves it
    assert resumed(images, stopped) == checkpoint


def test_a_run_holds_its_lock_and_is_known_when_it_is_finished(
    images: Path, tmp_path: Path
) -> None:
    def enter(trainer: Any) -> None:
        with pytest.raises(UserError, match="still going"):
            resumed(images, tmp_path)
        trainer.strategy.entered = True

    model, first = train(config(images, tmp_path), At(3, enter))
    assert model.trainer.strategy.entered
    assert not (first.folder / LOCK).exists() and (first.folder / FINISHED).exists()
    same = finished_run(prepare_pretraining(config(images, tmp_path))[1], "simclr")
    assert same is not None and same.folder == first.folder
    _, second = train(config(images, tmp_path))  # a finished run is not continued
    assert second.folder != first.folder


def test_a_run_from_a_named_checkpoint_goes_on_where_it_was_stopped(
    images: Path, tmp_path: Path
) -> None:
    def further() -> Any:
        cfg = config(images, tmp_path, max_epochs=4)
        cfg.scheduler = {"name": "none"}
        return cfg

    first = further()
    first.max_epochs, first.checkpoint.dir = 1, str(tmp_path / "first")
    _, first = train(first)
    steps: list[int] = []

    def run(*callbacks: Any) -> None:
        cfg = further()
        cfg.resume_from_checkpoint = str(first.folder)  # a run's folder, too
        train(cfg, *callbacks)

    with pytest.raises(InterruptedError):
        run(At(6, crash))
    run(*(At(step, lambda trainer: steps.append(trainer.global_step)) for step in range(8)))
    assert steps == [6, 7]  # the epochs before were there
    (folder,) = (tmp_path / "simclr").iterdir()
    args = json.loads((folder / "args.json").read_text())
    assert args["started_from"].keys() == {"images", "resume_from_checkpoint"}
    assert first.checkpoint.is_file()


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of metamask on a cosine that ended at 0: its last checkpoint."""
    out = tmp_path_factory.mktemp("finished")
    return Path(train(config(images, out, "metamask"))[1].checkpoint)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("optimizer.name", "adam", "optimizer.name=adam: .*run with sgd"),
        ("max_epochs", 1, "max_epochs=1: .* has 3 epochs behind it"),
        ("max_epochs", 4, "max_epochs=4: .*run with 3"),
        ("method_kwargs.mask", {"kind": "linear"}, "mask.kind=linear"),
    ],
)
def test_what_cannot_go_on_is_refused(
    key: str, value: Any, message: str, finished: Path, images: Path, tmp_path: Path
) -> None:
    cfg = config(images, tmp_path, "metamask", resume_from_checkpoint=str(finished))
    OmegaConf.update(cfg, key, value)
    with pytest.raises(UserError, match=message):
        train(cfg)
    assert not list(tmp_path.rglob("args.json"))


def test_a_probe_of_another_checkpoint_is_another_run(
    finished: Path, images: Path, tmp_path: Path
) -> None:
    def probe(checkpoint: Path, *callbacks: Any, **overrides: Any) -> Any:
        cfg = config(images, tmp_path, pretrained_feature_extractor=str(checkpoint), **overrides)
        del cfg.augmentations, cfg.method, cfg.method_kwargs, cfg.optimizer.classifier_lr
        cfg.data.augmentations = {"crop_size": 32}
        model, cfg, train_loader, val_loader = prepare_probe(cfg)
        return fit(model, cfg, train_loader, val_loader, "linear", callbacks)

    path = Path(shutil.copytree(finished.parent, tmp_path / "run"), finished.name)
    with pytest.raises(InterruptedError):
        probe(path, At(2, crash))
    (folder,) = (tmp_path / "linear").iterdir()
    assert probe(path, masked=False).folder != folder  # without a mask it has other keys
    # the same content under another name is the same start
    moved = Path(shutil.copytree(path.parent, tmp_path / "moved"), path.name)
    content = torch.load(path, weights_only=True)
    content["state_dict"]["mask.logits"] += 1.0
    torch.save(content, path)
    assert probe(path.parent).folder != folder  # the changed file in a run's folder
    assert probe(moved).folder == folder


def steps_in(checkpoint: Path) -> int:
    return int(load_raw(checkpoint)["global_step"])


@pytest.mark.parametrize("steps", [3, 4])
def test_max_steps_keeps_the_last_state_and_more_steps_go_on_from_it(
    steps: int, images: Path, tmp_path: Path
) -> None:
    def cfg(name: str, most: int, **overrides: Any) -> Any:
        made = config(images, tmp_path / name, checkpoint__frequency=100, **overrides)
        made.scheduler, made.max_steps = {"name": "none"}, most
        return made

    _, first = train(cfg("first", steps))
    assert steps_in(first.checkpoint) == steps and len(list(first.folder.glob("*.ckpt"))) == 1
    # an epoch that ended early is over
    model, _ = train(cfg("on", 6, resume_from_checkpoint=str(first.checkpoint)))
    assert model.trainer.global_step == steps + 2


def test_max_time_or_a_callback_ends_a_run_and_keeps_its_last_state(
    images: Path, tmp_path: Path
) -> None:
    limited = config(images, tmp_path / "time", max_time="00:00:00:01", checkpoint__frequency=100)
    _, result = train(limited, At(2, lambda _: time.sleep(1.1)))
    assert 1 <= steps_in(result.checkpoint) <= 3 and (result.folder / FINISHED).is_file()

    def end(trainer: Any) -> None:
        trainer.should_stop = True

    _, result = train(config(images, tmp_path / "callback", checkpoint__frequency=100), At(2, end))
    assert steps_in(result.checkpoint) == 3


def test_ctrl_c_saves_after_the_step_and_a_second_one_waits_for_nothing(
    images: Path, tmp_path: Path
) -> None:
    def interrupt(trainer: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    def twice(trainer: Any) -> None:
        interrupt(trainer)
        interrupt(trainer)

    before = signal.getsignal(signal.SIGINT)
    cfg = config(images, tmp_path, checkpoint__frequency=100)
    with pytest.raises(RunStopped, match="SIGINT.*after step 3.*the same command") as caught:
        train(cfg, At(2, interrupt))
    assert caught.value.exit_code == 130 and signal.getsignal(signal.SIGINT) == before
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert steps_in(checkpoint) == 3
    with pytest.raises(KeyboardInterrupt):
        train(config(images, tmp_path, checkpoint__frequency=100), At(4, twice))
    assert list(tmp_path.rglob("*.ckpt")) == [checkpoint] and not list(tmp_path.rglob(FINISHED))


def test_a_signal_after_the_last_step_is_reported_when_all_is_written(
    images: Path, tmp_path: Path
) -> None:
    class Late(pl.Callback):  # type: ignore[name-defined]
        def on_train_end(self, trainer: Any, model: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    _, result = train(config(images, tmp_path, max_epochs=1), Late())
    assert result.stopped is not None and result.stopped.exit_code == 143
    assert json.loads((result.folder / FINISHED).read_text())["metrics"]
