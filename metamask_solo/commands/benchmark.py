"""``metamask-solo benchmark``: methods × seeds from a YAML file, to a table and figures."""

import argparse
from typing import Any

HELP = "compare methods over seeds, from a YAML file to a table and figures"
RESULTS, REPORT = "results.csv", "results.md"


def main(argv: list[str]) -> int:
    """Runs what is not finished, and writes the results; 1 if a run failed or is missing."""
    parser = argparse.ArgumentParser(
        "metamask-solo benchmark",
        description="Pretrains every method with every seed, evaluates each by nearest neighbours "
        f"and a linear probe on held-out images, and writes {RESULTS}, {REPORT} and figures to one "
        "folder. A second call runs what is missing: a finished run is kept, an interrupted one "
        "continues.",
    )
    parser.add_argument("config", metavar="CONFIG", help="such as scripts/benchmark/smoke.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="keys of CONFIG, such as seeds=[0,1] epochs=5 launcher.name=joblib",
    )
    parser.add_argument(
        "--tables-only", action="store_true", help="run nothing: results of what is finished"
    )
    arguments = parser.parse_args(argv)

    from metamask_solo.benchmark.launch import execute
    from metamask_solo.benchmark.plan import read_plan
    from metamask_solo.data.digits import write_dataset

    plan = read_plan(arguments.config, arguments.overrides)
    if not arguments.tables_only:
        if isinstance(plan.data, str):
            write_dataset(plan.data, plan.out / "datasets")
        execute(plan)
    return 1 if _write_results(plan) else 0


def _write_results(plan: Any) -> int:
    """Writes all that the finished runs allow; returns the number of runs without a result."""
    from metamask_solo.atomic_files import atomic_write
    from metamask_solo.benchmark.figures import draw_figures
    from metamask_solo.benchmark.tables import csv_table, markdown, read_rows

    rows = read_rows(plan)
    figures = draw_figures(plan, rows)
    report = markdown(plan, rows, list(figures))
    for name, content in {
        **{f"{name}.png": content for name, content in figures.items()},
        RESULTS: csv_table(rows).encode(),
        REPORT: report.encode(),
    }.items():
        with atomic_write(plan.out / name) as path:
            path.write_bytes(content)
    print(f"\n{report}\nresults: {plan.out}")
    return sum(row["status"] != "finished" for row in rows)
