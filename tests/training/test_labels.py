"""Runs without labels: what is logged."""

from pathlib import Path

import numpy as np
import pytest
from runs import pretrain_config, train

from metamask_solo.training.resume import read_metrics

SIMCLR = {"proj_hidden_dim": 16, "proj_output_dim": 16, "temperature": 0.2}
BYOL = {"proj_hidden_dim": 16, "proj_output_dim": 16, "pred_hidden_dim": 16}


@pytest.mark.parametrize("method", ["metamask", "simclr", "byol"])
def test_training_without_labels_goes_on_and_logs_no_classifier(
    method: str, images: Path, tmp_path: Path
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, image in enumerate(sorted((images / "train").rglob("*.png"))):
        (flat / f"{i}.png").symlink_to(image)
    cfg = pretrain_config(images, tmp_path, method, max_epochs=2, data__no_labels=True)
    cfg.data.train_path = str(flat)
    cfg.log_every_n_steps = 1
    if method == "byol":
        cfg.method_kwargs, cfg.momentum = BYOL, {}
    elif method == "simclr":
        cfg.method_kwargs = SIMCLR
    model, fit = train(cfg)

    assert model.trainer.global_step == 4
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    rows = read_metrics(fit.folder)
    columns = {name for row in rows for name in row}
    assert any(name.startswith("train_") for name in columns)
    assert not {name for name in columns if "class_loss" in name or "acc" in name}
    assert all(np.isfinite(float(value)) for row in rows for value in row.values() if value)
