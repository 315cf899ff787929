"""Numerical trouble: a run stops in one line, or goes on; its checkpoints are finite always."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from runs import pretrain_config, train
from torch import nn
from torch.utils.data import DataLoader

from metamask_solo.__main__ import main
from metamask_solo.checkpoints.reading import load_raw
from metamask_solo.errors import RunStopped, UserError
from metamask_solo.hosts import pl
from metamask_solo.method.settings import MetaMaskSettings
from metamask_solo.training.callbacks import FiniteLoss
from metamask_solo.training.config import read_pretraining_config
from metamask_solo.validation import validated


def assert_finite(root: Path, count: int) -> None:
    checkpoints = list(root.rglob("*.ckpt"))
    assert len(checkpoints) == count
    for path in checkpoints:
        raw = load_raw(path)
        for name, value in raw["state_dict"].items():
            assert not value.is_floating_point() or value.isfinite().all(), name
        assert raw["metamask"]["history"]["mask"].isfinite().all()


class At(pl.Callback):  # type: ignore[name-defined]
    """Does something to model and batch before a step, counted from 0."""

    def __init__(self, step: int, action: Any):
        self.step = step
        self.action = action

    def on_train_batch_start(self, trainer: Any, model: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            self.action(model, batch)


@torch.no_grad()
def nan_pixel(model: Any, batch: Any) -> None:
    batch[1][0][3, 0, 5, 5] = float("nan")


@torch.no_grad()
def no_mask(model: Any, batch: Any) -> None:
    model.mask.logits.zero_()


@pytest.mark.parametrize(
    "log_every, message",
    [
        # seen in the loss, with the term
        (1, r"step 3: .*train_nce_loss.* not finite; a lower optimizer\.lr.*last checkpoint is"),
        # between two logged steps, hence seen in the weights
        (50, r"step 4: \S+ is not finite, so nothing was saved; .* the last checkpoint is"),
    ],
)
def test_a_nan_pixel_stops_the_run_and_spoils_no_checkpoint(
    log_every: int, message: str, images: Path, tmp_path: Path
) -> None:
    cfg = pretrain_config(images, tmp_path, max_epochs=2, log_every_n_steps=log_every)
    with pytest.raises(RunStopped, match=message) as caught:
        train(cfg, At(2, nan_pixel))
    assert caught.value.exit_code == 1
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert str(checkpoint) in str(caught.value) and checkpoint.stem.endswith("ep=0")
    assert_finite(tmp_path, 1)


def test_a_learning_rate_too_high_ends_the_command_with_1(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = pretrain_config(images, tmp_path / "runs", max_epochs=3, optimizer__lr=1e30)
    (tmp_path / "run.yaml").write_text(OmegaConf.to_yaml(cfg))
    argv = ["pretrain", "--config-path", str(tmp_path), "--config-name", "run.yaml"]
    argv += ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=disabled"]
    assert main(argv) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("metamask-solo pretrain: error: step 2: ")
    assert line.endswith("there is no checkpoint")
    assert not list(tmp_path.rglob("*.ckpt")) and not list(tmp_path.rglob(".*.tmp"))


def test_constant_features_stop_the_run(images: Path, tmp_path: Path) -> None:
    """All images one grey: no feature varies, and each BatchNorm multiplies gradients by 300."""
    shutil.copytree(images, tmp_path / "grey")
    for path in (tmp_path / "grey").rglob("*.png"):
        Image.new("RGB", (32, 32), (120, 120, 120)).save(path)
    cfg = pretrain_config(tmp_path / "grey", tmp_path / "runs", max_epochs=2)
    with pytest.raises(RunStopped, match=r"step 2: \S+ is not finite, so nothing was saved"):
        train(cfg)
    assert_finite(tmp_path / "runs", 0)


@pytest.mark.parametrize("kind, logit", [("linear", 0.0), ("sigmoid", -200), ("sigmoid", 200)])
def test_a_mask_without_a_gradient_is_refused(kind: str, logit: float) -> None:
    with pytest.raises(UserError, match=rf"mask.initial_logit={logit}: must .*kind={kind}"):
        validated(MetaMaskSettings, {"mask": {"kind": kind, "initial_logit": logit}})


def test_the_lowest_temperature_trains(images: Path, tmp_path: Path) -> None:
    cfg = pretrain_config(images, tmp_path)
    cfg.method_kwargs.temperature = 0.02
    cfg.method_kwargs.mask = {"lr": 1.0}
    model, _ = train(cfg)
    assert model.mask_optimizer.skipped == 0
    assert_finite(tmp_path, 1)
    with pytest.raises(
        UserError, match="temperature=0.0199: Input should be greater than or equal to 0.02"
    ):
        validated(MetaMaskSettings, {"temperature": 0.0199})


def test_a_batch_of_one_is_refused_in_training_and_fine_in_validation(
    images: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        UserError, match="optimizer.batch_size=1: Input should be greater than or equal to 2"
    ):
        read_pretraining_config(pretrain_config(images, tmp_path, optimizer__batch_size=1))
    # 10 validation images in batches of 9; 20 training images, of which the last 2 are dropped
    model, result = train(pretrain_config(images, tmp_path, optimizer__batch_size=9))
    assert model.trainer.global_step == 2 and "val_acc1" in result.metrics
    assert_finite(tmp_path, 1)


@pytest.mark.parametrize("split, other", [("val", "train"), ("train", "val")])
def test_a_class_that_is_missing_from_the_data_is_named(
    split: str, other: str, images: Path, tmp_path: Path
) -> None:
    shutil.copytree(images, tmp_path / "data")
    cfg = pretrain_config(tmp_path / "data", tmp_path / "runs")
    lacking = tmp_path / "data" / split / "class_2"
    for file in lacking.iterdir():
        file.unlink()
    with pytest.raises(UserError, match=f"data.{split}_path=.*class folder class_2 holds no image"):
        read_pretraining_config(cfg)
    lacking.rmdir()
    with pytest.raises(UserError, match=f"must be the same; class class_2 is in {other} only"):
        read_pretraining_config(cfg)


class Overflow(pl.LightningModule):  # type: ignore[name-defined]
    """A linear layer whose fp16 gradient overflows in its first steps, or in all of them."""

    def __init__(self, factor: float):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.factor = factor

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = (self.layer(batch) * self.factor).mean().float()
        self.log("train_some_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


def fit_in_half(factor: float) -> tuple[Any, FiniteLoss]:
    watch = FiniteLoss(None)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        # named outright, for Lightning would take bf16 on a CPU
        plugins=[pl.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))],
        callbacks=[watch],
        logger=False,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Overflow(factor)
    try:
        trainer.fit(model, DataLoader(torch.ones(40, 2, 4), batch_size=None))
    finally:
        assert all(p.isfinite().all() for p in model.parameters())
    return trainer, watch


def test_fp16_overflow_is_skipped_and_counted() -> None:
    trainer, watch = fit_in_half(40.0)
    assert 0 < watch.skipped < 40
    assert trainer.callback_metrics["skipped_steps"] == watch.skipped


def test_endless_fp16_overflow_stops_the_run() -> None:
    with pytest.raises(RunStopped, match=r"step \d+: train_some_loss not finite; .*precision=32"):
        fit_in_half(1e30)
