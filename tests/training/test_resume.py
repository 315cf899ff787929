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
from checkpoints_of_runs import write_run
from omegaconf import OmegaConf
from runs import pretrain_config, train

from metamask_solo.checkpoints.reading import load_raw
from metamask_solo.errors import RunStopped, UserError
from metamask_solo.hosts import pl
from metamask_solo.training.callbacks import RankMe
from metamask_solo.training.linear import prepare_probe
from metamask_solo.training.pretrain import prepare_pretraining
from metamask_solo.training.resume import (
    FINISHED,
    LOCK,
    finished_run,
    read_metrics,
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


def resumed(images: Path, out: Path, **overrides: Any) -> Path | None:
    """The checkpoint at which a run would go on; it does not begin."""
    cfg = prepare_pretraining(config(images, out, **overrides))[1]
    return starting_point(cfg, out / "simclr")[0]


def same_weights(one: Any, two: Any) -> bool:
    states = one.state_dict(), two.state_dict()
    return all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def steps_in(checkpoint: Path) -> int:
    return int(load_raw(checkpoint)["global_step"])


def logged(result: Any, name: str) -> dict[int, float]:
    """What a run logged under a name, by the step."""
    rows = read_metrics(result.folder).dropna(subset=name)
    return dict(zip(rows["step"].astype(int), rows[name], strict=True))


# As which run it goes on


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


INDIFFERENT = {
    **{"checkpoint__frequency": 7, "checkpoint__keep_prev": True, "wandb__project": "b"},
    **{"enable_progress_bar": True, "log_every_n_steps": 3, "fold_at_end": False},
    **{"data__num_workers": 1, "name": "b", "auto_resume__max_hours": 1, "devices": [1]},
}
DECISIVE = {
    **{"precision": "bf16-mixed", "gradient_clip_val": 1.0, "accumulate_grad_batches": 2},
    **{"max_steps": 3, "limit_train_batches": 1, "seed": 2, "knn_eval__enabled": True},
    **{"deterministic": True, "strategy": "ddp", "augmentations__0__crop_size": 28},
    **{"augmentations__0__rrc__crop_min_scale": 0.4},
}


def test_the_same_run_is_known_by_what_decides_its_result(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    code = ("module_of_a_test.py", "helper_of_a_test.py", "package_of_a_test/losses.py")
    (tmp_path / "package_of_a_test").mkdir()
    (tmp_path / "package_of_a_test" / "__init__.py").touch()
    for name in code:
        (tmp_path / name).touch()
    (tmp_path / code[0]).write_text("import helper_of_a_test\n")
    imports = ["module_of_a_test", "package_of_a_test"]
    data = Path(shutil.copytree(images, tmp_path / "data"))
    stop(config(data, tmp_path, imports=imports), 2)
    (checkpoint,) = tmp_path.rglob("*.ckpt")

    def another(key: str, **overrides: Any) -> None:
        assert resumed(data, tmp_path, imports=imports, **overrides) is None, key
        assert f"is another run, {key} differs" in capsys.readouterr().out

    for key, value in DECISIVE.items():
        another(key.replace("__", "."), **{key: value})
    another("images", data__val_path=str(data / "train"))
    image = sorted((data / "train" / "class_0").iterdir())[-1]
    for file, key in ((image, "images"), *((tmp_path / name, "code") for name in code)):
        content = file.read_bytes()
        # the image is of the same name and size
        file.write_bytes(content[:-1] + b"\0" if file == image else content + b"\nfactor = 2")
        another(key)
        file.write_bytes(content)
    of_another_class = data / "train" / "class_1" / "-.png"  # as before behind class_0/2.png
    image.rename(of_another_class)
    another("images")
    of_another_class.rename(image)
    assert resumed(data, tmp_path, imports=imports, **INDIFFERENT) == checkpoint
    os.utime(checkpoint, (0, 0))
    assert resumed(data, tmp_path, imports=imports) is None
    assert f"{checkpoint} is older than auto_resume.max_hours=36" in capsys.readouterr().out


def test_a_run_that_is_still_going_is_not_entered_and_a_finished_one_is_known(
    images: Path, tmp_path: Path
) -> None:
    def enter(trainer: Any) -> None:
        with pytest.raises(UserError, match="still going.*auto_resume.enabled=False"):
            resumed(images, tmp_path)
        crash(trainer)

    stop(config(images, tmp_path), 2, enter)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    # a named checkpoint begins a run of its own, which leaves that file
    cfg = config(images, tmp_path / "separate", resume_from_checkpoint=str(checkpoint))
    with running(checkpoint.parent):
        train(cfg)
    assert checkpoint.is_file()
    _, first = train(config(images, tmp_path))
    assert first.folder == checkpoint.parent and not (first.folder / LOCK).exists()
    same = finished_run(prepare_pretraining(config(images, tmp_path))[1], "simclr")
    assert same is not None and same.folder == first.folder
    assert resumed(images, tmp_path) is None  # a finished run is not continued


def test_a_run_from_a_named_checkpoint_goes_on_where_it_was_stopped(
    images: Path, tmp_path: Path
) -> None:
    def run(out: Path, epochs: int, *callbacks: Any, **overrides: Any) -> Any:
        constant = {"max_epochs": epochs, "scheduler": {"name": "none"}, **overrides}
        return train(config(images, out, **constant), *callbacks)[1]

    first = run(tmp_path / "first", 1)
    start = {"resume_from_checkpoint": str(first.folder)}
    steps: list[int] = []
    with pytest.raises(InterruptedError):
        run(tmp_path, 4, At(6, crash), **start)
    notes = (At(step, lambda trainer: steps.append(trainer.global_step)) for step in range(8))
    run(tmp_path, 4, *notes, **start)
    assert steps == [6, 7]  # the epochs before were there
    assert len(list((tmp_path / "simclr").iterdir())) == 1 and first.checkpoint.is_file()


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of metamask on a cosine that ended at 0: its last checkpoint."""
    out = tmp_path_factory.mktemp("finished")
    cfg = config(images, out, "metamask", checkpoint__keep_prev=True)
    return Path(train(cfg)[1].checkpoint)


def before_the_last_epoch(finished: Path) -> Path:
    return finished.with_name(finished.name.replace("ep=2", "ep=1"))


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("optimizer.name", "adam", "optimizer.name=adam: .* has sgd"),
        ("accumulate_grad_batches", 2, "accumulate_grad_batches=2: .* has 1"),  # of the rates
        ("max_epochs", 1, "max_epochs=1: .* has 3"),
        ("max_epochs", 4, "max_epochs=4: .* has 3"),
        ("max_epochs", 3, "max_epochs=3: .* already has 3 epochs and 6 steps"),
        ("devices", 2, "processes=2: .* has 1"),
        ("data.no_labels", True, "data.no_labels=True: .* has False"),
        ("method_kwargs.mask", {"kind": "linear"}, "mask.kind=linear"),
        ("resume_from_checkpoint", "weights", "training cannot go on from it, it has no loops"),
    ],
)
def test_what_cannot_go_on_is_refused(
    key: str, value: Any, message: str, finished: Path, images: Path, tmp_path: Path
) -> None:
    start = finished if value == 3 else before_the_last_epoch(finished)
    cfg = config(images, tmp_path / "out", "metamask", resume_from_checkpoint=str(start))
    if value == "weights":
        value = str(write_run(tmp_path / "weights", images))
    OmegaConf.update(cfg, key, value)
    with pytest.raises(UserError, match=message):
        train(cfg)
    assert not (tmp_path / "out").exists()


def test_a_named_checkpoint_is_compared_with_the_run_that_it_is_of(
    finished: Path, images: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished.parent, tmp_path / "run"))
    below = run / "logs" / "version_0" / "checkpoints"  # where a ModelCheckpoint writes
    alone = tmp_path / "alone"
    for folder in (below, alone):
        folder.mkdir(parents=True)

    def prepare(folder: Path, epochs: int) -> None:
        start = str(shutil.copy(before_the_last_epoch(finished), folder))
        cfg = config(images, tmp_path, "metamask", resume_from_checkpoint=start, max_epochs=epochs)
        prepare_pretraining(cfg)

    for folder, message in ((below, "max_epochs=4: .* has 3"), (alone, "args.json .* is missing")):
        with pytest.raises(UserError, match=message):
            prepare(folder, 4)
    args = json.loads((run / "args.json").read_text())
    args["started_from"]["images"] = "of a folder that has grown since"
    (run / "args.json").write_text(json.dumps(args))
    with pytest.raises(UserError, match="^data: the images, .* not those of the checkpoint's run"):
        prepare(run, 3)
    del args["started_from"]  # of solo-learn's own script
    (run / "args.json").write_text(json.dumps(args))
    prepare(run, 3)


def test_the_masks_cosine_counts_the_steps_of_the_run(
    finished: Path, images: Path, tmp_path: Path
) -> None:
    """Two thirds of the run are done, whatever period the updates so far had."""
    start = str(before_the_last_epoch(finished))
    cfg = config(images, tmp_path, "metamask", resume_from_checkpoint=start)
    cfg.method_kwargs.mask = {"schedule": "cosine", "lr": 1}
    cfg.method_kwargs.meta = {"every_n_steps": 2}
    model, _ = train(cfg)
    assert model.mask_optimizer.updates == 5
    assert model.mask_optimizer.optimizer.param_groups[0]["lr"] == pytest.approx(0.25)


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


# From where it goes on


@pytest.mark.parametrize("method", ["byol", "metamask"])
def test_a_checkpoint_that_counts_steps_goes_on_after_its_batch(
    method: str, images: Path, tmp_path: Path
) -> None:
    def run(out: Path, **overrides: Any) -> tuple[Any, Any]:
        cfg = config(images, out, method, auto_resume__enabled=False, **overrides)
        target = f"{pl.__name__}.callbacks.ModelCheckpoint"
        cfg.callbacks = [{"_target_": target, "every_n_train_steps": 1, "save_top_k": -1}]
        return train(cfg)

    whole, result = run(tmp_path)
    # in the middle of an epoch, and at its end
    for path in sorted(result.folder.rglob("checkpoints/*.ckpt"))[:2]:
        again, _ = run(tmp_path / path.stem, resume_from_checkpoint=str(path))
        assert again.trainer.global_step == 6 and same_weights(whole, again), path


def test_an_epoch_that_is_entered_in_its_middle_logs_no_part_of_it(
    images: Path, tmp_path: Path
) -> None:
    def run(out: Path, *callbacks: Any) -> Any:
        return train(config(images, out, knn_eval__enabled=True), RankMe(), *callbacks)[1]

    whole = run(tmp_path / "whole")
    with pytest.raises(RunStopped):
        run(tmp_path / "broken", At(4, send(signal.SIGTERM)))  # the first step of the last epoch
    result = run(tmp_path / "broken")
    for name in ("val_knn_acc1", "train_rankme"):
        unbroken = logged(whole, name)
        assert unbroken.pop(5) is not None
        assert logged(result, name) == pytest.approx(unbroken)
        assert name not in result.metrics
    assert logged(result, "val_loss") == pytest.approx(logged(whole, "val_loss"))


def test_what_the_last_update_of_the_mask_logged_stays(images: Path, tmp_path: Path) -> None:
    """After the stop, no further update comes, and a validation does."""

    def run(out: Path, *callbacks: Any) -> Any:
        cfg = config(images, out, "metamask")
        cfg.method_kwargs.meta = {"every_n_steps": 4}
        return train(cfg, *callbacks)[1].metrics

    with pytest.raises(RunStopped):
        run(tmp_path / "broken", At(4, send(signal.SIGTERM)))
    whole, broken = run(tmp_path / "whole"), run(tmp_path / "broken")
    names = {name for name in whole if not name.startswith(("train_", "val_"))}
    assert {"mask_min", "mask_max", "hypergradient_norm"} <= names
    assert {name: broken[name] for name in names} == {name: whole[name] for name in names}


def test_the_last_validation_is_said_with_its_step_and_is_that_of_the_unbroken_run(
    images: Path, tmp_path: Path
) -> None:
    def run(out: Path, *callbacks: Any) -> Any:
        return train(config(images, out, check_val_every_n_epoch=2), *callbacks)[1]

    whole = run(tmp_path / "whole")
    with pytest.raises(RunStopped):
        run(tmp_path / "broken", At(4, send(signal.SIGTERM)))
    result = run(tmp_path / "broken")  # from behind it: this one validates nothing
    for ended in (whole, result):
        assert str(ended).endswith("(validated after step 4 of 6)")
        assert json.loads((ended.folder / FINISHED).read_text())["note"] == ended.note
        assert ended.metrics["val_loss"] == whole.metrics["val_loss"]


# How it ends


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
    def handlers() -> list[Any]:
        return [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]

    before = handlers()
    cfg = config(images, tmp_path, checkpoint__frequency=100)
    with pytest.raises(RunStopped, match="SIGINT.*after step 3.*the same command") as caught:
        train(cfg, At(2, send(signal.SIGINT)))
    assert caught.value.exit_code == 130 and handlers() == before
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert steps_in(checkpoint) == 3
    stop(cfg, 4, send(signal.SIGINT, signal.SIGINT), KeyboardInterrupt)
    assert handlers() == before  # for the next run in this process
    assert list(tmp_path.rglob("*.ckpt")) == [checkpoint] and not list(tmp_path.rglob(FINISHED))


def test_in_slurm_a_signal_saves_after_the_step_and_requeues_the_job(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path / "asked"}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    for name, value in {"NTASKS": 1, "JOB_ID": 7, "PROCID": 0, "LOCALID": 0, "NODEID": 0}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    monkeypatch.chdir(tmp_path)
    cfg = config(images, tmp_path, "metamask", checkpoint__frequency=100)
    with pytest.raises(RunStopped, match="SIGUSR1.*after step 3.*the same command") as caught:
        train(cfg, At(2, send(signal.SIGUSR1)))
    assert caught.value.exit_code == 138
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    ours, lightnings = sorted((tmp_path / "metamask").rglob("*.ckpt"), reverse=True)
    assert lightnings.name.startswith("hpc") and steps_in(ours) == steps_in(lightnings) == 3
    again, result = train(cfg)
    assert list(tmp_path.glob("metamask/**/*.ckpt")) == [result.checkpoint]
    assert not list(tmp_path.glob("*.ckpt"))
    whole, _ = train(config(images, tmp_path / "whole", "metamask"))
    assert same_weights(whole, again)


def test_a_signal_after_the_last_step_is_reported_when_all_is_written(
    images: Path, tmp_path: Path
) -> None:
    class Late(pl.Callback):  # type: ignore[name-defined]
        def on_train_end(self, trainer: Any, model: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    _, result = train(config(images, tmp_path, max_epochs=1), Late())
    assert result.stopped is not None and result.stopped.exit_code == 143
    assert json.loads((result.folder / FINISHED).read_text())["metrics"]


def test_too_little_memory_is_one_line(images: Path, tmp_path: Path) -> None:
    def fail(trainer: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    with pytest.raises(RunStopped, match=r"^optimizer.batch_size=10: .* too little memory"):
        train(config(images, tmp_path), At(1, fail))
