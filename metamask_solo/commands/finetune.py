"""``metamask-solo finetune``: the linear command with ``finetune`` on."""

import sys

from omegaconf import DictConfig

from metamask_solo.training import hydra_app, sweeps
from metamask_solo.training.probing import probe_run

HELP = "train backbone and classifier, starting from a checkpoint"


def main(argv: list[str]) -> None:
    """Hydra's command line, and the configs of ``metamask-solo linear``."""
    hydra_app.run("finetune", argv, finetune, {"limit_val_batches": (0,)})


def finetune(cfg: DictConfig) -> float:
    """Trains the backbone too, whatever the config says; returns the final accuracy."""
    cfg = hydra_app.open_config(cfg)
    cfg.finetune = True
    return sweeps.objective(probe_run(cfg).metrics, "val_acc1")


if __name__ == "__main__":  # the other processes of DDP
    main(sys.argv[1:])
