"""``metamask-solo pretrain``: what solo-learn's main_pretrain.py does, on both releases."""

import sys

from omegaconf import DictConfig

from metamask_solo.training import hydra_app, sweeps
from metamask_solo.training.pretraining import check_run, pretrain_run

HELP = "pretrain any method of solo-learn from a YAML file"

# without one of these there is no kNN accuracy for a search to maximise
NO_OBJECTIVE: sweeps.Objective = {
    "knn_eval.enabled": (False, None),
    "data.val_path": (None,),
    "data.no_labels": (True,),
    "limit_val_batches": (0,),
}


def main(argv: list[str]) -> None:
    """Hydra's command line: --config-path, --config-name, overrides, -m for sweeps."""
    hydra_app.run("pretrain", argv, pretrain, NO_OBJECTIVE, check)


def check(cfg: DictConfig) -> None:
    """``--cfg-check``: validates and builds, without training or writing anything."""
    print(f"ok: {check_run(cfg).name}")


def pretrain(cfg: DictConfig) -> float:
    """Pretrains as ``cfg`` says; returns the final kNN accuracy (or 0 without one) for sweepers."""
    return sweeps.objective(pretrain_run(cfg).metrics, "val_knn_acc1")


if __name__ == "__main__":  # the other processes of DDP
    main(sys.argv[1:])
