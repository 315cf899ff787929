"""RankMe while training, against a singular value decomposition of the same features."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import pretrain_config

from metamask_solo.evaluation.features import effective_rank
from metamask_solo.hosts import pl
from metamask_solo.training.pretraining import pretrain_run
from metamask_solo.training.rankme import RankMe, trend
from metamask_solo.training.resume import read_metrics


class Record(pl.Callback):
    """Keeps what the backbone gives within training_step, epoch by epoch."""

    def __init__(self) -> None:
        self.epochs: list[list[torch.Tensor]] = []
        self.masks: list[torch.Tensor] = []

    def on_train_start(self, trainer: Any, model: Any) -> None:
        backbone = getattr(model, "backbone", None) or model.encoder
        step, inside = model.training_step, [False]

        def training_step(*args: Any) -> Any:
            inside[0] = True
            try:
                return step(*args)
            finally:
                inside[0] = False

        def hear(module: Any, inputs: Any, output: torch.Tensor) -> None:
            if inside[0]:
                self.epochs[-1].append(output.detach().clone())

        model.training_step = training_step
        backbone.register_forward_hook(hear)

    def on_train_epoch_start(self, trainer: Any, model: Any) -> None:
        self.epochs.append([])

    def on_train_epoch_end(self, trainer: Any, model: Any) -> None:
        if hasattr(model, "mask"):
            self.masks.append(model.mask.mask().detach().clone())


def rankme(features: np.ndarray) -> float:
    values = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    share = values / values.sum()
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("method", ["metamask", "simclr"])
def test_it_is_that_of_the_features_of_the_epoch(
    method: str, labels: bool, images: Path, tmp_path: Path
) -> None:
    cfg = pretrain_config(images, tmp_path, method, max_epochs=2, optimizer__lr=0.01)
    if method == "simclr":
        cfg.method_kwargs = {"proj_hidden_dim": 16, "proj_output_dim": 8, "temperature": 0.2}
    if not labels:
        cfg.data.no_labels, cfg.data.val_path = True, None
    record = Record()
    result = pretrain_run(cfg, callbacks=(record,))

    rows = [row for row in read_metrics(result.folder) if row.get("train_rankme")]
    assert len(rows) == len(record.epochs) == 2
    expected = [rankme(torch.cat(epoch).numpy()) for epoch in record.epochs]
    found = [float(row["train_rankme"]) for row in rows]
    assert found == pytest.approx(expected, rel=1e-3)
    slope = float(rows[1]["train_rankme_trend"])
    assert slope == pytest.approx(found[1] - found[0], rel=1e-3, abs=1e-4)
    if method == "metamask":
        masked = (torch.cat(record.epochs[1]) * record.masks[1]).numpy()
        assert float(rows[1]["train_rankme_masked"]) == pytest.approx(rankme(masked), rel=1e-3)


def test_memory_does_not_grow_with_the_steps() -> None:
    module, callback = torch.nn.Linear(6, 4), RankMe()
    model = type("Model", (), {"backbone": module})()
    callback.on_train_start(None, model)
    for step in range(3):
        callback.on_train_batch_start(None, model, None, step)
        module(torch.randn(50, 6))
        callback.on_before_backward(None, model, None)
        module(torch.full((50, 6), 1e9))  # as the mask's update would: not counted
    assert callback._second is not None
    assert callback._second.shape == (4, 4) and callback._second.max() < 1e6
    callback.on_train_end(None, model)
    assert not module._forward_hooks


def test_the_least_and_the_most() -> None:
    assert effective_rank(torch.eye(7)) == pytest.approx(7)
    assert effective_rank(torch.ones(7, 7)) == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.zeros(7, 7)) == 0
    assert trend([1.0]) is None
    assert trend([1.0, 3.0, 5.0]) == pytest.approx(np.polyfit(range(3), [1, 3, 5], 1)[0])
