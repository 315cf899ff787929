"""auto_resume goes on with the same run only: whatever decides the result makes another one."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from runs import pretrain_config, train, write_images

from metamask_solo.errors import UserError
from metamask_solo.hosts import pl
from metamask_solo.training.linear import prepare_probe
from metamask_solo.training.pretrain import prepare_pretraining
from metamask_solo.training.resume import (
    FINISHED,
    LOCK,
    checkpoint_to_resume,
    finished_run,
    identify,
    running,
)
from metamask_solo.training.trainer import fit

SIMCLR = {"proj_hidden_dim": 16, "proj_output_dim": 16, "temperature": 0.2}


class StopAfterAnEpoch(pl.Callback):  # type: ignore[name-defined]
    def on_train_epoch_start(self, trainer: Any, model: Any) -> None:
        if trainer.current_epoch == 1:
            raise InterruptedError


def config(images: Path, out: Path, **overrides: Any) -> Any:
    given = {"max_epochs": 2, "auto_resume__enabled": True, **overrides}
    cfg = pretrain_config(images, out, "simclr", **given)
    OmegaConf.update(cfg, "method_kwargs", SIMCLR)
    return cfg


def completed(cfg: Any) -> Any:
    return prepare_pretraining(cfg)[1]


@pytest.fixture(scope="module")
def stopped(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs with one in it that was stopped after an epoch."""
    out = tmp_path_factory.mktemp("stopped")
    with pytest.raises(InterruptedError):
        train(config(images, out), StopAfterAnEpoch())
    assert not list(out.rglob(LOCK))
    return out


@pytest.mark.parametrize(
    "indifferent",
    [
        {},
        {"checkpoint__frequency": 7, "checkpoint__keep_prev": True},
        {"enable_progress_bar": True, "log_every_n_steps": 3, "fold_at_end": False},
        {"data__num_workers": 1, "name": "other"},
        {"wandb__project": "other", "auto_resume__max_hours": 1},
    ],
)
def test_where_and_how_to_log_makes_no_other_run(
    indifferent: dict[str, Any], stopped: Path, images: Path
) -> None:
    cfg = completed(config(images, stopped, **indifferent))
    found = checkpoint_to_resume(cfg, stopped / "simclr")
    assert found is not None and found.parent.parent == stopped / "simclr"


@pytest.mark.parametrize(
    "key, value",
    [
        ("data.val_path", "train"),
        ("precision", "bf16-mixed"),
        ("gradient_clip_val", 1.0),
        ("accumulate_grad_batches", 2),
        ("max_steps", 3),
        ("limit_train_batches", 1),
        ("sync_batchnorm", True),
        ("seed", 2),
        ("knn_eval.enabled", True),
        ("deterministic", True),
        ("strategy", "ddp"),
        ("augmentations.0.crop_size", 28),
        ("augmentations.0.rrc.crop_min_scale", 0.4),
    ],
)
def test_what_decides_the_result_makes_another_run(
    key: str, value: Any, stopped: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config(images, stopped)
    value = str(images / value) if value == "train" else value
    OmegaConf.update(cfg, key, value, force_add=True)
    assert checkpoint_to_resume(completed(cfg), stopped / "simclr") is None
    assert "is another run" in capsys.readouterr().out


def test_a_run_that_is_still_going_is_not_entered(stopped: Path, images: Path) -> None:
    (args,) = stopped.rglob("args.json")
    with running(args.parent):
        with pytest.raises(UserError, match="still going.*auto_resume.enabled=False"):
            train(config(images, stopped))
        cfg = config(images, stopped, auto_resume__enabled=False)
        (checkpoint,) = args.parent.glob("*.ckpt")
        cfg.resume_from_checkpoint = str(checkpoint)
        with pytest.raises(UserError, match="still going"):
            train(cfg)
    assert checkpoint_to_resume(completed(config(images, stopped)), stopped / "simclr")
    (args.parent / LOCK).touch()  # as a killed process leaves it
    assert checkpoint_to_resume(completed(config(images, stopped)), stopped / "simclr")
    (args.parent / LOCK).unlink()


def test_a_running_run_holds_its_lock(images: Path, tmp_path: Path) -> None:
    held = []

    class Second(pl.Callback):  # type: ignore[name-defined]
        def on_train_epoch_end(self, trainer: Any, model: Any) -> None:
            cfg = completed(config(images, tmp_path))
            with pytest.raises(UserError, match="still going"):
                checkpoint_to_resume(cfg, tmp_path / "simclr")
            held.append(trainer.current_epoch)

    _, result = train(config(images, tmp_path), Second())
    assert held == [0, 1]
    assert not (result.folder / LOCK).exists() and (result.folder / FINISHED).exists()
    assert finished_run(completed(config(images, tmp_path)), "simclr") is not None


def read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "args.json").read_text())
    return config


