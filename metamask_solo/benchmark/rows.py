"""The rows of a benchmark, one a run: from the files of its runs, and from and to CSV."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd
from pydantic import ValidationError

from metamask_solo.benchmark.file import EVALUATIONS, LABEL_FREE, BenchmarkFile
from metamask_solo.benchmark.plan import Plan, Run, override_list
from metamask_solo.benchmark.records import Failure, Result, first_error
from metamask_solo.errors import UserError

COSTS = ("seconds_per_epoch", "seconds_per_step", "peak_memory_mib", "parameters")
VERSIONS = ("metamask-solo", "solo-learn", "torch", "lightning", "python")
METRICS = (*EVALUATIONS, *(f"{name}_plain" for name in EVALUATIONS))
CHOSEN = tuple(f"{name}_C" for name in METRICS if name.startswith("linear"))
MEASURES = tuple(f"{name}_measure" for name in EVALUATIONS)
DIGESTS = ("digest", "config_digest", "data_digest")
COLUMNS = (
    *("method", "setting", "seed", "status", *METRICS, *CHOSEN, *MEASURES, *COSTS, "epochs"),
    *("device", "commit", *VERSIONS, *DIGESTS, "folder", "curve"),
)
# fields of a row that are columns of the same name
IDENTITY = ("method", "setting", "seed", "status", *DIGESTS, "folder", "error")
FOUND = (*COSTS, "epochs", "device", "commit")
TEXTS = {*IDENTITY, "device", "commit", *VERSIONS} - {"seed"}
INTEGERS = ("seed", "epochs", *MEASURES)
LOGGED = "logged/"
Status = Literal["finished", "failed", "pending"]


class Row(Result):
    """A run and, where it is finished, its result.

    Attributes:
        measures: the number in ``EVALUATIONS`` of each evaluation when it measured this run.
        config_digest, data_digest: those of the :class:`Run`. Older rows have none of the three.
    """

    method: str
    setting: str = ""
    seed: int
    status: Status
    metrics: dict[str, float] = {}
    measures: dict[str, int] = {}
    digest: str | None = None
    config_digest: str | None = None
    data_digest: str | None = None
    folder: str | None = None
    error: str | None = None

    @property
    def variant(self) -> str:
        """The method and its setting."""
        return f"{self.method} {self.setting}".strip()

    def measure(self, name: str) -> int:
        """The number of an evaluation when it measured this run."""
        # a row that does not say: the second linear probe was the first that chose its C
        unsaid = 2 if name == "linear" and name in self.chosen else 1
        return self.measures.get(name, unsaid)


def read_rows(plan: Plan) -> list[Row]:
    """One row for each run, in the order of methods, settings and seeds."""
    variants = list(dict.fromkeys(run.variant for run in plan.runs))
    order = sorted(plan.runs, key=lambda run: (variants.index(run.variant), run.seed))
    # variants of one method stand together, in the order of the file
    order.sort(key=lambda run: plan.file.shown.index(run.method))
    known = known_rows(plan.file)
    return [_row(plan, run, known) for run in order]


def known_rows(benchmark: BenchmarkFile) -> dict[str, Row]:
    """The finished runs that the benchmark's file of rows tells of, by their digest.

    Raises:
        UserError: the file is there and is not such a file, or a row has no digest.
    """
    file = benchmark.rows_file
    if file is None or not file.exists():
        return {}
    found = {}
    for row in read_csv(file):
        if row.status == "finished":
            if row.digest is None:
                raise UserError(f"{file}: {row.variant}, seed {row.seed}: has no digest")
            found[row.digest] = row
    return found


def check_rows(plan: Plan) -> None:
    """Looks at the file of rows before any work: what is in it must be of use, and is not lost.

    Raises:
        UserError: a row that is wanted lacks a figure, or stands where another run would go.
    """
    file, known = plan.file.rows_file, known_rows(plan.file)
    places = {(row.method, row.setting, row.seed): row for row in known.values()}
    for run in plan.runs:
        row = known.get(run.digest)
        if row is None:
            row = places.get((run.method, " ".join(override_list(run.setting)), run.seed))
            if row is not None:
                raise UserError(
                    f"rows={file}: {run} is there with another config, other images, other "
                    f"evaluations or another solo-learn (digest {row.digest}, not {run.digest}), "
                    "and is not overwritten; give another file by rows=FILE, or take the row out"
                )
        else:
            _check_measured(row, plan.file, f"rows={file}")


def _check_measured(row: Row, benchmark: BenchmarkFile, where: str) -> None:
    for name in benchmark.measured:
        if name not in row.metrics:
            raise UserError(
                f"{where}: {row.variant}, seed {row.seed}: has no {name}, one of "
                f"evaluations={benchmark.measured}"
            )


def _row(plan: Plan, run: Run, known: dict[str, Row]) -> Row:
    setting = " ".join(override_list(run.setting))
    identity: dict[str, Any] = {"method": run.method, "setting": setting, "seed": run.seed}
    if not (Result.is_in(run.folder) or run.digest in known or Failure.is_in(run.folder)):
        return Row(**identity, status="pending")
    identity |= {name: getattr(run, name) for name in DIGESTS}
    identity["folder"] = run.folder.relative_to(plan.out).as_posix()
    # the digest is also of how is measured
    measures = {"measures": {name: EVALUATIONS[name] for name in plan.file.measured}}
    if Result.is_in(run.folder):
        return Row(**dict(Result.read(run.folder)), **identity, **measures, status="finished")
    if run.digest in known:
        return known[run.digest].model_copy(update=identity | measures)
    return Row(**identity, status="failed", error=Failure.read(run.folder).error)


def csv_table(rows: Sequence[Row]) -> str:
    """A line for each run; the columns in a fixed order, what a run lacks is empty.

    The curve of a run is written as EPOCH:ACCURACY, one after the other.
    """
    lines = [_cells(row) for row in rows]
    found = dict.fromkeys(name for line in lines for name in line)
    logged = sorted(name for name in found if name.startswith(LOGGED))
    columns = [*(name for name in COLUMNS if name in found), *logged, "error"]
    return pd.DataFrame(lines, columns=columns).to_csv(index=False, lineterminator="\n")


def _cells(row: Row) -> dict[str, str]:
    cells = row.model_dump(include=set(IDENTITY), exclude_none=True)
    if row.status == "finished":
        cells |= {name: getattr(row, name) for name in FOUND}
        cells |= row.metrics | row.versions
        cells |= {f"{name}_C": value for name, value in row.chosen.items()}
        cells |= {f"{name}_measure": number for name, number in row.measures.items()}
        cells |= {f"{LOGGED}{name}": value for name, value in row.logged.items()}
        cells["curve"] = " ".join(f"{epoch}:{value}" for epoch, value in row.curve)
    # as texts, so that a logged NaN is no empty cell
    return {name: "" if value is None else str(value) for name, value in cells.items()}


def read_csv(file: Path) -> list[Row]:
    """The rows that :func:`csv_table` wrote.

    Raises:
        UserError: it is not such a file.
    """
    try:
        # pandas would take the cells of a line with one too many for others, without a word
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            columns = list(reader.fieldnames or ())
            lacking = {"method", "setting", "seed", "status"} - {*columns}
            if lacking:
                other = any(mark in "".join(columns[:1]) for mark in ";\t")
                hint = "cells must be separated by commas" if other else "no table of a benchmark"
                raise UserError(f"{file}: no column {min(lacking)}; {hint}")
            for name in columns:
                if columns.count(name) > 1:
                    raise UserError(f"{file}: column {name} is there twice")
            return [_typed(line, reader.line_num) for line in reader]
    except UserError:
        raise
    except (OSError, csv.Error, ValueError) as error:
        raise UserError(f"{file}: cannot be read as a table of a benchmark ({error})") from error


def rows_of_report(benchmark: BenchmarkFile) -> tuple[list[Row], int]:
    """The rows of a benchmark's file of rows that are the benchmark's: its methods, seeds, epochs.

    Returns:
        The rows, and how many are left out for their method, seed or epochs.

    Raises:
        UserError: there is no such file, it cannot be read, or its rows do not make a report.
    """
    file = benchmark.rows_file
    if file is None:
        raise UserError("rows: missing; --from-rows needs the path of a CSV file in it")
    found = read_csv(file)
    rows = [row for row in found if row.method in benchmark.shown and _is_of(benchmark, row)]
    if not any(row.method in benchmark.trained for row in rows) and (benchmark.trained or not rows):
        raise UserError(
            f"{file}: has no row of these methods, seeds and epochs ({len(found)} others)"
        )
    lengths = sorted({row.epochs for row in rows if row.epochs})
    if len(lengths) > 1:
        raise UserError(
            f"{file}: has runs of {' and '.join(map(str, lengths))} epochs, which are no runs of "
            "one benchmark; choose by epochs="
        )
    rows.sort(key=lambda row: benchmark.shown.index(row.method))
    seen = set()
    for row in rows:
        if row.status != "finished":
            continue
        run = row.variant, row.seed
        if run in seen:
            raise UserError(f"{file}: {run[0]}, seed {run[1]}: is there twice")
        seen.add(run)
        _check_measured(row, benchmark, str(file))
    _check_measures(file, benchmark.measured, rows)
    _check_configs(file, rows)
    return rows, len(found) - len(rows)


def _check_measures(file: Path, measured: Sequence[str], rows: Sequence[Row]) -> None:
    """Refuses rows that an evaluation measured in another way than it does now."""
    others = [
        (name, row)
        for name in measured
        for row in rows
        if row.status == "finished" and row.measure(name) != EVALUATIONS[name]
    ]
    if others:
        name, row = others[0]
        kept = ",".join(name for name in measured if name not in dict(others))
        todo = f"evaluations=[{kept}] leaves it out" if kept else "choose others by evaluations="
        raise UserError(
            f"{file}: {row.variant}, seed {row.seed}: {name} was measured in another way than this "
            f"version does; {todo}"
        )


def _check_configs(file: Path, rows: Sequence[Row]) -> None:
    """Refuses runs of one variant with different configs, and runs of different images.

    Rows that do not say are left alone, where none of the others says it either.
    """
    for variant, runs in group(rows).items():
        seeds: dict[str | None, list[str]] = {}
        for run in sorted(runs, key=lambda run: run.seed):
            seeds.setdefault(run.config_digest, []).append(str(run.seed))
        if len(seeds) > 1:
            told = " and ".join(f"seed{'s' * (len(s) > 1)} {', '.join(s)}" for s in seeds.values())
            what = "do not all say their config" if None in seeds else "have different configs"
            raise UserError(
                f"{file}: {variant}: {told} {what}, which are no runs of one method; choose by "
                "seeds="
            )
    images: dict[str | None, Row] = {}
    for row in rows:
        if row.status == "finished":
            images.setdefault(row.data_digest, row)
    if len(images) > 1:
        one, other = list(images.values())[:2]
        what = "do not both say their images" if None in images else "are of different images"
        raise UserError(
            f"{file}: {one.variant}, seed {one.seed}, and {other.variant}, seed {other.seed}, "
            f"{what}, which cannot be compared; choose by only=[METHOD] references=[]"
        )


def _is_of(benchmark: BenchmarkFile, row: Row) -> bool:
    """Whether a row's seed and epochs are the benchmark's; what is not trained has no epochs."""
    epochs = row.epochs or benchmark.epochs
    seed_is = row.method == "pixels" or row.seed in benchmark.seeds_of(row.method)
    return seed_is and benchmark.epochs in (None, epochs)


def _number(column: str, text: str, line: int) -> float:
    try:
        if "_" in text:  # Python's own form of a long number
            raise ValueError
        return int(text) if column in INTEGERS else float(text)
    except ValueError:
        raise ValueError(f"line {line}: {column} {text}: must be a number") from None


def _typed(line: dict[str, str], number: int) -> Row:
    if (line["method"], line["status"]) == ("method", "status"):
        raise ValueError(f"line {number}: the names of the columns once more")
    if None in line or None in line.values():
        raise ValueError(f"line {number}: has another number of cells than the first")
    for name in ("method", "seed"):
        if not line[name]:
            raise ValueError(f"line {number}: has no {name}")
    if line["status"] not in get_args(Status):
        allowed = ", ".join(get_args(Status))
        raise ValueError(f"line {number}: status {line['status']}: must be {allowed}")
    texts = {name: line[name] for name in TEXTS & line.keys() if line[name]}
    try:
        points = [point.split(":") for point in line.get("curve", "").split()]
        curve = [(int(epoch), float(value)) for epoch, value in points]
    except ValueError:
        raise ValueError(f"line {number}: curve: must be EPOCH:ACCURACY EPOCH:ACCURACY …") from None
    numbers: dict[str, Any] = {
        name: _number(name, text, number)
        for name, text in line.items()
        if text and name not in (*TEXTS, "curve")
    }
    metrics = {name: numbers[name] for name in METRICS if name in numbers}
    for name, value in metrics.items():
        most = math.inf if name.startswith(LABEL_FREE) else 100.0
        if not (0 <= value <= most and math.isfinite(value)):
            allowed = "be at least 0" if most > 100 else "lie within 0 and 100"
            raise ValueError(f"line {number}: {name} {line[name]}: must {allowed}")
    try:
        return Row(
            **{k: v for k, v in (texts | numbers).items() if k in (*IDENTITY, *FOUND)},
            metrics=metrics,
            chosen={k.removesuffix("_C"): numbers[k] for k in CHOSEN if k in numbers},
            measures={k.removesuffix("_measure"): numbers[k] for k in MEASURES if k in numbers},
            logged={k.removeprefix(LOGGED): v for k, v in numbers.items() if k.startswith(LOGGED)},
            curve=curve,
            versions={name: texts[name] for name in VERSIONS if name in texts},
        )
    except ValidationError as error:
        raise ValueError(f"line {number}: {first_error(error)}") from error


def group(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The finished rows of each variant that has any."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.status == "finished":
            groups.setdefault(row.variant, []).append(row)
    return groups
