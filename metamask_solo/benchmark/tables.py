"""The results of a benchmark as a CSV file and as Markdown."""

import csv
import io
import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

from scipy import stats

from metamask_solo.benchmark.launch import FAILED, RESULT
from metamask_solo.benchmark.plan import Plan, Run, override_list

CONFIDENCE = 0.95
NAMES = {"knn": "kNN %", "linear": "linear %"}
PLAIN_NAMES = {"knn_plain": "kNN %, no mask", "linear_plain": "linear %, no mask"}
COSTS = {
    "seconds_per_epoch": ("s / epoch", ".1f"),
    "seconds_per_step": ("s / step", ".3f"),
    "peak_memory_mib": ("peak MiB", ".0f"),
    "parameters": ("parameters", ",.0f"),
}
VERSIONS = ("metamask-solo", "solo-learn", "torch", "lightning", "python")
Row = dict[str, Any]


def read_rows(plan: Plan) -> list[Row]:
    """One row for each run, in the order of methods, settings and seeds.

    ``status`` is finished, failed (with ``error``) or pending.
    """
    variants = list(dict.fromkeys(run.variant for run in plan.runs))
    order = sorted(plan.runs, key=lambda run: (variants.index(run.variant), run.seed))
    # variants of one method stand together, in the order of the file
    order.sort(key=lambda run: plan.methods.index(run.method))
    return [_row(plan, run) for run in order]


def _row(plan: Plan, run: Run) -> Row:
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
        row |= {name: result[name] for name in (*COSTS, "epochs", "device", "commit")}
        row |= result["versions"] | folder
        row |= {f"logged/{name}": value for name, value in sorted(result["logged"].items())}
        row["curve"] = result["curve"]
    elif (run.folder / FAILED).is_file():
        error = json.loads((run.folder / FAILED).read_text())["error"]
        row |= {"status": "failed", **folder, "error": error}
    return row


def csv_table(rows: Sequence[Row]) -> str:
    """A line for each run; the columns in a fixed order, what a run lacks is empty."""
    found = dict.fromkeys(name for row in rows for name in row)
    head = ["method", "setting", "seed", "status", *NAMES, *PLAIN_NAMES, *COSTS]
    head += ["epochs", "device", "commit", *VERSIONS, "digest", "folder"]
    logged = sorted(name for name in found if name.startswith("logged/"))
    columns = [*(name for name in head if name in found), *logged, "error"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


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


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1); None for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def paired_difference(
    one: Sequence[Row], other: Sequence[Row], metric: str
) -> tuple[float, tuple[float, float] | None] | None:
    """Mean of one - other over the seeds of both, with its 95 % interval.

    Student's t interval of the differences. None without a common seed; no interval with one.
    """
    values = [{row["seed"]: row[metric] for row in rows} for rows in (one, other)]
    differences = [values[0][seed] - values[1][seed] for seed in values[0] if seed in values[1]]
    if not differences:
        return None
    mean, deviation = mean_and_deviation(differences)
    if deviation is None:
        return mean, None
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1)
    half = float(quantile) * deviation / math.sqrt(len(differences))
    return mean, (mean - half, mean + half)


def excludes_zero(interval: tuple[float, float] | None) -> bool:
    return interval is not None and (interval[0] > 0 or interval[1] < 0)


def clear_winner(groups: dict[str, list[Row]], metric: str) -> str | None:
    """The variant with the best mean, if its paired interval to every other excludes zero."""
    if len(groups) < 2:
        return None
    best = _best(groups, metric)
    others = [paired_difference(groups[best], groups[g], metric) for g in groups if g != best]
    clear = all(other is not None and excludes_zero(other[1]) for other in others)
    return best if clear else None


def best_settings(rows: Sequence[Row], metric: str) -> dict[str, list[Row]]:
    """Of each method the setting with the best mean; the first of equal ones."""
    methods = dict.fromkeys(row["method"] for row in rows)
    found = {}
    for method in methods:
        groups = group([row for row in rows if row["method"] == method])
        if groups:
            best = _best(groups, metric)
            found[best] = groups[best]
    return found


def _best(groups: dict[str, list[Row]], metric: str) -> str:
    return max(groups, key=lambda g: statistics.fmean(row[metric] for row in groups[g]))


