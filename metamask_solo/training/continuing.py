"""Going on from a checkpoint with another config: what can, and what is refused.

A schedule stands where the run stopped, on the plan of the file: more epochs, another rate,
another schedule and another size of batches are taken as the file says. What cannot be taken over
is refused by the key that differs.
"""

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from metamask_solo.checkpoints.reading import load_raw
from metamask_solo.errors import UserError
from metamask_solo.training.callbacks import position

# what the state in a checkpoint is the state of
SAME = ("method", "backbone.name", "optimizer.name")
# what a position inside an epoch counts in
SAME_INSIDE_EPOCH = (
    "optimizer.batch_size",
    "accumulate_grad_batches",
    "devices",
    "num_nodes",
    "seed",
    "data.train_path",
)
# what a rate that is lowered as training goes was lowered from
SAME_FOR_REDUCE = ("scheduler.name", "optimizer.lr")


def check_continuation(cfg: DictConfig, path: Path) -> None:
    """Raises UserError where a run of ``cfg`` cannot go on from a checkpoint.

    Args:
        cfg: a completed config.
        path: the checkpoint, with the args.json of its run beside it where there is one.
    """
    epochs, batches = position(load_raw(path))
    if epochs > cfg.max_epochs:
        raise UserError(f"max_epochs={cfg.max_epochs}: {path} has {epochs} epochs behind it")
    try:
        other = OmegaConf.create(json.loads((path.parent / "args.json").read_text()))
    except (OSError, ValueError):
        return
    keys = SAME + (SAME_INSIDE_EPOCH if batches else ())
    if "reduce" in (_value(cfg, "scheduler.name"), _value(other, "scheduler.name")):
        keys += SAME_FOR_REDUCE
    for key in keys:
        given, before = _value(cfg, key), _value(other, key)
        if before is not None and given != before:
            raise UserError(
                f"{key}={given}: {path} is of a run with {before}, and cannot go on otherwise"
            )


def _value(cfg: Any, key: str) -> Any:
    value = OmegaConf.select(cfg, key, default=None) if OmegaConf.is_config(cfg) else None
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
