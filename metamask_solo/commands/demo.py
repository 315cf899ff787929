"""``metamask-solo demo``: from nothing to a table and a figure, on the digits."""

import argparse
import json
from pathlib import Path
from typing import Any

HELP = "from nothing to a table: data, three methods, two evaluations, one figure"
MODELS = ("metamask", "simclr", "barlow")
# MetaMask's overrides of each preset
PRESETS = {"fast": ["variant=fast"], "paper": []}
MEANING = (
    "kNN: a vote of the nearest training images; linear: a linear classifier on the features.\n"
    "This is one run of each, on easy images: differences of two points may be chance, and an\n"
    "untrained backbone or the pixels may be better. `metamask-solo benchmark` takes several seeds."
)


def main(argv: list[str]) -> int:
    """Runs scripts/benchmark/demo.yaml; a second call continues where the first stopped."""
    parser = argparse.ArgumentParser(
        "metamask-solo demo",
        description="Makes a data set, pretrains MetaMask, SimCLR and Barlow Twins with "
        "solo-learn's ResNet-18, evaluates each by nearest neighbours and a linear probe beside an "
        "untrained backbone and raw pixels, and ends with a table and a figure.",
    )
    parser.add_argument("--dataset", choices=("digits", "textured-digits"), default="digits")
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        default="fast",
        help="MetaMask with the cheap mask update, or with the paper's at each step",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), help="folder for all that it writes"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides of all runs"
    )
    args = parser.parse_intermixed_args(argv)

    from metamask_solo.analysis.curves import draw_curves, read_runs
    from metamask_solo.atomic_files import atomic_write
    from metamask_solo.benchmark.launch import execute
    from metamask_solo.benchmark.plan import read_plan
    from metamask_solo.benchmark.rows import read_rows
    from metamask_solo.data import digits
    from metamask_solo.training.endings import print_ending, scripts_folder

    plan = read_plan(
        scripts_folder() / "benchmark" / "demo.yaml",
        [
            f"data={args.dataset}",
            f"out={json.dumps(str(args.out))}",
            f"epochs={args.epochs}",
            f"overrides={json.dumps(args.overrides)}",
            *(f"methods.{name}.config={args.dataset}/{name}.yaml" for name in MODELS),
            f"methods.metamask.overrides={json.dumps(PRESETS[args.preset])}",
        ],
    )
    digits.write_dataset(args.dataset, plan.out / "datasets")
    execute(plan)
    rows = read_rows(plan)
    failed = [row for row in rows if row.status != "finished"]
    if failed:
        return 1  # the reason was printed when it happened
    table = _table(rows)
    with atomic_write(args.out / f"{args.dataset}.txt") as path:
        path.write_text(table + "\n")
    trained = {run.method: run.training for run in plan.runs if run.method in MODELS}
    figure = args.out / f"{args.dataset}.png"
    with atomic_write(figure) as path:
        path.write_bytes(draw_curves(read_runs(list(trained.values()))))
    print(f"\n{args.dataset}, {args.epochs} epochs; accuracy in % on the val images\n")
    print(table)
    print(f"\n{MEANING}\n\nfigure: {figure}")
    checkpoint = trained["metamask"]
    print_ending(f"checkpoint of MetaMask: {checkpoint}", ["analyze", checkpoint])
    return 0


def _table(rows: list[Any]) -> str:
    from metamask_solo.benchmark.tables import REFERENCE_NAMES

    lines = [f"{'method':<16} {'kNN %':>6} {'linear %':>9} {'s / epoch':>10}"]
    for row in rows:
        name = REFERENCE_NAMES.get(row.method, row.method)
        time = "" if row.seconds_per_epoch is None else f"{row.seconds_per_epoch:.1f}"
        accuracies = f"{row.metrics['knn']:>6.1f} {row.metrics['linear']:>9.1f}"
        lines.append(f"{name:<16} {accuracies} {time:>10}")
    return "\n".join(lines)
