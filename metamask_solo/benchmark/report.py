"""The report of a benchmark, as Markdown and as one HTML page: answer, tables, figures."""

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from metamask_solo.benchmark.answer import answer
from metamask_solo.benchmark.results import COSTS, VERSIONS, best_settings, same_methods
from metamask_solo.benchmark.schema import (
    LABEL_FREE,
    NAMES,
    UNTRAINED_NAMES,
    BenchmarkFile,
    Folders,
)
from metamask_solo.benchmark.statistics import compare, coverage, fit
from metamask_solo.data.datasets import counted
from metamask_solo.evaluation.knn import DEFAULT_K, DEFAULT_TEMPERATURE
from metamask_solo.evaluation.linear import CS, HELD_OUT

HOW = {
    "knn": f"kNN: k = {DEFAULT_K}, cosine distance, temperature {DEFAULT_TEMPERATURE}",
    "linear": "linear: logistic regression on the features, divided by one number; its C is chosen "
    f"on a {'fifth' if HELD_OUT == 5 else f'1/{HELD_OUT}'} of the training images, from {CS[0]:g} "
    f"to {CS[-1]:g}, and further while the largest is best",
    "rankme": "RankMe of the features of the training images",
}
STYLE = """body { font: 16px/1.5 sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-size: 0.9rem; margin: 1rem 0 }
th, td { padding: 0.2rem 0.6rem; text-align: right; border-bottom: 1px solid #ccc }
th:first-child, td:first-child { text-align: left }
img { max-width: 100% } small { color: #555 }"""
Block = Any  # a paragraph, a list of lines, or a DataFrame of texts
Section = tuple[str, list[Block]]


def sections(
    benchmark: BenchmarkFile, rows: pd.DataFrame, notes: Sequence[str] = ()
) -> list[Section]:
    """Titles and what stands below them: paragraphs, lists and tables of text."""
    runs = rows[rows.status == "finished"]
    failed = rows[rows.status == "failed"]
    said = runs[runs.notes != ""] if "notes" in runs else runs[:0]
    lines = [f"{run.variant}, seed {run.seed}: {run.notes}" for run in said.itertuples()]
    doubts: Section = ("Notes", [[*notes, *lines]])
    content: list[Section] = []
    if len(runs) and benchmark.searched:
        content = [
            doubts,
            ("Results", _results(benchmark, runs)),
            ("Best settings", _best(benchmark, runs)),
        ]
    elif len(runs):
        same = same_methods(runs)
        pairs = benchmark.pairs({*runs.method}, same)
        content = [
            ("Answer", [answer(runs, pairs, benchmark.measured, same)]),
            doubts,
            ("Results", _results(benchmark, runs)),
            ("Differences", _differences(benchmark, runs, pairs)),
        ]
    if len(failed):
        lines = [f"{run.variant}, seed {run.seed}: {run.error}" for run in failed.itertuples()]
        content.append(("Failed runs", [lines]))
    return [(title, blocks) for title, blocks in content if any(map(len, blocks))]


def summary(benchmark: BenchmarkFile, rows: pd.DataFrame) -> str:
    """One line: runs, data, length, device and versions."""
    counts = [f"{(rows.status == status).sum()} {status}" for status in ("finished", "failed")]
    data = benchmark.data.train_path if isinstance(benchmark.data, Folders) else benchmark.data
    lines = [
        f"{counted(len(rows), 'run')} ({', '.join(counts)})" + (f" on {data}" if data else "") + "."
    ]
    finished = rows[rows.status == "finished"]
    if "val_images" in finished and finished.val_images.notna().any():
        counts = [f"{finished[f'{split}_images'].max():.0f}" for split in ("train", "val")]
        lines.append(f"images: {counts[0]} for training, {counts[1]} to measure on.")
    for name in ("epochs", "device", "commit", *VERSIONS):
        values = finished[name].dropna().unique() if name in finished else []
        shown = [f"{value:.0f}" if name == "epochs" else str(value) for value in values if value]
        lines += [f"{name}: {', '.join(shown)}."] if shown else []
    return " ".join(lines)


def _results(benchmark: BenchmarkFile, runs: pd.DataFrame) -> list[Block]:
    plain = [f"{name}_plain" for name in benchmark.measured]
    measures = [m for m in (*benchmark.measured, *plain) if m in runs and runs[m].notna().any()]
    groups = runs.reindex(columns=[*runs, *COSTS.keys() - {*runs}]).groupby("variant", sort=False)
    names = groups.size().rename(UNTRAINED_NAMES).index
    table = pd.DataFrame({"method": names, "runs": groups.size().astype(str).to_numpy()})
    for measure in measures:
        table[_title(measure)] = [spread(values) for _, values in groups[measure]]
    for name, (title, form) in COSTS.items():
        # the median: one run beside other programs, or paused, does not count
        medians = groups[name].median().astype(float)
        table[title] = ["–" if pd.isna(value) else format(value, form) for value in medians]
    labelled = not {*benchmark.measured} <= {*LABEL_FREE}
    where = ", on the validation images" if labelled else ""
    note = f"Mean ± standard deviation over the seeds{where}; costs: medians. "
    return [note + "; ".join(HOW[name] for name in benchmark.measured) + ".", table]


