"""``metamask-solo step-cost``: what one training step of each method costs, as ratios to joint."""

import json
import platform
from dataclasses import fields

from metamask_solo.commands.options import command_parser, count
from metamask_solo.paths import user_path


def main(argv: list[str]) -> None:
    """Times the variants in turn, so that a slower moment of the machine hits all of them."""
    from metamask_solo.benchmark import step_cost

    parser = command_parser(
        "step-cost",
        ": of SimCLR, Barlow Twins, both losses without a mask update (joint), MetaMask in each of "
        "its ways, and a plain finite-difference algorithm with a second model (two_models), in "
        "turn. Prints median ratios to joint.",
    )
    add = parser.add_argument
    add("--backbone", default="resnet18", help="any of solo-learn's")
    add("--stem", choices=("3x3", "standard"), default="3x3", help="of a ResNet")
    add("--image-size", type=int, default=32, help="pixels a side")
    add("--batch-size", type=int, default=64, help="images")
    add("--rounds", type=count(), default=7, help="counted rounds after one warm-up")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, …")
    add("--precision", choices=("32", "bf16", "16"), default="32", help="of the network")
    variants = tuple(step_cost.VARIANTS)
    add("--only", nargs="+", choices=variants, metavar="VARIANT", help="joint and these alone")
    add("--json", type=user_path, metavar="FILE", help="also write all figures there")
    arguments = parser.parse_args(argv)

    import torch

    from metamask_solo.atomic_files import atomic_write
    from metamask_solo.hosts import RELEASE

    names = [field.name for field in fields(step_cost.Setting)]
    setting = {name: getattr(arguments, name) for name in names}
    seconds, memory = step_cost.measure(
        step_cost.Setting(**setting), arguments.rounds, arguments.only
    )
    print(step_cost.table(seconds, memory).to_string(float_format="%.2f"))
    if arguments.json is not None:
        content = {
            "setting": setting,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "versions": {"torch": torch.__version__, "solo-learn": RELEASE},
            "seconds": seconds.to_dict("list"),
            "memory_mib": memory.to_dict(),
        }
        with atomic_write(arguments.json) as path:
            path.write_text(json.dumps(content, indent=1))
