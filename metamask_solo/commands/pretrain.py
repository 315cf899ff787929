"""``metamask-solo pretrain``: what solo-learn's main_pretrain.py does, on both releases."""

import sys

from omegaconf import DictConfig

from metamask_solo.training import hydra_app
from metamask_solo.training.pretraining import check_run, pretrain_run

HELP = "pretrain any method of solo-learn from a YAML file"


def main(argv: list[str]) -> None:
    """Hydra's command line: --config-path, --config-name, overrides, -m for sweeps."""
    check_only = hydra_app.CHECK in argv
    argv = [a for a in argv if a != hydra_app.CHECK]
    hydra_app.run("pretrain", argv, check if check_only else pretrain)


def check(cfg: DictConfig) -> None:
    """``--cfg-check``: validates and builds, without training or writing anything."""
    print(f"ok: {check_run(cfg).name}")


def pretrain(cfg: DictConfig) -> float:
    """Pretrains as ``cfg`` says; returns the final kNN accuracy (or 0 without one) for sweepers."""
    return pretrain_run(cfg).metrics.get("val_knn_acc1", 0.0)


if __name__ == "__main__":  # the other processes of DDP
    main(sys.argv[1:])
