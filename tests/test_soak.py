"""Twenty thousand meta-updates: neither memory nor open files grow, and the mask stays finite."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import pretrain_config

from metamask_solo.hosts import build_method, complete_pretrain_config, pl

pytestmark = [pytest.mark.soak, pytest.mark.timeout(7200)]

UPDATES = 20_000
WARM_UP = 2_000
EVERY = 500
PAGE = os.sysconf("SC_PAGE_SIZE")


class Batches(torch.utils.data.IterableDataset[Any]):
    """Batches of eight random images in two views, different ones each time."""

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        for step in range(UPDATES):
            views = list(torch.randn(2, 8, 3, 8, 8, generator=generator))
            yield torch.arange(8) + step, views, torch.arange(8) % 5


class Watch(pl.Callback):  # type: ignore[name-defined]
    """Resident memory in bytes, open files, and the mask, once in a while."""

    def __init__(self) -> None:
        self.memory: list[int] = []
        self.files: list[int] = []
        self.masks: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer: Any, model: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx >= WARM_UP and batch_idx % EVERY == 0:
            self.memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * PAGE)
            self.files.append(len(os.listdir("/proc/self/fd")))
            self.masks.append(model.mask.logits.clone())


def test_twenty_thousand_updates(
    small_backbone: None, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = pretrain_config(images, tmp_path)
    cfg.method_kwargs.temperature = 0.2
    cfg.method_kwargs.mask = {"optimizer": "adam", "lr": 1e-3}
    model = build_method(complete_pretrain_config(cfg))
    watch = Watch()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=UPDATES,
        logger=False,
        callbacks=[watch],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    before = copy.deepcopy(model.mask.logits)
    trainer.fit(model, torch.utils.data.DataLoader(Batches(), batch_size=None))
    assert trainer.global_step == UPDATES

    growth = watch.memory[-1] / watch.memory[0] - 1
    with capsys.disabled():
        print(
            f"\n{UPDATES} updates: memory {watch.memory[0] / 2**20:.1f} MiB after {WARM_UP}, "
            f"{watch.memory[-1] / 2**20:.1f} MiB at the end ({growth:+.2%}), most "
            f"{max(watch.memory) / 2**20:.1f} MiB; open files {watch.files[0]} and "
            f"{watch.files[-1]}; {model.mask_optimizer.skipped} updates skipped"
        )
    assert max(watch.memory) < 1.02 * watch.memory[0]
    assert max(watch.files) <= watch.files[0]
    assert model.mask_optimizer.skipped == 0
    assert all(mask.isfinite().all() for mask in watch.masks)
    assert not torch.equal(model.mask.logits, before)
    # it moved until the end
    assert all(not torch.equal(a, b) for a, b in zip(watch.masks, watch.masks[1:], strict=False))
