"""Every method that solo-learn can train: three epochs, stopping and going on, folding, kNN.

What each method does is written as JSON to the file that METAMASK_SOLO_MATRIX names, if any; that
is what docs/solo-learn.md is made from (tools/tables.py).
"""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from method_settings import KWARGS
from omegaconf import DictConfig
from runs import pretrain_config, train

from metamask_solo import hosts
from metamask_solo.checkpoints.exporting import fold_checkpoint
from metamask_solo.checkpoints.reading import load_backbone, load_raw
from metamask_solo.errors import RunStopped, UserError

METHODS = hosts.trainable_methods()
pl: Any = hosts.pl


def config(method: str, images: Path, out: Path, **overrides: Any) -> DictConfig:
    """Three epochs of four steps, with τ, a schedule and SwAV's queue from the second on."""
    cfg = pretrain_config(images, out, method, max_epochs=3, **overrides)
    cfg.optimizer.batch_size = 5
    cfg.log_every_n_steps = 1  # so the loss is looked at after each step
    cfg.optimizer.lr = 1.0
    cfg.scheduler = {"name": "warmup_cosine", "warmup_epochs": 1}
    cfg.momentum = {"base_tau": 0.6, "final_tau": 1.0}
    if method == "mae":
        cfg.backbone = {"name": "vit_tiny", "kwargs": {"patch_size": 8}}
        cfg.method_kwargs = {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}
    elif method != "metamask":
        sizes = {"proj_hidden_dim": 16, "proj_output_dim": 10}
        cfg.method_kwargs = {**sizes, **KWARGS[method]}
        if method == "wmse":
            cfg.method_kwargs.whitening_size = 5
    return cfg


class Stop(pl.Callback):  # type: ignore[misc]
    """Sends this process a signal after an optimiser step, in the middle of the second epoch."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 6:
            os.kill(os.getpid(), signal.SIGTERM)


def note(method: str, **outcome: Any) -> None:
    """Adds to the file of outcomes, if one is asked for."""
    if path := os.environ.get("METAMASK_SOLO_MATRIX"):
        file = Path(path)
        content = json.loads(file.read_text()) if file.exists() else {}
        content.setdefault(method, {}).update(outcome)
        file.write_text(json.dumps(content, indent=1, sort_keys=True))


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_ends_as_one_that_was_not(method: str, images: Path, tmp_path: Path) -> None:
    note(method, pretrain=False, resume=False)
    whole, result = train(config(method, images, tmp_path / "whole", data__val_path=None))
    assert whole.trainer.global_step == 12
    assert all(p.isfinite().all() for p in whole.parameters())
    note(method, pretrain=True)
    parts = tmp_path / "parts"
    overrides = {"data__val_path": None, "auto_resume__enabled": True}
    with pytest.raises(RunStopped, match="SIGTERM"):
        train(config(method, images, parts, **overrides), Stop())
    resumed, again = train(config(method, images, parts, **overrides))
    assert len(list((parts / method).iterdir())) == 1
    states = [load_raw(fit.checkpoint) for fit in (result, again)]
    assert states[0]["state_dict"].keys() == states[1]["state_dict"].keys()
    for name, value in states[0]["state_dict"].items():
        assert torch.equal(value, states[1]["state_dict"][name]), name
    for model in (whole, resumed):
        if hasattr(model, "momentum_updater"):
            assert model.momentum_updater.cur_tau == 1.0  # the plan ends with the run
    note(method, resume=True)


@pytest.mark.soak
@pytest.mark.parametrize("method", METHODS)
def test_a_run_with_validation_is_evaluated_and_folded(
    method: str, images: Path, tmp_path: Path
) -> None:
    note(method, knn=False, fold=False)
    knn = {"enabled": True, "k": 3, "distance_func": "cosine"}
    _, result = train(config(method, images, tmp_path, knn_eval=knn))
    assert 0 <= result.metrics["val_knn_acc1"] <= 100
    images_of = torch.randn(2, 3, 32, 32)
    backbone, checkpoint = load_backbone(result.checkpoint)
    assert backbone(images_of).isfinite().all()
    note(method, knn=True)
    if method == "metamask":
        fold_checkpoint(result.checkpoint, tmp_path / "folded")
        folded, _ = load_backbone(tmp_path / "folded")
        torch.testing.assert_close(folded(images_of), backbone(images_of), rtol=1e-4, atol=1e-5)
        note(method, fold=True)
    else:
        with pytest.raises(UserError, match="mask"):
            fold_checkpoint(result.checkpoint, tmp_path / "folded")
