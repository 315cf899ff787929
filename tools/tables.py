"""Writes the tables of README and docs: each between ``<!-- table: … -->`` and ``<!-- end -->``.

`make docs` calls it; a test keeps the pages equal to it. ``settings`` follows from the code,
``methods`` from what tests/hosts/test_matrix.py wrote, and ``rows`` from the rows in docs/results,
by the report of the benchmark that is named. Arguments::

    python tools/tables.py matrix.json    # takes what the matrix wrote for this release
    python tools/tables.py --figures      # also draws the figures of docs/results.md
"""

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from metamask_solo import hosts
from metamask_solo.benchmark import report
from metamask_solo.benchmark.figures import draw_figures
from metamask_solo.benchmark.results import rows_of
from metamask_solo.benchmark.schema import NAMES, read_file
from metamask_solo.method.settings import SETTINGS
from metamask_solo.validation import allowed, shown

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
BLOCK = re.compile(r"(<!-- table: (\S+) ?(.*?) -->\n).*?(\n<!-- end -->)", re.DOTALL)
# what the matrix notes of a method, and how the table says it
COLUMNS = {"pretrain": "pretrains", "resume": "resumes", "knn": "kNN", "fold": "folds"}
RELEASES = ("1.0.2", "main")
TITLES = {
    "random": "untrained backbone",
    "pixels": "pixels",
    "simclr": "SimCLR",
    "barlow_twins": "Barlow Twins",
    "vicreg": "VICReg",
    "joint": 'both losses, no mask ("joint")',
    "fixed_mask": "the same with a mask that stays",
    "heads": "MetaMask, trial step of the contrastive head",
    "fast": 'MetaMask, every fourth step ("fast")',
    "metamask": "MetaMask, the paper's setting",
}


def renewed(text: str) -> str:
    """A page with each table as it must be."""
    makers: dict[str, Callable[..., str]] = {
        "settings": settings_table,
        "methods": methods_table,
        "rows": rows_table,
    }
    return BLOCK.sub(lambda m: m[1] + makers[m[2]](*m[3].split()) + m[4], text)


def settings_table() -> str:
    """A row for each setting of the method, in the order of the code."""
    rows = [
        [f"`{key}`", f"`{shown(field.default)}`", allowed(field), str(field.description)]
        for key, field in SETTINGS.items()
    ]
    table = pd.DataFrame(rows, columns=["setting", "default", "allowed", "meaning"])
    return report.markdown_block(table, "---")


def methods_table() -> str:
    """A row for each method, and columns for each release, from docs/results."""
    results = {release: json.loads(_outcome(release).read_text()) for release in RELEASES}
    methods = sorted({method for content in results.values() for method in content["methods"]})
    methods.sort(key=lambda name: name != "metamask")
    head = ["method", *(f"{r}: {title}" for r in results for title in COLUMNS.values())]
    rows = [
        [f"`{method}`"]
        + [
            _cell(content["methods"].get(method), key, method)
            for content in results.values()
            for key in COLUMNS
        ]
        for method in methods
    ]
    run_on = (
        f"{release} with {', '.join(map(' '.join, content['versions'].items()))} "
        f"(commit {content['commit']})"
        for release, content in results.items()
    )
    table = report.markdown_block(pd.DataFrame(rows, columns=head), ":---:")
    return f"{table}\n\n<small>Run on {'; '.join(run_on)}.</small>"


def _cell(outcome: dict[str, bool] | None, key: str, method: str) -> str:
    if outcome is None:
        return "–"
    if key == "fold" and method != "metamask":
        return ""
    return {True: "yes", False: "**no**", None: "not run"}[outcome.get(key)]


def rows_table(sections: str, config: str) -> str:
    """Sections of a benchmark's report, or ``short``: mean ± standard deviation of each method."""
    benchmark = read_file(config, [])
    rows = rows_of(benchmark)
    if sections == "short":
        return report.markdown_block(_short_table(rows))
    blocks = dict(report.sections(benchmark, rows))
    names = sections.split(",")
    return "\n\n".join(report.markdown_block(block) for name in names for block in blocks[name])


def _short_table(rows: pd.DataFrame) -> pd.DataFrame:
    methods = rows.groupby("method", sort=False)
    accuracies = {
        f"{NAMES[measure]} %": [report.spread(values, 1) for _, values in methods[measure]]
        for measure in ("knn", "linear")
    }
    return pd.DataFrame({"method": [TITLES[str(name)] for name, _ in methods], **accuracies})


def _outcome(release: str) -> Path:
    return DOCS / "results" / f"methods_{release}.json"


def take(matrix: Path) -> None:
    """Makes the file of docs/results of what the matrix wrote for this release."""
    git = ["git", "-C", str(DOCS), "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    packages = {name: version(name) for name in ("torch", "lightning")}
    content = {
        "commit": subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip(),
        "versions": {"Python": platform.python_version(), **packages},
        "methods": json.loads(matrix.read_text()),
    }
    _outcome(hosts.RELEASE).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def draw() -> None:
    """Draws the figures of docs/results.md."""
    benchmark = read_file("cifar10_small", [])
    figures = draw_figures(benchmark, rows_of(benchmark))
    (DOCS / "cifar10.png").write_bytes(figures["accuracy"])
    (DOCS / "cifar10_differences.png").write_bytes(figures["differences"])


if __name__ == "__main__":
    arguments = [Path(name).resolve() for name in sys.argv[1:] if name != "--figures"]
    os.chdir(ROOT)  # a benchmark's file names its rows from there
    for matrix in arguments:
        take(matrix)
    if "--figures" in sys.argv:
        draw()
    for page in PAGES:
        page.write_text(renewed(page.read_text()))
