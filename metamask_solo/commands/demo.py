"""``metamask-solo demo``: the benchmark of demo.yaml, on images from packages."""

import json
from pathlib import Path

from metamask_solo.commands.options import Parser
from metamask_solo.paths import user_path


def main(argv: list[str]) -> int:
    """Runs scripts/benchmark/demo.yaml; a second call continues where the first stopped."""
    parser = Parser(
        "metamask-solo demo",
        description="Makes a data set, pretrains MetaMask, SimCLR and Barlow Twins with "
        "solo-learn's ResNet-18, evaluates each by nearest neighbours and a linear probe beside an "
        "untrained backbone and the pixels, and ends with a table and figures: `metamask-solo "
        "benchmark demo` with one seed.",
    )
    parser.add_argument("--dataset", choices=("digits", "textured-digits"), default="digits")
    parser.add_argument("--epochs", type=int, default=7, help="(default: 7)")
    parser.add_argument("--out", type=user_path, default=Path("demo"), help="(default: demo)")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides of all runs"
    )
    arguments = parser.parse_intermixed_args(argv)

    from metamask_solo.commands import benchmark

    keys = [f"data={arguments.dataset}", f"out={json.dumps(str(arguments.out))}"]
    keys += [f"epochs={arguments.epochs}", f"overrides+={json.dumps(arguments.overrides)}"]
    return benchmark.main(["demo", *keys])