def spread(values: "pd.Series[float]", digits: int = 2) -> str:
    """Mean ± standard deviation (n − 1); of one value, the value."""
    values = values.dropna()
    if values.empty:
        return "–"
    deviation = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{deviation}"


def _differences(
    benchmark: BenchmarkFile, runs: pd.DataFrame, pairs: Sequence[tuple[str, str]]
) -> list[Block]:
    family = compare(runs, pairs, benchmark.measured)
    if family.empty:
        return []
    table: dict[str, dict[str, str]] = {}
    for line in family.itertuples():
        text = f"{line.difference:+.2f} ({line.low:+.2f} to {line.high:+.2f})"
        cells = table.setdefault(name := f"{line.method} − {line.baseline}", {"difference": name})
        cells[_title(line.measure)] = f"**{text}**" if line.clear else text
        p = "–" if pd.isna(line.p) else "<0.001" if line.p < 0.001 else f"{line.p:.3f}"
        cells[f"p, {NAMES[line.measure]}"] = p
        cells[f"detectable, {NAMES[line.measure]}"] = f"{line.detectable:.2f}"
    first = family[family.measure == family.measure[0]]
    model = fit(runs, family.measure[0])
    assert model is not None  # something was compared
    compared = [*zip(first.method, first.baseline, strict=True)]
    low, high, together = coverage(model, compared, len(benchmark.measured))
    note = (
        f"One linear model of each measure, accuracy ~ method + seed, with HC3 errors and "
        f"{model.freedom} degrees of freedom. Intervals and p-values are corrected for the "
        f"{len(family)} comparisons of this table (Bonferroni); bold: p below 0.05. Detectable: "
        "the minimum detectable effect, a true difference that is shown with a power of 80 %. "
        "Assumed: methods and seeds add up, and runs vary normally, each method by its own spread. "
        f"In simulations of these runs with spreads that differ by up to 3.5 times, one interval "
        f"at 95 % covers the truth in {low:.1f} to {high:.1f} %, and all corrected ones together "
        f"in {together:.0f} %."
    )
    return [note, pd.DataFrame([*table.values()]).fillna("–")]


def _best(benchmark: BenchmarkFile, runs: pd.DataFrame) -> list[Block]:
    best = best_settings(runs[~runs.method.isin(UNTRAINED_NAMES)], benchmark.measured)
    table = pd.DataFrame({"method": best.method, "setting": best.setting, "runs": best.runs})
    for measure in benchmark.measured:
        table[_title(measure)] = best[measure].map("{:.2f}".format)
    first = benchmark.measured[0]
    where = ", which is no accuracy" if first in LABEL_FREE else " on the validation images"
    note = (
        f"The best setting of each method by {NAMES[first]}{where}, of equal ones by the next "
        "measure. Only settings with the most finished runs take part. A best of several is no "
        "fair result: measure it on other images."
    )
    return [note, table.astype(str)]


def _title(measure: str) -> str:
    name, _, plain = measure.partition("_")
    unit = "" if name in LABEL_FREE else " %"
    return f"{NAMES[name]}{unit}{', no mask' if plain else ''}"


def markdown(title: str, line: str, content: Sequence[Section], figures: Sequence[str] = ()) -> str:
    """The report as Markdown."""
    parts = [f"# {title}", line]
    for name, blocks in content:
        parts += [f"## {name}", *(markdown_block(block) for block in blocks)]
    parts += [f"![{name}]({name}.png)" for name in figures]
    return "\n\n".join(parts) + "\n"


def markdown_block(block: Block, align: str = "---:") -> str:
    """A paragraph, a list or a table as Markdown; ``align`` is of all columns but the first."""
    if isinstance(block, str):
        return block
    if isinstance(block, list):
        return "\n".join(f"- {line}" for line in block)
    rule = ["---", *[align] * (len(block.columns) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (block.columns, rule, *block.to_numpy()))


def page(title: str, line: str, content: Sequence[Section], figures: Mapping[str, bytes]) -> str:
    """The report as one HTML page with its figures inside."""
    parts = [f"<h1>{html.escape(title)}</h1>", f"<p><small>{html.escape(line)}</small></p>"]
    for name, blocks in content:
        parts += [f"<h2>{html.escape(name)}</h2>", *map(_html_block, blocks)]
    for name, png in figures.items():
        data = base64.b64encode(png).decode()
        parts.append(f'<img alt="{name}" src="data:image/png;base64,{data}">')
    head = f"<meta charset='utf-8'><title>{html.escape(title)}</title><style>{STYLE}</style>"
    return "\n".join(["<!doctype html>", f"<html lang='en'>{head}", *parts, "</html>", ""])


def _html_block(block: Block) -> str:
    if isinstance(block, str):
        return f"<p>{html.escape(block)}</p>"
    if isinstance(block, list):
        return "".join(["<ul>", *(f"<li>{html.escape(line)}</li>" for line in block), "</ul>"])

    def cells(column: "pd.Series[str]") -> "pd.Series[str]":
        return column.map(html.escape).str.replace(r"\*\*(.*)\*\*", r"<b>\1</b>", regex=True)

    return str(block.apply(cells).to_html(index=False, border=0, escape=False))
