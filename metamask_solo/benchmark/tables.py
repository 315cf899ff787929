"""The results of a benchmark as Markdown."""

import statistics
from collections.abc import Sequence
from typing import Any

from metamask_solo.benchmark.configs import differ_in_still_mask
from metamask_solo.benchmark.file import LABEL_FREE, BenchmarkFile, Folders
from metamask_solo.benchmark.rows import VERSIONS, Row, group
from metamask_solo.benchmark.statistics import (
    Comparison,
    best_settings,
    clear_winner,
    compare,
    mean_and_deviation,
    noise_floor,
)
from metamask_solo.evaluation.linear import CS as STRENGTHS
from metamask_solo.evaluation.linear import HELD_OUT

NAMES = {
    "knn": "kNN %",
    "linear": "linear %",
    "knn_plain": "kNN %, no mask",
    "linear_plain": "linear %, no mask",
    "rankme": "RankMe",
    "rankme_plain": "RankMe, no mask",
}
HOW = {
    "knn": "kNN with k = 20, the cosine distance and temperature 0.07",
    "linear": "linear: a logistic regression on the features of the plain images, which are "
    "divided by one number for all dimensions, with the C of "
    f"{', '.join(f'{c:g}' for c in STRENGTHS)} (weaker ones as long as the last is the best) that "
    f"is best on every {HELD_OUT}th training image of a class",
    "rankme": "RankMe of the backbone's features of the training images, which is no accuracy",
}
REFERENCE_NAMES = {"random": "random backbone", "pixels": "raw pixels"}
COSTS = {
    "seconds_per_epoch": ("s / epoch", ".1f"),
    "seconds_per_step": ("s / step", ".3f"),
    "peak_memory_mib": ("peak MiB", ".0f"),
    "parameters": ("parameters", ",.0f"),
}


def markdown(
    benchmark: BenchmarkFile,
    rows: Sequence[Row],
    notes: Sequence[str] = (),
    figures: Sequence[str] = (),
) -> str:
    """The report: what was run, results, comparisons or best settings, failures, figures."""
    groups = group(rows)
    parts = [f"# {benchmark.name}", _summary(benchmark, rows), *notes]
    if groups:
        parts += _results(benchmark, groups)
        if benchmark.searched:
            parts += _best_table(benchmark, rows)
        else:
            parts += _noise_floor(benchmark, groups) + _comparisons(benchmark, groups)
    failed = [row for row in rows if row.status == "failed"]
    if failed:
        parts += ["## Failed runs"]
        parts += [
            "\n".join(f"- {r.variant}, seed {r.seed}: {r.error or 'unknown'}" for r in failed)
        ]
    parts += [f"![{name}]({name}.png)" for name in figures]
    return "\n\n".join(parts) + "\n"


def _summary(benchmark: BenchmarkFile, rows: Sequence[Row]) -> str:
    counts = [f"{sum(row.status == s for row in rows)} {s}" for s in ("finished", "failed")]
    data = benchmark.data
    place = data.train_path if isinstance(data, Folders) else data
    lines = [f"{len(rows)} runs ({', '.join(counts)})" + (f" on {place}" if place else "") + "."]
    finished = [row for row in rows if row.status == "finished"]
    told: dict[str, set[Any]] = {
        "epochs": {row.epochs for row in finished if row.epochs},
        "device": {row.device for row in finished},
        "commit": {row.commit for row in finished},
        **{name: {row.versions.get(name) for row in finished} for name in VERSIONS},
    }
    for key, found in told.items():
        if values := sorted(str(value) for value in found if value is not None):
            lines.append(f"{key}: {', '.join(values)}.")
    return " ".join(lines)


def _results(benchmark: BenchmarkFile, groups: dict[str, list[Row]]) -> list[str]:
    names = [name for name in benchmark.measured if name in NAMES]
    plain = [f"{name}_plain" for name in names]
    if not any(name in row.metrics for rows in groups.values() for row in rows for name in plain):
        plain = []
    winners = {
        name: None if benchmark.searched else clear_winner(groups, name, benchmark.floor)
        for name in names
    }
    heads = [*(NAMES[name] for name in [*names, *plain]), *(title for title, _ in COSTS.values())]
    lines = []
    for name, rows in groups.items():
        cells = []
        for metric in [*names, *plain]:
            cell = _spread([row.metrics[metric] for row in rows if metric in row.metrics], ".2f")
            cells.append(f"**{cell}**" if winners.get(metric) == name else cell)
        for cost, (_, form) in COSTS.items():
            values = [getattr(row, cost) for row in rows]
            cells.append(_mean([value for value in values if value is not None], form))
        lines.append([REFERENCE_NAMES.get(name, name), str(len(rows)), *cells])
    how = [HOW[name] for name in names]
    note = f"Mean ± standard deviation over the seeds, on the validation images; {'; '.join(how)}."
    if not benchmark.searched:
        note += (
            " Bold: the best mean, where its paired differences to all others stay clear when "
            "corrected for their number (of these alone, so the next tables may judge a pair "
            "otherwise)."
        )
    parts = ["## Results", note, _table(["method", "runs", *heads], lines)]
    # the pixels are the same with every seed
    seeds = {
        frozenset(row.seed for row in rows) for name, rows in groups.items() if name != "pixels"
    }
    if len(seeds) > 1:
        paired = "" if benchmark.searched else "; the paired differences use common seeds only"
        parts.append(
            "Not all lines have the same seeds: means of different seeds are not to be compared "
            f"directly{paired}."
        )
    return parts


