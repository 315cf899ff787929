"""``metamask-solo step-cost``: what one training step of each method costs, as ratios to joint."""

import json
from dataclasses import asdict

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

    from metamask_solo.atomic_files import atomic_write

    setting = step_cost.Setting(
        arguments.backbone,
        arguments.stem,
        arguments.image_size,
        arguments.batch_size,
        arguments.device,
        arguments.precision,
    )
    costs = step_cost.measure(setting, arguments.rounds, arguments.only)
    print(step_cost.table(costs))
    if arguments.json is not None:
        with atomic_write(arguments.json) as path:
            path.write_text(json.dumps(asdict(costs), indent=1))
