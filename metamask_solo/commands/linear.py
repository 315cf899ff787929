"""``metamask-solo linear``: what solo-learn's main_linear.py does, on both releases."""

import sys

from metamask_solo.errors import UserError
from metamask_solo.training import hydra_app
from metamask_solo.training.linear import prepare_probe, probe_run


def main(argv: list[str], name: str = "linear") -> None:
    """Hydra's command line; masked=true|false chooses the features of a MetaMask checkpoint."""
    if name == "finetune":
        for argument in argv:
            if argument.lstrip("+~").startswith("finetune="):
                raise UserError(
                    f"{argument}: this command trains the backbone; without it, `linear`"
                )
        argv = [*argv, "++finetune=True"]
    hydra_app.run(name, argv, probe_run, prepare_probe, "val_acc1")


if __name__ == "__main__":  # the other processes of DDP
    main(sys.argv[1:])
