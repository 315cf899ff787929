"""Every method that solo-learn can train: three epochs, stopping and going on, kNN, folding.

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
from small_resnet import replace_resnet18

from metamask_solo import hosts
from metamask_solo.__main__ import main
from metamask_solo.checkpoints.reading import load_backbone, load_raw
from metamask_solo.errors import RunStopped


def config(method: str, images: Path, out: Path, **overrides: Any) -> DictConfig:
    """Three epochs of four steps, with τ, a schedule and SwAV's queue from the second on."""
    cfg = pretrain_config(images, out, method, max_epochs=3, **overrides)
    cfg.optimizer.batch_size = 5
    cfg.log_every_n_steps = 1  # so the loss is looked at after each step
    cfg.optimizer.lr = 1.0
    cfg.scheduler = {"name": "warmup_cosine", "warmup_epochs": 1}
    cfg.momentum = {"base_tau": 0.6, "final_tau": 1.0}
    cfg.knn_eval = {"enabled": True, "k": 3, "distance_func": "cosine"}
    if method == "mae":
        cfg.backbone = {"name": "vit_tiny", "kwargs": {"patch_size": 8}}
        cfg.method_kwargs = {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}
    elif method != "metamask":
        sizes = {"proj_hidden_dim": 16, "proj_output_dim": 10}
        cfg.method_kwargs = {**sizes, **KWARGS[method]}
        if method == "wmse":
            cfg.method_kwargs.whitening_size = 5
    return cfg


class Stop(hosts.pl.Callback):  # type: ignore[misc]
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


@pytest.mark.parametrize("method", hosts.trainable_methods())
def test_a_method_trains_resumes_and_is_evaluated(
    method: str,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replace_resnet18(monkeypatch.setattr)
    note(method, pretrain=False, resume=False, knn=False, fold=False)
    whole, result = train(config(method, images, tmp_path / "whole"))
    assert whole.trainer.global_step == 12 and 0 <= result.metrics["val_knn_acc1"] <= 100
    assert all(p.isfinite().all() for p in whole.parameters())
    note(method, pretrain=True)
    parts = tmp_path / "parts"
    with pytest.raises(RunStopped, match="SIGTERM"):
        train(config(method, images, parts, auto_resume__enabled=True), Stop())
    resumed, again = train(config(method, images, parts, auto_resume__enabled=True))
    assert len(list((parts / method).iterdir())) == 1
    states = [load_raw(fit.checkpoint) for fit in (result, again)]
    assert states[0]["state_dict"].keys() == states[1]["state_dict"].keys()
    for name, value in states[0]["state_dict"].items():
        assert torch.equal(value, states[1]["state_dict"][name]), name
    # the epoch after that of the stop has its online kNN, too
    validated = [{k: v for k, v in fit.metrics.items() if "val_" in k} for fit in (result, again)]
    assert validated[0] == validated[1]
    for model in (whole, resumed):
        if hasattr(model, "momentum_updater"):
            assert model.momentum_updater.cur_tau == 1.0  # the plan ends with the run
    note(method, resume=True)

    knn = ["--k", "3", "--num-workers", "0"]
    assert main(["knn", str(again.folder), *knn]) == 0, capsys.readouterr().err
    note(method, knn=True)
    if method == "metamask":  # whose mask is folded into a real ResNet-18
        monkeypatch.undo()
        _, again = train(config(method, images, tmp_path / "one", max_steps=1))
    folds = main(["fold", str(again.folder), str(tmp_path / "folded")]) == 0
    assert folds == (method == "metamask"), capsys.readouterr().err
    if folds:
        x = torch.randn(2, 3, 32, 32)
        one, two = (load_backbone(path)[0](x) for path in (again.folder, tmp_path / "folded"))
        assert float((one - two).abs().max()) < 1e-4 * float(one.abs().max())
    note(method, fold=folds)
