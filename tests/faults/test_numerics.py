"""Numerical trouble: a run stops in one line, or goes on; its checkpoints are finite always."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from runs import pretrain_config, train
from torch import nn
from torch.utils.data import DataLoader

from metamask_solo.checkpoints.reading import load_raw
from metamask_solo.errors import RunStopped, UserError
from metamask_solo.hosts import pl
from metamask_solo.training.callbacks import FiniteLoss


def assert_finite(root: Path, count: int) -> None:
    checkpoints = list(root.rglob("*.ckpt"))
    assert len(checkpoints) == count
    for path in checkpoints:
        raw = load_raw(path)
        for name, value in raw["state_dict"].items():
            assert not value.is_floating_point() or value.isfinite().all(), name
        assert raw["metamask"]["history"]["mask"].isfinite().all()


class NaNPixel(pl.Callback):  # type: ignore[name-defined]
    """In the first batch of the second epoch."""

    def on_train_batch_start(self, trainer: Any, model: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 2:
            batch[1][0][3, 0, 5, 5] = float("nan")


@pytest.mark.parametrize(
    "log_every, message",
    [
        # seen in the loss, with the term
        (1, r"step 3: not finite: .*train_nce_loss.*; try a lower .*last checkpoint is"),
        # between two logged steps, hence seen in the weights
        (50, r"step 4: \S+ is not finite, so nothing was saved; .* the last checkpoint is"),
    ],
)
def test_a_nan_pixel_stops_the_run_and_spoils_no_checkpoint(
    log_every: int, message: str, images: Path, tmp_path: Path
) -> None:
    cfg = pretrain_config(images, tmp_path, max_epochs=2, log_every_n_steps=log_every)
    with pytest.raises(RunStopped, match=message) as caught:
        train(cfg, NaNPixel(), small=True)
    assert caught.value.exit_code == 1
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert str(checkpoint) in str(caught.value) and checkpoint.stem.endswith("ep=0")
    assert_finite(tmp_path, 1)


@pytest.mark.parametrize("cause", ["a rate too high", "constant features"])
def test_weights_that_are_not_finite_are_not_saved(
    cause: str, images: Path, tmp_path: Path
) -> None:
    """Of grey images no feature varies, and each BatchNorm multiplies gradients by 300.

    On one of the releases, the check of the hypergradient sees the rounding one step before.
    """
    shutil.copytree(images, tmp_path / "data")
    cfg = pretrain_config(tmp_path / "data", tmp_path / "runs", max_epochs=2)
    if cause == "constant features":
        for path in (tmp_path / "data").rglob("*.png"):
            Image.new("RGB", (32, 32), (120, 120, 120)).save(path)
    else:
        cfg.optimizer.lr = 1e30
    stopped = r"step 2: .*not finite.*; there is no checkpoint|exact: .* different derivatives"
    with pytest.raises((RunStopped, UserError), match=stopped):
        train(cfg)
    assert_finite(tmp_path / "runs", 0)


def test_the_lowest_temperature_trains_and_a_validation_batch_of_one_image_is_fine(
    images: Path, tmp_path: Path
) -> None:
    # 10 validation images in batches of 9; 20 training images, of which the last 2 are dropped
    cfg = pretrain_config(images, tmp_path, optimizer__batch_size=9)
    cfg.method_kwargs.temperature = 0.02
    cfg.method_kwargs.mask = {"lr": 1.0}
    model, result = train(cfg)
    assert model.trainer.global_step == 2 and "val_acc1" in result.metrics
    assert model.mask_optimizer.skipped == 0
    assert_finite(tmp_path, 1)


class Overflow(pl.LightningModule):  # type: ignore[name-defined]
    """A linear layer whose fp16 gradient overflows in all steps."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = (self.layer(batch) * 1e30).mean().float()
        self.log("train_some_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


def test_endless_fp16_overflow_stops_the_run() -> None:
    """One that ends is normal: its steps are dropped and counted (tests/method)."""
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        # named outright, for Lightning would take bf16 on a CPU
        plugins=[pl.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))],
        callbacks=[FiniteLoss(None)],
        logger=False,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Overflow()
    with pytest.raises(RunStopped, match=r"step \d+: not finite: train_some_loss; .*precision=32"):
        trainer.fit(model, DataLoader(torch.ones(40, 2, 4), batch_size=None))
    assert all(p.isfinite().all() for p in model.parameters())
