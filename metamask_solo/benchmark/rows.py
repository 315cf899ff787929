"""The rows of a benchmark, one a run: from the files of its runs, and from and to CSV."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metamask_solo.benchmark.plan import EVALUATIONS, Plan, Run, override_list
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
        with file.open(newline="") as stream:
            reader = csv.DictReader(stream)
            lacking = {"method", "setting", "seed", "status"} - set(reader.fieldnames or ())
            if lacking:
                raise UserError(f"{file}: no column {min(lacking)}; it is no table of a benchmark")
            return [_typed(line) for line in reader]
    except (OSError, UnicodeDecodeError, csv.Error, ValueError) as error:
        raise UserError(f"{file}: cannot be read as a table of a benchmark ({error})") from error


def _typed(line: dict[str, str]) -> Row:
    row: Row = {}
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
