"""Going on from a named checkpoint with another config: what its plan fixes is refused."""

from pathlib import Path
from typing import Any

import pytest
from runs import pretrain_config, train

from metamask_solo.errors import UserError

SIMCLR = {"proj_hidden_dim": 16, "proj_output_dim": 8, "temperature": 0.2}
COSINE = {"name": "warmup_cosine", "warmup_epochs": 1}


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


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("optimizer.name", "adam", "optimizer.name=adam: .*run with sgd"),
        ("max_epochs", 1, "max_epochs=1: .* has 2 epochs behind it"),
        ("max_epochs", 4, "max_epochs=4: .*run with 2"),
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
