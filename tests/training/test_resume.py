"""How a run ends, and as which run it goes on; that it ends as a whole one: faults/test_kill.py."""

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
from runs import pretrain_config, train

from metamask_solo.checkpoints.reading import load_raw
from metamask_solo.errors import RunStopped, UserError
from metamask_solo.hosts import pl
from metamask_solo.training.linear import prepare_probe
from metamask_solo.training.pretrain import prepare_pretraining
from metamask_solo.training.resume import (
    FINISHED,
    LOCK,
    finished_run,
    running,
    starting_point,
)
from metamask_solo.training.trainer import fit


class At(pl.Callback):  # type: ignore[name-defined]
    """Does something with the trainer before a step, counted from 0."""

    def __init__(self, step: int, do: Any):
        self.step, self.do = step, do

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.do(trainer)


def crash(trainer: Any) -> None:
    raise InterruptedError


def send(*numbers: signal.Signals) -> Any:
    return lambda _: [os.kill(os.getpid(), number) for number in numbers]


def config(images: Path, out: Path, method: str = "simclr", **overrides: Any) -> Any:
    """Three epochs of two steps that go on by themselves."""
    settings = {"max_epochs": 3, "auto_resume__enabled": True, "optimizer__lr": 1.0, **overrides}
    settings.setdefault("scheduler", {"name": "warmup_cosine", "warmup_epochs": 1})
    return pretrain_config(images, out, method, **settings)


def stop(cfg: Any, at: int, do: Any = crash, error: Any = InterruptedError) -> None:
    with pytest.raises(error):
        train(cfg, At(at, do))


def test_a_damaged_checkpoint_is_named_and_skipped(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop(config(images, tmp_path, checkpoint__keep_prev=True), 4)
    newest, older = sorted(tmp_path.rglob("*.ckpt"), key=lambda p: -p.stat().st_mtime)
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    model, _ = train(config(images, tmp_path, checkpoint__keep_prev=True))
    printed = capsys.readouterr().out
    assert f"skipped: {newest}" in printed and f"resuming from {older}" in printed
    assert model.trainer.global_step == 6


def resumed(images: Path, out: Path, **overrides: Any) -> Path | None:
    cfg = prepare_pretraining(config(images, out, **overrides))[1]
    return starting_point(cfg, out / "simclr")[0]


INDIFFERENT = {
    **{"checkpoint__frequency": 7, "checkpoint__keep_prev": True, "wandb__project": "b"},
    **{"enable_progress_bar": True, "log_every_n_steps": 3, "fold_at_end": False},
    **{"data__num_workers": 1, "name": "b", "auto_resume__max_hours": 1},
}
DECISIVE = {
    **{"precision": "bf16-mixed", "gradient_clip_val": 1.0, "accumulate_grad_batches": 2},
    **{"max_steps": 3, "limit_train_batches": 1, "seed": 2, "knn_eval__enabled": True},
    **{"deterministic": True, "strategy": "ddp", "augmentations__0__crop_size": 28},
    **{"augmentations__0__rrc__crop_min_scale": 0.4},
}


def test_the_same_run_is_known_by_what_decides_its_result(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(shutil.copytree(images, tmp_path / "data"))
    stop(config(data, tmp_path), 2)
    (checkpoint,) = tmp_path.rglob("*.ckpt")

    def another(key: str, **overrides: Any) -> None:
        assert resumed(data, tmp_path, **overrides) is None, key
        assert f"is another run, {key} differs" in capsys.readouterr().out

    for key, value in DECISIVE.items():
        another(key.replace("__", "."), **{key: value})
    another("images", data__val_path=str(data / "train"))
    image = sorted((data / "train").rglob("*.png"))[0]
    with image.open("ab") as file:
        file.write(b"\0")
    another("images")
    os.truncate(image, image.stat().st_size - 1)
    for new in (image.with_name("b.png"), sorted((data / "train").iterdir())[1] / "b.png"):
        image.rename(new)
        another("images")
        new.rename(image)
    assert resumed(data, tmp_path, **INDIFFERENT) == checkpoint
    assert not list(tmp_path.rglob(LOCK))


def test_with_other_code_of_ones_own_a_run_is_another_one(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "package_of_a_test").mkdir()
    names = ("module_of_a_test.py", "package_of_a_test/__init__.py", "package_of_a_test/losses.py")
    for name in names:
        (tmp_path / name).write_text("")
    imports = ["module_of_a_test", "package_of_a_test"]
    stop(config(images, tmp_path, imports=imports), 2)
    assert resumed(images, tmp_path, imports=imports) is not None
    for name in names:
        (tmp_path / name).write_text("temperature = 0.1")
        assert resumed(images, tmp_path, imports=imports) is None
        assert "is another run, code differs" in capsys.readouterr().out
        (tmp_path / name).write_text("")


def test_a_run_that_is_still_going_is_not_entered(images: Path, tmp_path: Path) -> None:
    def enter(trainer: Any) -> None:
        with pytest.raises(UserError, match="still going.*auto_resume.enabled=False"):
            resumed(images, tmp_path)
        crash(trainer)

    stop(config(images, tmp_path), 2, enter)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    # a named checkpoint begins a run of its own, which leaves that file; another GPU, and as many
    cfg = config(images, tmp_path, auto_resume__enabled=False, devices=[1])
    cfg.resume_from_checkpoint = os.path.relpath(checkpoint)
    with running(checkpoint.parent):
        _, own = train(cfg)
    assert own.folder != checkpoint.parent and checkpoint.is_file()
    shutil.rmtree(own.folder)
    (checkpoint.parent / LOCK).touch()  # as a killed process leaves it
    _, first = train(config(images, tmp_path))
    assert first.folder == checkpoint.parent
    assert not (first.folder / LOCK).exists() and (first.folder / FINISHED).exists()
    same = finished_run(prepare_pretraining(config(images, tmp_path))[1], "simclr")
    assert same is not None and same.folder == first.folder
    assert resumed(images, tmp_path) is None  # a finished run is not continued


def test_a_run_from_a_named_checkpoint_goes_on_where_it_was_stopped(
    images: Path, tmp_path: Path
) -> None:
    def further(out: Path, epochs: int) -> Any:
        return config(images, out, max_epochs=epochs, scheduler={"name": "none"})

    _, first = train(further(tmp_path / "first", 1))
    steps: list[int] = []

    def run(*callbacks: Any) -> None:
        cfg = further(tmp_path, 4)
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
    cfg = config(images, out, "metamask", checkpoint__keep_prev=True)
    return Path(train(cfg)[1].checkpoint)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("optimizer.name", "adam", "optimizer.name=adam: .* has sgd"),
        ("max_epochs", 1, "max_epochs=1: .* has 3"),
        ("max_epochs", 4, "max_epochs=4: .* has 3"),
        ("max_epochs", 3, "max_epochs=3: .* already has 3 epochs and 6 steps"),
        ("devices", 2, "processes=2: .* has 1"),
        ("method_kwargs.mask", {"kind": "linear"}, "mask.kind=linear"),
    ],
)
def test_what_cannot_go_on_is_refused(
    key: str, value: Any, message: str, finished: Path, images: Path, tmp_path: Path
) -> None:
    name = finished.name if value == 3 else finished.name.replace("ep=2", "ep=1")
    start = str(finished.with_name(name))
    cfg = config(images, tmp_path, "metamask", resume_from_checkpoint=start)
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