def markdown(plan: Plan, rows: Sequence[Row], figures: Sequence[str]) -> str:
    """The report: what was run, results, differences or best settings, failures, figures."""
    groups = group(rows)
    parts = [f"# {plan.name}", _summary(plan, rows)]
    if groups:
        parts += _results(plan, groups)
        if plan.searched:
            parts += _best_table(plan, rows)
        elif plan.reference in groups and len(groups) > 1:
            parts += _differences(plan, groups)
    failed = [row for row in rows if row["status"] == "failed"]
    if failed:
        parts += ["## Failed runs"]
        parts += ["\n".join(f"- {variant(r)}, seed {r['seed']}: {r['error']}" for r in failed)]
    parts += [f"![{name}]({name}.png)" for name in figures]
    return "\n\n".join(parts) + "\n"


def _summary(plan: Plan, rows: Sequence[Row]) -> str:
    counts = [f"{sum(row['status'] == s for row in rows)} {s}" for s in ("finished", "failed")]
    data = plan.data if isinstance(plan.data, str) else (plan.data or {}).get("train_path", "")
    lines = [f"{len(rows)} runs ({', '.join(counts)})" + (f" on {data}" if data else "") + "."]
    finished = [row for row in rows if row["status"] == "finished"]
    for key in ("epochs", "device", "commit", *VERSIONS):
        values = sorted({str(row[key]) for row in finished if row[key] is not None})
        if values:
            lines.append(f"{key}: {', '.join(values)}.")
    return " ".join(lines)


def _results(plan: Plan, groups: dict[str, list[Row]]) -> list[str]:
    metrics = {name: NAMES[name] for name in plan.evaluations}
    plain = {f"{name}_plain": PLAIN_NAMES[f"{name}_plain"] for name in plan.evaluations}
    if not any(name in row for rows in groups.values() for row in rows for name in plain):
        plain = {}
    winners = {name: None if plan.searched else clear_winner(groups, name) for name in metrics}
    heads = [*metrics.values(), *plain.values(), *(title for title, _ in COSTS.values())]
    lines = []
    for name, rows in groups.items():
        cells = []
        for metric in [*metrics, *plain]:
            cell = _spread([row[metric] for row in rows if metric in row], ".2f")
            cells.append(f"**{cell}**" if winners.get(metric) == name else cell)
        for cost, (_, form) in COSTS.items():
            cells.append(_mean([row[cost] for row in rows if row[cost] is not None], form))
        lines.append([name, str(len(rows)), *cells])
    note = (
        "Mean ± standard deviation over the seeds, on the validation images; kNN with k = 20 and "
        "the cosine distance, linear: a logistic regression on the features of the plain images."
    )
    if not plan.searched:
        note += (
            " Bold: the best mean, where its paired difference to every other method has a 95 % "
            "interval without zero."
        )
    return ["## Results", note, _table(["method", "runs", *heads], lines)]


def _differences(plan: Plan, groups: dict[str, list[Row]]) -> list[str]:
    lines = []
    for name in groups:
        if name == plan.reference:
            continue
        cells = []
        for metric in plan.evaluations:
            found = paired_difference(groups[str(plan.reference)], groups[name], metric)
            cells.append(_interval(found))
        lines.append([name, *cells])
    note = (
        f"{plan.reference} minus the other method, in percentage points: mean of the differences "
        "of the same seeds, and its 95 % t interval in brackets, not corrected for the number of "
        "comparisons. Bold: the interval excludes zero."
    )
    heads = [f"{plan.reference} minus", *(NAMES[name] for name in plan.evaluations)]
    return ["## Paired differences", note, _table(heads, lines)]


def _best_table(plan: Plan, rows: Sequence[Row]) -> list[str]:
    metric = plan.evaluations[0]
    lines = [
        [found[0]["method"], f"`{found[0]['setting']}`", _spread([r[metric] for r in found], ".2f")]
        for found in best_settings(rows, metric).values()
    ]
    note = (
        f"The best setting of each method by {NAMES[metric]} on the validation images, as "
        "overrides. A best of several is no fair result: measure it on other images."
    )
    return ["## Best settings", note, _table(["method", "setting", NAMES[metric]], lines)]


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return "–"
    mean, deviation = mean_and_deviation(values)
    return f"{mean:{form}}" if deviation is None else f"{mean:{form}} ± {deviation:{form}}"


def _mean(values: Sequence[float], form: str) -> str:
    return f"{statistics.fmean(values):{form}}" if values else "–"


def _interval(found: tuple[float, tuple[float, float] | None] | None) -> str:
    if found is None:
        return "–"
    mean, interval = found
    if interval is None:
        return f"{mean:+.2f}"
    text = f"{mean:+.2f} ({interval[0]:+.2f} to {interval[1]:+.2f})"
    return f"**{text}**" if excludes_zero(interval) else text


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *lines))
