"""``metamask-solo pretrain``: what solo-learn's main_pretrain.py does, on both releases."""

import sys

from metamask_solo.training import hydra_app
from metamask_solo.training.pretrain import prepare_pretraining, pretrain_run


def main(argv: list[str]) -> None:
    """Hydra's command line: --config-path, --config-name, overrides, -m for sweeps."""
    hydra_app.run("pretrain", argv, pretrain_run, prepare_pretraining, "val_knn_acc1")


if __name__ == "__main__":  # the other processes of DDP
    main(sys.argv[1:])