def test_a_limit_or_a_callback_ends_a_run_and_keeps_its_last_state(
    images: Path, tmp_path: Path
) -> None:
    def run(*callbacks: Any, **overrides: Any) -> Any:
        seldom = {"checkpoint__frequency": 100, "scheduler": {"name": "none"}, **overrides}
        _, result = train(config(images, tmp_path, **seldom), *callbacks)
        (checkpoint,) = result.folder.glob("*.ckpt")
        assert checkpoint == result.checkpoint and (result.folder / FINISHED).is_file()
        return steps_in(checkpoint), checkpoint

    for steps in (3, 4):
        ended, first = run(max_steps=steps)
        assert ended == steps
        # an epoch that ended early is over
        assert run(max_steps=6, resume_from_checkpoint=str(first))[0] == steps + 2
    in_time, _ = run(At(2, lambda _: time.sleep(1.1)), max_time="00:00:00:01")
    assert 1 <= in_time <= 3
    assert run(At(2, lambda trainer: setattr(trainer, "should_stop", True)))[0] == 3


def test_ctrl_c_saves_after_the_step_and_a_second_one_waits_for_nothing(
    images: Path, tmp_path: Path
) -> None:
    before = signal.getsignal(signal.SIGINT)
    cfg = config(images, tmp_path, checkpoint__frequency=100)
    with pytest.raises(RunStopped, match="SIGINT.*after step 3.*the same command") as caught:
        train(cfg, At(2, send(signal.SIGINT)))
    assert caught.value.exit_code == 130 and signal.getsignal(signal.SIGINT) == before
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert steps_in(checkpoint) == 3
    stop(cfg, 4, send(signal.SIGINT, signal.SIGINT), KeyboardInterrupt)
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
