"""``metamask-solo profile``: where the time of one epoch of a run goes."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

HELP = "time one epoch of a run by part: reading, each augmentation, training, mask update"


def main(argv: list[str]) -> None:
    """Prints the table, and writes it as JSON where that is asked for.

    Raises:
        UserError: the file or a setting cannot be used.
    """
    parser = argparse.ArgumentParser(
        "metamask-solo profile",
        description="Trains one epoch of a pretraining file and says how long each part took. "
        "Images are read by the process that trains (no workers), so that the parts add up to the "
        "whole; with workers, what stands above `forward` runs beside the rest. The first step is "
        "not counted, and nothing is kept of the run.",
    )
    parser.add_argument(
        "config", metavar="RUN-CONFIG", help="scripts/pretrain/digits/metamask.yaml"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides")
    parser.add_argument("--steps", type=int, metavar="N", help="(default: a whole epoch)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")
    arguments = parser.parse_intermixed_args(argv)

    from metamask_solo.atomic_files import atomic_write
    from metamask_solo.benchmark import profiling

    report = profiling.profile(arguments.config, arguments.overrides, arguments.steps)
    print(f"{report.method}, {report.steps} steps, {report.images} images")
    print(profiling.table(report))
    if arguments.json is not None:
        with atomic_write(arguments.json) as path:
            path.write_text(json.dumps(asdict(report), indent=1) + "\n")
