"""``metamask-solo finetune``: the linear command with ``finetune`` on."""

import sys

from omegaconf import DictConfig

from metamask_solo.training import hydra_app, sweeps
from metamask_solo.training.probing import check_probe, probe_run

HELP = "train backbone and classifier, starting from a checkpoint"


def main(argv: list[str]) -> None:
    """Hydra's command line, and the configs of ``metamask-solo linear``."""
    hydra_app.run("finetune", argv, finetune, {"limit_val_batches": (0,)}, check)


def check(cfg: DictConfig) -> None:
    """``--cfg-check``: validates and builds, without training or writing anything."""
    print(f"ok: {check_probe(_with_backbone(cfg)).name}")


def finetune(cfg: DictConfig) -> float:
    """Trains the backbone too, whatever the config says; returns the final accuracy."""
    return sweeps.objective(probe_run(_with_backbone(cfg)).metrics, "val_acc1")


def _with_backbone(cfg: DictConfig) -> DictConfig:
    cfg = hydra_app.open_config(cfg)
    cfg.finetune = True
    return cfg


if __name__ == "__main__":  # the other processes of DDP
    main(sys.argv[1:])
