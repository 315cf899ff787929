"""The rows of a benchmark, one a run: from the files of its runs, and from and to CSV."""

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metamask_solo.benchmark.plan import EVALUATIONS, LABEL_FREE, Plan, Run, Subject, override_list
from metamask_solo.errors import UserError

# the files of a run's folder
RUN, RESULT, FAILED, MEASURED, LOG = (
    "run.json",
    "result.json",
    "failed.json",
    "measured.json",
    "log.txt",
)
COSTS = ("seconds_per_epoch", "seconds_per_step", "peak_memory_mib", "parameters")
VERSIONS = ("metamask-solo", "solo-learn", "torch", "lightning", "python")
METRICS = (*EVALUATIONS, *(f"{name}_plain" for name in EVALUATIONS))
CHOSEN = tuple(f"{name}_C" for name in METRICS if name.startswith("linear"))
COLUMNS = (
    *("method", "setting", "seed", "status", *METRICS, *CHOSEN, *COSTS, "epochs"),
    *("device", "commit", *VERSIONS, "digest", "folder", "curve"),
)
STATUSES = ("finished", "failed", "pending")
TEXTS = {"method", "setting", "status", "device", "commit", *VERSIONS, "digest", "folder", "error"}
Row = dict[str, Any]


def read_rows(plan: Plan) -> list[Row]:
    """One row for each run, in the order of methods, settings and seeds.

    ``status`` is finished, failed (with ``error``) or pending.
    """
    variants = list(dict.fromkeys(run.variant for run in plan.runs))
    order = sorted(plan.runs, key=lambda run: (variants.index(run.variant), run.seed))
    # variants of one method stand together, in the order of the file
    order.sort(key=lambda run: plan.methods.index(run.method))
    known = known_rows(plan)
    return [_row(plan, run, known) for run in order]


def known_rows(plan: Plan) -> dict[str, Row]:
    """The finished runs that the plan's file of rows tells of, by their digest.

    Raises:
        UserError: the file is there and is not such a file.
    """
    if plan.rows is None or not plan.rows.exists():
        return {}
    return {row["digest"]: row for row in read_csv(plan.rows) if row["status"] == "finished"}


def _row(plan: Plan, run: Run, known: dict[str, Row]) -> Row:
    row: Row = {
        "method": run.method,
        "setting": " ".join(override_list(run.setting)),
        "seed": run.seed,
        "status": "pending",
    }
    folder = {"digest": run.digest, "folder": run.folder.relative_to(plan.out).as_posix()}
    if (run.folder / RESULT).is_file():
        result = json.loads((run.folder / RESULT).read_text())
        row |= {"status": "finished", **result["metrics"]}
        row |= {f"{name}_C": value for name, value in result.get("chosen", {}).items()}
        row |= {name: result[name] for name in (*COSTS, "epochs", "device", "commit")}
        row |= result["versions"] | folder
        row |= {f"logged/{name}": value for name, value in sorted(result["logged"].items())}
        row["curve"] = result["curve"]
    elif run.digest in known:
        row = {**known[run.digest], **row, "status": "finished", **folder}
    elif (run.folder / FAILED).is_file():
        error = json.loads((run.folder / FAILED).read_text())["error"]
        row |= {"status": "failed", **folder, "error": error}
    return row


def csv_table(rows: Sequence[Row]) -> str:
    """A line for each run; the columns in a fixed order, what a run lacks is empty.

    The curve of a run is written as EPOCH:ACCURACY, one after the other.
    """
    found = dict.fromkeys(name for row in rows for name in row)
    logged = sorted(name for name in found if name.startswith("logged/"))
    columns = [*(name for name in COLUMNS if name in found), *logged, "error"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        curve = " ".join(f"{epoch}:{value}" for epoch, value in row.get("curve", []))
        writer.writerow({**row, "curve": curve})
    return text.getvalue()


def read_csv(file: Path) -> list[Row]:
    """The rows that :func:`csv_table` wrote.

    Raises:
        UserError: it is not such a file.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            lacking = {"method", "setting", "seed", "status"} - set(reader.fieldnames or ())
            if lacking:
                raise UserError(f"{file}: no column {min(lacking)}; it is no table of a benchmark")
            return [_typed(line, reader.line_num) for line in reader]
    except UserError:
        raise
    except (OSError, UnicodeDecodeError, csv.Error, ValueError) as error:
        raise UserError(f"{file}: cannot be read as a table of a benchmark ({error})") from error


def rows_of_report(subject: Subject) -> tuple[list[Row], int]:
    """The rows of a benchmark's file of rows that are the benchmark's: its methods, seeds, epochs.

    Returns:
        The rows, and how many of its methods are left out for their seed or epochs.

    Raises:
        UserError: there is no such file, it cannot be read, or its rows do not make a report.
    """
    if subject.rows is None:
        raise UserError("rows: missing; --from-rows needs the path of a CSV file in it")
    found = [row for row in read_csv(subject.rows) if row["method"] in subject.methods]
    rows = [row for row in found if _is_of(subject, row)]
    rows.sort(key=lambda row: subject.methods.index(row["method"]))
    seen = set()
    for row in rows:
        if row["status"] != "finished":
            continue
        run = variant(row), row["seed"]
        if run in seen:
            raise UserError(f"{subject.rows}: {run[0]}, seed {run[1]}: is there twice")
        seen.add(run)
        for name in subject.evaluations:
            if name not in row:
                raise UserError(
                    f"{subject.rows}: {run[0]}, seed {run[1]}: has no {name}, one of "
                    f"evaluations={subject.evaluations}"
                )
    return rows, len(found) - len(rows)


def _is_of(subject: Subject, row: Row) -> bool:
    """Whether a row's seed and epochs are the benchmark's; what is not trained has no epochs."""
    seeds = subject.seeds.get(row["method"])
    epochs = row.get("epochs") or subject.epochs
    return (seeds is None or row["seed"] in seeds) and subject.epochs in (None, epochs)


def _typed(line: dict[str, str], number: int) -> Row:
    row: Row = {}
    if None in line or None in line.values():
        raise ValueError(f"line {number}: has another number of cells than the first")
    for name in ("method", "seed"):
        if not line[name]:
            raise ValueError(f"line {number}: has no {name}")
    if line["status"] not in STATUSES:
        raise ValueError(f"line {number}: status {line['status']}: must be {', '.join(STATUSES)}")
    for name in METRICS:
        most = math.inf if name.startswith(LABEL_FREE) else 100.0
        if (text := line.get(name)) and not (
            0 <= float(text) <= most and math.isfinite(float(text))
        ):
            allowed = "be at least 0" if most > 100 else "lie within 0 and 100"
            raise ValueError(f"line {number}: {name} {text}: must {allowed}")
    for name, text in line.items():
        if name == "curve":
            pairs = (point.split(":") for point in text.split())
            row[name] = [(int(epoch), float(value)) for epoch, value in pairs]
        elif name in TEXTS:
            if text or name == "setting":
                row[name] = text
        elif name in ("seed", "epochs"):
            if text:
                row[name] = int(text)
        elif text:
            row[name] = float(text)
    if row["status"] == "finished":  # what a reference, say, has none of
        row |= {name: None for name in (*COSTS, "commit") if name not in row}
        row.setdefault("curve", [])
    return row


def variant(row: Row) -> str:
    """The method and its setting."""
    return f"{row['method']} {row['setting']}".strip()


def group(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The finished rows of each variant that has any."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["status"] == "finished":
            groups.setdefault(variant(row), []).append(row)
    return groups
