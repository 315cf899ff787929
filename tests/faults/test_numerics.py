"""Numerical trouble: a run stops in one line, or goes on; its checkpoints are finite always."""

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import pretrain_config, train
from torch import nn
from torch.utils.data import DataLoader

from metamask_solo.checkpoints.reading import load_raw
from metamask_solo.errors import RunStopped
from metamask_solo.hosts import pl
from metamask_solo.training.callbacks import FiniteLoss


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
    raw = load_raw(checkpoint)
    for name, value in raw["state_dict"].items():
        assert not value.is_floating_point() or value.isfinite().all(), name
    assert raw["metamask"]["history"]["mask"].isfinite().all()


def test_a_rate_that_is_too_high_leaves_no_checkpoint(images: Path, tmp_path: Path) -> None:
    cfg = pretrain_config(images, tmp_path, optimizer__lr=1e30)
    with pytest.raises(RunStopped, match=r"step 2: .*not finite.*; there is no checkpoint"):
        train(cfg, small=True)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_validation_batch_of_one_image_is_fine(images: Path, tmp_path: Path) -> None:
    # 10 validation images in batches of 9; 20 training images, of which the last 2 are dropped
    model, result = train(pretrain_config(images, tmp_path, optimizer__batch_size=9), small=True)
    assert model.trainer.global_step == 2 and "val_acc1" in result.metrics


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
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        # named outright, for Lightning would take bf16 on a CPU
        plugins=[pl.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))],
        callbacks=[FiniteLoss(None)],
        log_every_n_steps=1,
        **dict.fromkeys(off, False),
    )
    model = Overflow()
    with pytest.raises(RunStopped, match=r"step \d+: not finite: train_some_loss; .*precision=32"):
        trainer.fit(model, DataLoader(torch.ones(40, 2, 4), batch_size=None))
    assert all(p.isfinite().all() for p in model.parameters())
