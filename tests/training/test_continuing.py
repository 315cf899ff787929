"""Going on with another config: on the plan of the file from where the run stood, or refused."""

import csv
import math
from pathlib import Path
from typing import Any

import pytest
from runs import pretrain_config, train

from metamask_solo.errors import UserError

SIMCLR = {"proj_hidden_dim": 16, "proj_output_dim": 8, "temperature": 0.2}
COSINE = {"name": "cosine"}


def config(images: Path, out: Path, epochs: int, lr: float = 1.0, **overrides: Any) -> Any:
    cfg = pretrain_config(images, out, "simclr", max_epochs=epochs, log_every_n_steps=1)
    cfg.method_kwargs = SIMCLR
    cfg.data.val_path = None
    cfg.optimizer.lr = lr * 256 / 10  # solo-learn scales by the batch of 10
    cfg.scheduler = COSINE
    for key, value in overrides.items():
        cfg[key] = value
    return cfg


@pytest.fixture(scope="module")
def checkpoint(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished epochs of two steps, on a cosine that ended at 0."""
    _, result = train(config(images, tmp_path_factory.mktemp("first"), 2))
    return result.checkpoint


def rates(folder: Path) -> list[float]:
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    ends = ("/encoder", "/backbone")
    (column,) = (c for c in rows[0] if c.startswith("lr-") and c.endswith(ends))
    return [float(row[column]) for row in rows if row[column]]


def test_more_epochs_are_on_the_schedule_of_the_new_length(
    checkpoint: Path, images: Path, tmp_path: Path
) -> None:
    cfg = config(images, tmp_path, 4, lr=0.5, resume_from_checkpoint=str(checkpoint))
    cfg.optimizer.weight_decay = 0.25
    model, result = train(cfg)
    wanted = [0.5 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(4, 8)]
    assert rates(result.folder) == pytest.approx(wanted, rel=1e-12)
    assert model.trainer.optimizers[0].param_groups[0]["weight_decay"] == 0.25


def test_another_schedule_and_batch_size_stand_where_the_run_was(
    checkpoint: Path, images: Path, tmp_path: Path
) -> None:
    cfg = config(images, tmp_path, 3, lr=0.5, resume_from_checkpoint=str(checkpoint))
    cfg.optimizer.batch_size = 5
    cfg.scheduler = {"name": "step", "lr_decay_steps": [1]}
    _, result = train(cfg)
    assert rates(result.folder) == pytest.approx([0.5 * 5 / 10 / 10] * 4, rel=1e-12)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("optimizer.name", "adam", "optimizer.name=adam: .* is of a run with sgd"),
        ("max_epochs", 1, "max_epochs=1: .* has 2 epochs behind it"),
    ],
)
def test_what_cannot_go_on_is_refused(
    key: str, value: Any, message: str, checkpoint: Path, images: Path, tmp_path: Path
) -> None:
    cfg = config(images, tmp_path, 3, resume_from_checkpoint=str(checkpoint))
    if "." in key:
        cfg.optimizer.name = value
    else:
        cfg[key] = value
    with pytest.raises(UserError, match=message):
        train(cfg)
    assert not list(tmp_path.rglob("args.json"))