def test_a_run_from_a_named_checkpoint_goes_on_where_it_was_stopped(
    images: Path, tmp_path: Path
) -> None:
    _, first = train(config(images, tmp_path / "first", max_epochs=1))

    def further() -> Any:
        cfg = config(images, tmp_path, max_epochs=3)
        cfg.resume_from_checkpoint = str(first.checkpoint)
        return cfg

    class Stop(pl.Callback):  # type: ignore[name-defined]
        def on_train_epoch_start(self, trainer: Any, model: Any) -> None:
            if trainer.current_epoch == 2:
                raise InterruptedError

    with pytest.raises(InterruptedError):
        train(further(), Stop())
    steps: list[int] = []

    class Count(pl.Callback):  # type: ignore[name-defined]
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            steps.append(trainer.global_step)

    train(further(), Count())
    assert steps == [4, 5]  # the second epoch was there
    (folder,) = (tmp_path / "simclr").iterdir()
    assert read_config(folder)["started_from"].keys() == {"images", "resume_from_checkpoint"}


def probe_config(images: Path, out: Path, checkpoint: Path, **overrides: Any) -> Any:
    cfg = pretrain_config(images, out, "metamask", max_epochs=2, auto_resume__enabled=True)
    del cfg.augmentations, cfg.method, cfg.method_kwargs, cfg.optimizer.classifier_lr
    cfg.name, cfg.pretrain_method = "probe", "metamask"
    cfg.pretrained_feature_extractor = str(checkpoint)
    cfg.data.augmentations = {"crop_size": 32}
    for key, value in overrides.items():
        OmegaConf.update(cfg, key.replace("__", "."), value, force_add=True)
    return cfg


def probe(cfg: Any, *callbacks: Any) -> Any:
    model, cfg, train_loader, val_loader = prepare_probe(cfg)
    return model, fit(model, cfg, train_loader, val_loader, "linear", callbacks)


def test_a_probe_of_another_checkpoint_is_another_run(images: Path, tmp_path: Path) -> None:
    _, pretrained = train(pretrain_config(images, tmp_path))
    path = pretrained.checkpoint
    with pytest.raises(InterruptedError):
        probe(probe_config(images, tmp_path, path), StopAfterAnEpoch())
    (folder,) = (tmp_path / "linear").iterdir()

    # without a mask it has other keys, and is another run
    _, plain = probe(probe_config(images, tmp_path, path, masked=False))
    assert plain.folder != folder
    # the same content under another name is the same start
    moved = shutil.copytree(path.parent, tmp_path / "moved") / path.name
    content = torch.load(path, weights_only=True)
    content["state_dict"]["mask.logits"] += 1.0
    torch.save(content, path)
    _, newer = probe(probe_config(images, tmp_path, path))
    assert newer.folder not in (folder, plain.folder)
    # a run's folder stands for the newest file in it, here the changed one
    cfg = probe_config(images, tmp_path, path.parent)
    model, prepared, *_ = prepare_probe(cfg)
    identify(prepared)
    assert prepared.started_from == read_config(newer.folder)["started_from"]
    model, same = probe(probe_config(images, tmp_path, moved))
    assert same.folder == folder and model.trainer.global_step == 4


@pytest.mark.parametrize("change", ["size", "name", "class"])
def test_other_images_in_the_same_folder_are_another_run(
    change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_images(tmp_path / "data", classes=3)
    cfg = config(data, tmp_path / "out")
    with pytest.raises(InterruptedError):
        train(cfg, StopAfterAnEpoch())
    (folder,) = (tmp_path / "out" / "simclr").iterdir()

    image = sorted((data / "train").rglob("*.png"))[0]
    if change == "size":
        with image.open("ab") as file:
            file.write(b"\0")
    elif change == "name":
        image.rename(image.with_name("other.png"))
    else:
        image.rename(sorted((data / "train").iterdir())[1] / "other.png")
    _, other = train(config(data, tmp_path / "out"))
    assert other.folder != folder
    assert f"{folder} is another run, started_from.images differs" in capsys.readouterr().out


def test_a_runs_folder_can_be_named_to_go_on_from(images: Path, tmp_path: Path) -> None:
    _, first = train(config(images, tmp_path / "out"))
    cfg = config(images, tmp_path / "further", max_epochs=3)
    cfg.resume_from_checkpoint = str(first.folder)
    model, _ = train(cfg)
    assert model.trainer.global_step == 6
    assert first.checkpoint.is_file()
