"""``metamask-solo benchmark``: methods × seeds from a YAML file, to an answer in words."""

import argparse
from typing import Any

from metamask_solo.commands.options import Parser

RESULTS, MARKDOWN, PAGE = "results.csv", "results.md", "report.html"


def main(argv: list[str]) -> int:
    """Runs what is not finished, and writes the results; 1 if a run failed or is missing."""
    parser = Parser(
        "metamask-solo benchmark",
        description="Pretrains every method with every seed, evaluates each by nearest neighbours "
        f"and a linear probe on held-out images, and writes {RESULTS}, {MARKDOWN}, {PAGE} and "
        "figures to one folder. A second call runs what is missing: a finished run is kept, an "
        "interrupted one continues. On images of your own: metamask-solo benchmark custom "
        "data=FOLDER, where FOLDER holds train/ and val/, class folders, or directly images "
        "without labels. Images without labels in sub-folders: data.train_path=FOLDER "
        "data.no_labels=True.",
        epilog=_packaged_files(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or a name below")
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
        help="print the report of the file that the key rows names; needs no data, and runs and "
        "writes nothing",
    )
    arguments = parser.parse_intermixed_args(argv)

    from metamask_solo.benchmark import launch, report, results
    from metamask_solo.benchmark.plan import read_plan
    from metamask_solo.benchmark.schema import read_file
    from metamask_solo.data.datasets import counted

    if arguments.from_rows:
        _refuse_what_rows_ignore(arguments.overrides)
        benchmark = read_file(arguments.config, arguments.overrides)
        rows = results.rows_of(benchmark)
        line, content = report.summary(benchmark, rows), report.sections(benchmark, rows)
        print(report.markdown(benchmark.name, line, content), end="")
        return 0
    plan = read_plan(arguments.config, arguments.overrides)
    known = results.known_runs(plan)
    for note in plan.notes:
        print(f"note: {note}")
    if not arguments.tables_only:
        pending = launch.pending_runs(plan, known)
        finished = len(plan.runs) - len(pending)
        known_before = f"{finished} finished before{launch.runs_beside(plan)}"
        print(f"{plan.file.name}: {counted(len(plan.runs), 'run')}, {known_before}")
        if pending:
            launch.check_batches(plan, pending)
            with launch.stoppable():
                print(launch.forecast(plan, pending), flush=True)
                launch.execute(plan, pending)
    return _write_results(plan, known)


def _packaged_files() -> str:
    """The packaged files, each with the first line of its comment."""
    from metamask_solo.training.endings import scripts_folder

    lines = ["packaged files:"]
    for path in sorted((scripts_folder() / "benchmark").glob("*.yaml")):
        first = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        lines.append(f"  {path.stem:<24} {first}")
    return "\n".join(lines)


def _refuse_what_rows_ignore(overrides: list[str]) -> None:
    """Rows are what they are: another config or other data would not be theirs."""
    from metamask_solo.errors import UserError

    for override in overrides:
        keys = override.partition("=")[0].rstrip("+").split(".")
        if keys[0] in ("data", "overrides", "search") or keys[-1] == "overrides":
            raise UserError(f"{override}: changes no rows; leave it out with --from-rows")


def _write_results(plan: Any, known: Any) -> int:
    """Writes all that the finished runs allow; returns 1 if a run has no result."""
    from metamask_solo.atomic_files import atomic_write
    from metamask_solo.benchmark import launch, report, results
    from metamask_solo.benchmark.figures import FIGURES, draw_figures

    rows = results.read_results(plan, known)
    missing = int((rows.status != "finished").sum())
    if missing == len(rows) and not (rows.status == "failed").any():
        print(f"nothing is finished yet: no results to show{launch.runs_beside(plan)}")
        return 1
    if earlier := results.set_aside(plan.out / RESULTS, rows):
        print(f"{earlier}: the earlier results, of other settings or images, are there now")
    figures = draw_figures(plan.file, rows)
    title, line = plan.file.name, report.summary(plan.file, rows)
    sections = report.sections(plan.file, rows, plan.notes)
    text = report.markdown(title, line, sections, list(figures))
    contents = {
        **{f"{name}.png": content for name, content in figures.items()},
        RESULTS: results.csv_text(rows).encode(),
        MARKDOWN: text.encode(),
        PAGE: report.page(title, line, sections, figures).encode(),
    }
    for name, content in contents.items():
        with atomic_write(plan.out / name) as path:
            path.write_bytes(content)
    for name in FIGURES - figures.keys():  # of an earlier call
        (plan.out / f"{name}.png").unlink(missing_ok=True)
    results.add_to_file(plan.file, rows)
    print(f"\n{text}\nresults: {plan.out}, to be read in a browser: {plan.out / PAGE}")
    return 1 if missing else 0
