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
        help="keys of CONFIG, such as seeds=[0,1] epochs=5 launcher.name=joblib; KEY+=[…] adds to "
        "a list, such as overrides+=[precision=32]",
    )
    parser.add_argument(
        "--tables-only", action="store_true", help="run nothing: results of what is finished"
    )
    parser.add_argument(
        "--from-rows",
        action="store_true",
        help="run nothing, need no data, write nothing: print the report of the rows in the file "
        "that the key rows names",
    )
    arguments = parser.parse_intermixed_args(argv)

    from metamask_solo.benchmark.file import read_file
    from metamask_solo.benchmark.launch import execute
    from metamask_solo.benchmark.plan import read_plan
    from metamask_solo.benchmark.rows import check_rows
    from metamask_solo.data.digits import write_dataset

    if arguments.from_rows:
        _refuse_what_rows_ignore(arguments.overrides)
        print(report_of_rows(read_file(arguments.config, arguments.overrides)), end="")
        return 0
    plan = read_plan(arguments.config, arguments.overrides)
    check_rows(plan)
    for note in plan.notes:
        print(f"note: {note}")
    if not arguments.tables_only:
        if isinstance(plan.file.data, str):
            write_dataset(plan.file.data, plan.out / "datasets")
        execute(plan)
    return 1 if _write_results(plan) else 0


def _refuse_what_rows_ignore(overrides: list[str]) -> None:
    """Rows are what they are: another config or other data would not be theirs."""
    from metamask_solo.errors import UserError

    for override in overrides:
        keys = override.partition("=")[0].rstrip("+").split(".")
        if keys[0] in ("data", "overrides", "search") or keys[-1] == "overrides":
            raise UserError(f"{override}: changes no rows; leave it out with --from-rows")


def report_of_rows(benchmark: Any) -> str:
    """The report of a benchmark from its file of rows alone.

    Raises:
        UserError: the benchmark names no such file, or it cannot be read.
    """
    from metamask_solo.benchmark.rows import rows_of_report
    from metamask_solo.benchmark.tables import markdown

    rows, left_out = rows_of_report(benchmark)
    others = "rows of other methods, seeds or epochs"
    note = f"Left out of {benchmark.rows_file.name}: {left_out} {others}."
    return markdown(benchmark, rows, [note] if left_out else [])


def _write_results(plan: Any) -> int:
    """Writes all that the finished runs allow; returns the number of runs without a result."""
    from metamask_solo.atomic_files import atomic_write
    from metamask_solo.benchmark.figures import draw_figures
    from metamask_solo.benchmark.rows import csv_table, known_rows, read_rows
    from metamask_solo.benchmark.tables import markdown

    rows = read_rows(plan)
    figures = draw_figures(plan.file, rows)
    report = markdown(plan.file, rows, plan.notes, list(figures))
    contents = {
        **{plan.out / f"{name}.png": content for name, content in figures.items()},
        plan.out / RESULTS: csv_table(rows).encode(),
        plan.out / REPORT: report.encode(),
    }
    finished = [row for row in rows if row.status == "finished"]
    file = plan.file.rows_file
    if file is not None and finished:
        ours = {row.digest for row in finished}
        others = [row for digest, row in known_rows(plan.file).items() if digest not in ours]
        contents[file] = csv_table([*finished, *others]).encode()
    for place, content in contents.items():
        with atomic_write(place) as path:
            path.write_bytes(content)
    print(f"\n{report}\nresults: {plan.out}")
    return sum(row.status != "finished" for row in rows)