def _noise_floor(benchmark: BenchmarkFile, groups: dict[str, list[Row]]) -> list[str]:
    if benchmark.floor is None or not set(benchmark.floor) <= set(benchmark.trained):
        return []
    one, other = benchmark.floor
    lines = []
    for metric in benchmark.measured:
        floor = noise_floor(groups.get(one, []), groups.get(other, []), metric)
        if floor is not None:
            shown = "–" if floor.detectable is None else f"{floor.detectable:.2f}"
            lines.append([NAMES[metric], str(floor.pairs), f"{floor.size:.2f}", shown])
    if not lines:
        missing = f"No seed has finished runs of both {one} and {other}: no noise floor is known."
        return ["## Noise floor", missing]
    reason = (
        f"{one} and {other} are one method: a mask that stays where it is cancels in both heads, "
        "which begin with a linear layer without bias and BatchNorm."
        if differ_in_still_mask(benchmark, one, other)
        else f"The benchmark's file names {one} and {other} as one method."
    )
    note = (
        f"{reason} Root mean square of the differences of their runs with the same seed, "
        f"in {_units(benchmark)}, and the smallest true difference that so many seeds would have "
        "shown (80 % power, two-sided test at 5 %) if pairs differed by this noise alone."
    )
    heads = ["metric", "pairs", "noise floor", "could have shown"]
    return ["## Noise floor", note, _table(heads, lines)]


def _comparisons(benchmark: BenchmarkFile, groups: dict[str, list[Row]]) -> list[str]:
    wanted = [pair for pair in benchmark.pairs if set(pair) <= set(benchmark.trained)]
    pairs = [pair for pair in wanted if set(pair) <= set(groups)]
    family = compare(pairs, groups, benchmark.measured)
    compared = {(found.one, found.other) for found in family}
    left_out = [f"{one} − {other}" for one, other in wanted if (one, other) not in compared]
    parts = ["## Paired differences"] if wanted else []
    if family:
        parts += _differences(benchmark, pairs, family)
    if left_out:
        parts += [f"No seed has finished runs of both: {', '.join(left_out)}."]
    return parts


def _differences(
    benchmark: BenchmarkFile, pairs: Sequence[tuple[str, str]], family: Sequence[Comparison]
) -> list[str]:
    """What the table of a family means, and the table."""
    lines = []
    for pair in pairs:
        cells: list[str] = []
        of_pair = {c.metric: c for c in family if (c.one, c.other) == pair}
        for metric in benchmark.measured:
            cells += _cells(of_pair.get(metric))
        seeds = max((c.seeds for c in of_pair.values()), default=0)
        if seeds:
            lines.append([f"{pair[0]} − {pair[1]}", str(seeds), *cells])
    intervals = sum(found.interval is not None for found in family) or len(family)
    note = (
        f"{_units(benchmark).capitalize()}: mean of the differences of the same seeds. In brackets "
        f"its interval, corrected: all {intervals} of this table cover the truth in 95 % of all "
        "cases (Student's t, Bonferroni). p: of the paired t-test, corrected by Holm for all of "
        "them. Could have shown: the smallest true difference that so many seeds, with differences "
        "that vary as these do, would have shown (80 % power, two-sided test at 5 %, not "
        "corrected). Bold: p is below 0.05; Holm is sharper than Bonferroni, so the interval of a "
        "bold one may hold 0. –: one seed, or all seeds differ by the same."
    )
    heads = ["difference", "seeds"]
    for metric in benchmark.measured:
        heads += [NAMES[metric], "p", "could have shown"]
    return [note, _table(heads, lines)]


def _units(benchmark: BenchmarkFile) -> str:
    if set(benchmark.measured) & set(LABEL_FREE):
        return "the units of each measure"
    return "percentage points"


def _cells(found: Comparison | None) -> list[str]:
    if found is None:
        return ["–"] * 3
    if found.interval is None or found.p_value is None or found.detectable is None:
        return [f"{found.mean:+.2f}", "–", "–"]
    low, high = found.interval
    text = f"{found.mean:+.2f} ({low:+.2f} to {high:+.2f})"
    return [
        f"**{text}**" if found.clear else text,
        f"{found.p_value:.3f}" if found.p_value >= 0.001 else "<0.001",
        f"{found.detectable:.2f}",
    ]


def _best_table(benchmark: BenchmarkFile, rows: Sequence[Row]) -> list[str]:
    metric = benchmark.measured[0]
    # a reference has no settings
    rows = [row for row in rows if row.method in benchmark.methods]
    best = {found[0].method: found for found in best_settings(rows, benchmark.measured).values()}
    lines = [
        [
            method,
            f"`{found[0].setting}`",
            str(len(found)),
            _spread([row.metrics[metric] for row in found], ".2f"),
        ]
        for method, found in best.items()
    ]
    groups, fewer = group(rows), []
    for variant, method in {row.variant: row.method for row in rows if row.method in best}.items():
        runs, most = len(groups.get(variant, ())), len(best[method])
        if runs < most:
            fewer.append(f"{variant} ({runs} instead of {most})")
    equal = "".join(f", of equal ones by {NAMES[other]}" for other in benchmark.measured[1:])
    note = (
        f"The best setting of each method by {NAMES[metric]} on the validation images{equal}, as "
        "overrides. Those with a finished run of every seed take part or, where none has all, "
        "those with the most. A best of several is no fair result: measure it on other images."
    )
    parts = ["## Best settings", note, _table(["method", "setting", "runs", NAMES[metric]], lines)]
    if fewer:
        parts.append(
            "Left out, with fewer finished runs than another setting of the method: "
            f"{', '.join(fewer)}."
        )
    return parts


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return "–"
    mean, deviation = mean_and_deviation(values)
    return f"{mean:{form}}" if deviation is None else f"{mean:{form}} ± {deviation:{form}}"


def _mean(values: Sequence[float], form: str) -> str:
    return f"{statistics.fmean(values):{form}}" if values else "–"


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *lines))
