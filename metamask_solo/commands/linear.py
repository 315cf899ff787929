"""``metamask-solo linear``: what solo-learn's main_linear.py does, on both releases."""

import sys

from omegaconf import DictConfig

from metamask_solo.training import hydra_app, sweeps
from metamask_solo.training.probing import check_probe, probe_run

HELP = "train a linear probe on a checkpoint's frozen features"


def main(argv: list[str]) -> None:
    """Hydra's command line; masked=true|false chooses the features of a MetaMask checkpoint."""
    hydra_app.run("linear", argv, linear, {"limit_val_batches": (0,)}, check)


def check(cfg: DictConfig) -> None:
    """``--cfg-check``: validates and builds, without training or writing anything."""
    print(f"ok: {check_probe(cfg).name}")


def linear(cfg: DictConfig) -> float:
    """Trains the probe, or backbone and probe with ``finetune``; returns the final accuracy."""
    return sweeps.objective(probe_run(cfg).metrics, "val_acc1")


if __name__ == "__main__":  # the other processes of DDP
    main(sys.argv[1:])
