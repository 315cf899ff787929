"""``metamask-solo finetune``: the linear command with ``finetune`` on."""

import sys

from omegaconf import DictConfig

HELP = "train backbone and classifier, starting from a checkpoint"


def main(argv: list[str]) -> None:
    """Hydra's command line, and the configs of ``metamask-solo linear``."""
    from metamask_solo.training import hydra_app

    hydra_app.run("finetune", argv, finetune)


def finetune(cfg: DictConfig) -> float:
    """Trains the backbone too, whatever the config says; returns the final accuracy."""
    from metamask_solo.commands.linear import linear
    from metamask_solo.training.hydra_app import open_config

    cfg = open_config(cfg)
    cfg.finetune = True
    return linear(cfg)


if __name__ == "__main__":  # the other processes of DDP
    main(sys.argv[1:])
