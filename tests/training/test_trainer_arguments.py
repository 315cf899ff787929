"""Arguments of Lightning's Trainer at the ends of their ranges: each works, or is a line."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from runs import pretrain_config, train

from metamask_solo.training.pretrain import pretrain_run
from metamask_solo.training.resume import read_metrics

SIMCLR = {"proj_hidden_dim": 16, "proj_output_dim": 16, "temperature": 0.2}


def config(images: Path, out: Path, **overrides: Any) -> DictConfig:
    """An epoch of two steps."""
    cfg = pretrain_config(images, out, "simclr", **overrides)
    cfg.method_kwargs = SIMCLR
    cfg.optimizer.lr = 0.01
    return cfg


@pytest.mark.parametrize(
    "argument, value, steps",
    [
        ("limit_val_batches", 0, 2),
        ("limit_val_batches", 1, 2),
        ("limit_val_batches", 1.0, 2),
        ("limit_train_batches", 1, 1),
        ("limit_train_batches", 0.5, 1),
        ("max_steps", -1, 2),
        ("max_steps", 1, 1),
        ("min_epochs", 1, 2),
        ("min_steps", 1, 2),
        ("val_check_interval", 0.5, 2),
        ("val_check_interval", 1, 2),
        ("num_sanity_val_steps", -1, 2),
        ("log_every_n_steps", 0, 2),
        ("log_every_n_steps", 1, 2),
        ("gradient_clip_val", 0.0, 2),
        ("gradient_clip_val", 1, 2),
        ("deterministic", "warn", 2),
        ("deterministic", True, 2),
        ("benchmark", True, 2),
        ("inference_mode", False, 2),
        ("detect_anomaly", True, 2),
        ("precision", "bf16-mixed", 2),
        ("precision", "bf16-true", 2),
        ("precision", 64, 2),
        ("accumulate_grad_batches", 3, 1),
        ("enable_model_summary", True, 2),
        ("max_time", {"minutes": 5}, 2),
        ("num_nodes", 1, 2),
        ("sync_batchnorm", True, 2),
        ("strategy", None, 2),
        ("enable_autolog_hparams", False, 2),
    ],
)
def test_an_argument_works(
    argument: str, value: Any, steps: int, images: Path, tmp_path: Path
) -> None:
    before = torch.are_deterministic_algorithms_enabled()
    model, fit = train(config(images, tmp_path, **{argument: value}))
    assert torch.are_deterministic_algorithms_enabled() == before  # what the next job finds
    assert model.trainer.global_step == steps
    assert fit.checkpoint is not None and fit.checkpoint.is_file()
    # where a limit ends an epoch before its end, nothing is validated
    validated = (argument, value) not in (("limit_val_batches", 0), ("max_steps", 1))
    assert ("val_acc1" in fit.metrics) == validated


@pytest.mark.parametrize("epochs", [None, 1])
def test_validation_by_steps_alone(epochs: int | None, images: Path, tmp_path: Path) -> None:
    """null is a value of its own there: validation every so many batches, over epochs."""
    cfg = config(images, tmp_path, max_epochs=3, val_check_interval=1 if epochs else 3)
    cfg.check_val_every_n_epoch = epochs
    _, fit = train(cfg)
    steps = [int(row["step"]) for row in read_metrics(fit.folder) if row.get("val_loss")]
    assert steps == ([0, 1, 2, 3, 4, 5] if epochs else [2, 5])


@pytest.mark.parametrize("steps", [True, 1])
def test_a_fast_run_leaves_nothing(
    steps: Any, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = pretrain_run(config(images, tmp_path, fast_dev_run=steps))
    assert result.checkpoint is None and "val_loss" in result.metrics
    assert not list(tmp_path.iterdir())


def test_a_profile_is_shown_and_kept(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, fit = train(config(images, tmp_path, profiler="simple"))
    assert "run_training_batch" in capsys.readouterr().out
    (report,) = fit.folder.glob("*profile*.txt")
    assert "run_training_batch" in report.read_text()


def test_processes_that_are_copies_leave_what_others_do(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the processes are copies of the first one, that does not train itself."""
    cfg = pretrain_config(images, tmp_path, strategy="ddp_fork", devices=2, name="forked")
    result = pretrain_run(cfg)
    assert result.checkpoint is not None and result.checkpoint.is_file()
    assert result.metrics["val_loss"] > 0 and result.seconds_per_epoch > 0
    assert f"checkpoint: {result.checkpoint}" in capsys.readouterr().out
    assert (result.folder / "finished.json").is_file()
