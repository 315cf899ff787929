"""Stopping and continuing: the same weights and mask as a run that was never stopped."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import pretrain_config, train

from metamask_solo.checkpoints.reading import read_checkpoint
from metamask_solo.errors import UserError
from metamask_solo.hosts import pl
from metamask_solo.training.resume import read_metrics

pytestmark = pytest.mark.resume


class StopAfter(pl.Callback):  # type: ignore[name-defined]
    """Raises after the checkpoint of an epoch, as a crash would."""

    def __init__(self, epoch: int):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: Any, model: Any) -> None:
        if trainer.current_epoch == self.epoch:
            raise InterruptedError


def four_epochs(images: Path, out: Path, workers: int) -> Any:
    cfg = pretrain_config(images, out, max_epochs=4, auto_resume__enabled=True)
    cfg.data.num_workers = workers
    cfg.optimizer.batch_size = 6
    cfg.scheduler = {"name": "warmup_cosine", "warmup_epochs": 1}
    cfg.method_kwargs.mask = {"optimizer": "adam", "lr": 0.1, "schedule": "cosine"}
    cfg.knn_eval = {"enabled": True, "k": 3, "distance_func": "cosine"}
    return cfg


@pytest.mark.parametrize("workers", [0, 2])
def test_two_and_two_epochs_are_four(workers: int, images: Path, tmp_path: Path) -> None:
    whole, whole_fit = train(four_epochs(images, tmp_path / "whole", workers))
    with pytest.raises(InterruptedError):
        train(four_epochs(images, tmp_path / "parts", workers), StopAfter(2))
    resumed, resumed_fit = train(four_epochs(images, tmp_path / "parts", workers))
    assert resumed.trainer.global_step == whole.trainer.global_step == 12
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    a, b = (read_checkpoint(fit.checkpoint).raw for fit in (whole_fit, resumed_fit))
    for key in ("step", "mask"):
        assert torch.equal(a["metamask"]["history"][key], b["metamask"]["history"][key])
    states = [raw["metamask"]["mask_optimizer"]["optimizer"]["state"][0] for raw in (a, b)]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert [raw["metamask"]["mask_optimizer"]["updates"] for raw in (a, b)] == [12, 12]
    # one folder, and metrics without gap or repetition
    assert len(list((tmp_path / "parts" / "metamask").iterdir())) == 1
    steps = [[int(r["step"]) for r in read_metrics(f.folder)] for f in (whole_fit, resumed_fit)]
    assert steps[0] == steps[1]


def test_a_finished_run_is_not_continued(images: Path, tmp_path: Path) -> None:
    cfg = pretrain_config(images, tmp_path, auto_resume__enabled=True)
    _, first = train(cfg)
    _, second = train(pretrain_config(images, tmp_path, auto_resume__enabled=True))
    assert first.folder != second.folder


def test_another_seed_is_another_run(images: Path, tmp_path: Path) -> None:
    with pytest.raises(InterruptedError):
        train(
            pretrain_config(images, tmp_path, max_epochs=2, auto_resume__enabled=True), StopAfter(1)
        )
    cfg = pretrain_config(images, tmp_path, max_epochs=2, auto_resume__enabled=True, seed=2)
    model, _ = train(cfg)
    assert len(list((tmp_path / "metamask").iterdir())) == 2
    assert model.trainer.global_step == 4


def test_a_damaged_checkpoint_is_named_and_skipped(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = pretrain_config(images, tmp_path, max_epochs=3, auto_resume__enabled=True)
    cfg.checkpoint.keep_prev = True
    with pytest.raises(InterruptedError):
        train(cfg, StopAfter(2))
    newest, older = sorted(tmp_path.rglob("*.ckpt"), key=lambda p: -p.stat().st_mtime)[:2]
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    time.sleep(0.01)
    newest.touch()
    cfg = pretrain_config(images, tmp_path, max_epochs=3, auto_resume__enabled=True)
    cfg.checkpoint.keep_prev = True
    model, _ = train(cfg)
    printed = capsys.readouterr().out
    assert f"skipped: {newest}" in printed and f"resuming from {older}" in printed
    assert model.trainer.global_step == 6


def test_another_kind_of_mask_is_refused(images: Path, tmp_path: Path) -> None:
    _, first = train(pretrain_config(images, tmp_path))
    cfg = pretrain_config(images, tmp_path, max_epochs=2)
    cfg.resume_from_checkpoint = str(first.checkpoint)
    cfg.method_kwargs.mask = {"kind": "linear"}
    with pytest.raises(UserError, match="mask.kind=linear"):
        train(cfg)
