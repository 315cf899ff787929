"""``metamask-solo finetune``: the linear command that trains the backbone, too."""

import sys

from metamask_solo.commands import linear


def main(argv: list[str]) -> None:
    """Hydra's command line, and the configs of ``metamask-solo linear``."""
    linear.main(argv, "finetune")


if __name__ == "__main__":  # the other processes of DDP
    main(sys.argv[1:])
