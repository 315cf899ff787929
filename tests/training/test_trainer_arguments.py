"""Arguments of Lightning's Trainer at the ends of their ranges."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from runs import pretrain_config, train

from metamask_solo.errors import UserError
from metamask_solo.training.pretrain import pretrain_run
from metamask_solo.training.resume import read_metrics


def config(images: Path, out: Path, **overrides: Any) -> DictConfig:
    """An epoch of two steps."""
    return pretrain_config(images, out, "simclr", **{"optimizer__lr": 0.01, **overrides})


@pytest.mark.parametrize(
    "arguments, steps",
    [
        (
            {
                **{"limit_val_batches": 1, "min_epochs": 1, "val_check_interval": 0.5},
                **{"num_sanity_val_steps": -1, "log_every_n_steps": 0, "gradient_clip_val": 1},
                **{"deterministic": True, "inference_mode": False, "detect_anomaly": True},
                **{"enable_model_summary": True, "max_time": {"minutes": 5}, "num_nodes": 1},
            },
            2,
        ),
        ({"max_steps": -1, "deterministic": "warn", "benchmark": True, "strategy": None}, 2),
        ({"limit_train_batches": 0.5, "precision": 64, "limit_val_batches": 0}, 1),
        ({"limit_train_batches": 1, "precision": "bf16-true", "sync_batchnorm": True}, 1),
        ({"accumulate_grad_batches": 3, "precision": "bf16-mixed"}, 1),
    ],
)
def test_arguments_work(
    arguments: dict[str, Any], steps: int, images: Path, tmp_path: Path
) -> None:
    before = torch.are_deterministic_algorithms_enabled()
    model, result = train(config(images, tmp_path, **arguments))
    assert torch.are_deterministic_algorithms_enabled() == before  # what the next job finds
    assert model.trainer.global_step == steps
    assert result.checkpoint is not None and result.checkpoint.is_file()
    assert ("val_acc1" in result.metrics) == (arguments.get("limit_val_batches") != 0)


def test_validation_by_steps_alone(images: Path, tmp_path: Path) -> None:
    """null is a value of its own there: validation every so many batches, over epochs."""
    cfg = config(images, tmp_path, max_epochs=3, val_check_interval=3)
    cfg.check_val_every_n_epoch = None
    _, result = train(cfg)
    steps = read_metrics(result.folder).dropna(subset="val_loss")["step"]
    assert list(steps) == [2, 5]


def test_an_error_of_lightnings_names_the_argument_that_the_file_set(
    images: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"^val_check_interval=100: .*check_val_every_n_epoch"):
        train(config(images, tmp_path, val_check_interval=100))


def test_a_fast_run_leaves_nothing(images: Path, tmp_path: Path) -> None:
    cfg = config(images, tmp_path, fast_dev_run=True, knn_eval__enabled=True)
    result = pretrain_run(cfg)
    assert result.checkpoint is None and "val_loss" in result.metrics
    assert "val_knn_acc1" not in result.metrics
    assert not list(tmp_path.iterdir())
