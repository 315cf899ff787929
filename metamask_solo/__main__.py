"""The command line: ``metamask-solo COMMAND …``, also ``python -m metamask_solo COMMAND …``."""

import importlib
import os
import sys
import traceback

COMMANDS = {
    "demo": "from nothing to a table: data, three methods, two evaluations, one figure",
    "data": "write a data set that packages ship as image folders",
    "pretrain": "pretrain any method of solo-learn from a YAML file",
    "linear": "train a linear probe on a checkpoint's frozen features",
    "finetune": "train backbone and classifier, starting from a checkpoint",
    "knn": "nearest-neighbour accuracy of a checkpoint's features",
    "umap": "draw a checkpoint's features in two dimensions",
    "fold": "fold the mask of a checkpoint into the weights of its backbone",
    "run": "run a script of your own solo-learn clone with MetaMask registered",
    "analyze": "what a trained mask did: redundancy, confounders, bounds",
    "step-cost": "time one training step of each method",
}
TRACEBACK = "--traceback"


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: metamask-solo COMMAND [ARGUMENTS]",
            "",
            *lines,
            "",
            "metamask-solo COMMAND --help explains a command.",
            f"{TRACEBACK} anywhere shows where an error came from.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 2 for bad input, 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # what stands behind `run SCRIPT` is the script's
    ours = arguments[:1] if arguments[:1] == ["run"] else arguments
    show = TRACEBACK in ours or bool(os.environ.get("METAMASK_SOLO_TRACEBACK"))
    if ours is arguments:
        arguments = [a for a in arguments if a != TRACEBACK]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"metamask-solo: error: unknown command {name}; {usage()}", file=sys.stderr)
        return 2
    from metamask_solo.errors import UserError

    try:
        module = importlib.import_module(f"metamask_solo.commands.{name.replace('-', '_')}")
        return module.main(rest) or 0
    except (UserError, ImportError) as error:
        if show:
            traceback.print_exc()
        print(f"metamask-solo {name}: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"metamask-solo {name}: interrupted", file=sys.stderr)
        return 130


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
