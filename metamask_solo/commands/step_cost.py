"""``metamask-solo step-cost``: what one training step of each method costs, as ratios to joint."""

import argparse
import json
from dataclasses import asdict

from metamask_solo.paths import user_path


def main(argv: list[str]) -> None:
    """Times the variants in turn, so that a slower moment of the machine hits all of them."""
    parser = argparse.ArgumentParser(
        "metamask-solo step-cost",
        description="Times one training step of SimCLR, Barlow Twins, both losses without a mask "
        "update (joint), MetaMask in each of its ways, and a plain finite-difference algorithm "
        "with a second model (two_models), interleaved. Prints median ratios to joint.",
    )
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--stem", choices=("3x3", "standard"), default="3x3", help="of a ResNet")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds after one warm-up")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, …")
    parser.add_argument("--precision", choices=("32", "bf16", "16"), default="32")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="joint and these alone")
    parser.add_argument(
        "--json", type=user_path, metavar="FILE", help="also write all figures there"
    )
    args = parser.parse_args(argv)

    from metamask_solo.atomic_files import atomic_write
    from metamask_solo.benchmark import step_cost

    setting = step_cost.Setting(
        args.backbone, args.stem, args.image_size, args.batch_size, args.device, args.precision
    )
    report = step_cost.measure(setting, args.rounds, args.only)
    print(step_cost.table(report))
    if args.json is not None:
        with atomic_write(args.json) as path:
            path.write_text(json.dumps(asdict(report), indent=1))
