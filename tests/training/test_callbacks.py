"""Callbacks: RankMe, the forecast, and those that a config names."""

import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from runs import pretrain_config, train

from metamask_solo.hosts import pl
from metamask_solo.training.callbacks import Bar, RankMe
from metamask_solo.training.resume import read_metrics


class Record(pl.Callback):  # type: ignore[name-defined]
    """Keeps what the backbone gives within training_step, epoch by epoch, and the mask."""

    def __init__(self) -> None:
        self.epochs: list[list[torch.Tensor]] = []
        self.masks: list[torch.Tensor] = []

    def on_train_start(self, trainer: Any, model: Any) -> None:
        step = model.training_step

        def keep(module: Any, inputs: Any, output: torch.Tensor) -> None:
            self.epochs[-1].append(output.detach().clone())

        def training_step(*args: Any) -> Any:
            handle = model.backbone.register_forward_hook(keep)
            try:
                return step(*args)
            finally:
                handle.remove()

        model.training_step = training_step

    def on_train_epoch_start(self, trainer: Any, model: Any) -> None:
        self.epochs.append([])

    def on_train_epoch_end(self, trainer: Any, model: Any) -> None:
        self.masks.append(model.mask.mask().detach().clone())


def rank_of(features: np.ndarray) -> float:
    values = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    share = values[values > 0] / values.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def test_rankme_is_that_of_the_features_of_the_epoch(images: Path, tmp_path: Path) -> None:
    """Of those of the loss alone: the mask's update computes others."""
    record = Record()
    cfg = pretrain_config(images, tmp_path, max_epochs=2, optimizer__lr=0.01)
    _, result = train(cfg, record, RankMe())

    rows = read_metrics(result.folder).dropna(subset="train_rankme")
    features = [torch.cat(epoch).numpy() for epoch in record.epochs]
    ranks = list(rows["train_rankme"])
    assert ranks == pytest.approx([rank_of(f) for f in features], rel=1e-3)
    masked = features[1] * record.masks[1].numpy()
    assert rows["train_rankme_masked"].iloc[1] == pytest.approx(rank_of(masked), rel=1e-3)


def test_rankme_holds_the_last_views_alone_and_listens_where_something_is_logged() -> None:
    module, callback = torch.nn.Linear(6, 4), RankMe()
    model = SimpleNamespace(backbone=module)
    callback.on_train_start(SimpleNamespace(loggers=[]), model)
    assert not module._forward_hooks
    callback.on_train_start(SimpleNamespace(loggers=[1]), model)
    for step in range(5):
        callback.on_train_batch_start(None, model, None, step)
        last = module(torch.randn(10, 6))
    assert sum(map(len, callback._features)) == 20  # at least 4 × 4
    assert torch.equal(callback._features[-1], last)


def test_a_long_run_says_how_long_it_will_take(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Slow(pl.Callback):  # type: ignore[name-defined]
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            time.sleep(0.2)
            trainer.should_stop = trainer.global_step > 4

    cfg = pretrain_config(images, tmp_path, max_epochs=50_000)
    cfg.method_kwargs.meta = {"every_n_steps": 4}
    train(cfg, Slow())
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("forecast: ")]
    assert re.fullmatch(r"forecast: \d+:\d\d:00 on this CPU, 0\.\d+ s a step", line)


def named(target: str, **settings: Any) -> Any:
    return {"_target_": f"{pl.__name__}.callbacks.{target}", **settings}


def test_callbacks_of_a_config_work_and_go_on(images: Path, tmp_path: Path) -> None:
    def run(*more: Any) -> Any:
        cfg = pretrain_config(images, tmp_path, "simclr", max_epochs=50, auto_resume__enabled=True)
        cfg.callbacks = [
            named("EarlyStopping", monitor="val_loss", mode="max", patience=0),
            named("ModelCheckpoint", every_n_epochs=1, save_top_k=-1),
            named("TQDMProgressBar"),
        ]
        if hasattr(pl.callbacks, "EMAWeightAveraging"):  # Lightning 2.6
            cfg.callbacks.append(named("EMAWeightAveraging", decay=0.5))
        cfg.enable_progress_bar = True
        return train(cfg, *more)

    class Stop(pl.Callback):  # type: ignore[name-defined]
        def on_train_epoch_start(self, trainer: Any, model: Any) -> None:
            if trainer.current_epoch == 1:
                raise InterruptedError

    with pytest.raises(InterruptedError):
        run(Stop())
    model, result = run()
    assert 2 < model.trainer.global_step < 100  # stopped early, and continued
    assert len(list(result.folder.rglob("checkpoints/*.ckpt"))) == model.trainer.current_epoch


def test_the_bar_shows_loss_knn_and_mask_and_no_version_number() -> None:
    known = {"val_knn_acc1": 61.25, "mask_min": 0.41, "mask_max": 0.6, "lr": 0.1, "v_num": 3.0}
    known |= {"train_nce_loss_step": 1.23456, "train_nce_loss_epoch": 2.0, "val_loss": 1.0}
    trainer = SimpleNamespace(callback_metrics={k: torch.tensor(v) for k, v in known.items()})
    assert Bar().get_metrics(trainer, None) == {
        **{"train_nce_loss_step": "1.23", "val_knn_acc1": "61.2"},
        **{"mask_min": "0.41", "mask_max": "0.6"},
    }
