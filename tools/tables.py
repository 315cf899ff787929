"""Writes the tables of docs that follow from the code, and from what the matrix of methods did.

`make docs` calls it; a test keeps the pages equal to it. To renew the outcome of a release, run the
matrix with a Python that has that release, and hand its file to this program::

    METAMASK_SOLO_MATRIX=matrix.json OMP_NUM_THREADS=1 \\
      python -m pytest tests/hosts/test_matrix.py -m "soak or not soak"
    python tools/tables.py matrix.json
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from metamask_solo.method.settings import SETTINGS
from metamask_solo.validation import allowed, shown

DOCS = Path(__file__).resolve().parent.parent / "docs"
# what the matrix notes of a method, and how the table says it
COLUMNS = {"pretrain": "pretrains", "resume": "resumes", "knn": "kNN", "fold": "folds"}
RELEASES = ("1.0.2", "main")


def settings_table() -> str:
    """A row for each setting of the method, in the order of the code."""
    rows = [
        [f"`{key}`", f"`{shown(field.default)}`", allowed(field), str(field.description)]
        for key, field in SETTINGS.items()
    ]
    return _table(["setting", "default", "allowed", "meaning"], rows, "---")


def methods_table() -> str:
    """A row for each method, and columns for each release, from docs/results."""
    results = {release: json.loads(_outcome(release).read_text("utf-8")) for release in RELEASES}
    methods = sorted({method for content in results.values() for method in content["methods"]})
    methods.sort(key=lambda name: name != "metamask")
    rows = [
        [
            f"`{method}`",
            *(
                _cell(content["methods"].get(method), key, method)
                for content in results.values()
                for key in COLUMNS
            ),
        ]
        for method in methods
    ]
    head = ["method", *(f"{r}: {title}" for r in results for title in COLUMNS.values())]
    run_on = (
        f"{release} with {', '.join(map(' '.join, content['versions'].items()))} "
        f"(commit {content['commit']})"
        for release, content in results.items()
    )
    return f"{_table(head, rows, ':---:')}\n\nRun on {'; '.join(run_on)}."


def _cell(outcome: dict[str, bool] | None, key: str, method: str) -> str:
    if outcome is None:
        return "–"
    if key == "fold" and method != "metamask":
        return ""
    return {True: "yes", False: "**no**", None: "not run"}[outcome.get(key)]


def _table(head: list[str], rows: list[list[str]], rule: str) -> str:
    return "\n".join(
        "| " + " | ".join(row) + " |" for row in [head, ["---", *[rule] * len(head[1:])], *rows]
    )


def _outcome(release: str) -> Path:
    return DOCS / "results" / f"methods_{release}.json"


def take(outcome: Path) -> None:
    """Makes the file of docs/results of what the matrix wrote."""
    from metamask_solo import hosts

    git = ["git", "-C", str(DOCS), "rev-parse", "--short=7", "HEAD"]
    content = {
        "commit": subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip(),
        "versions": {
            "Python": platform.python_version(),
            **{name: version(name) for name in ("torch", "lightning")},
        },
        "methods": json.loads(outcome.read_text(encoding="utf-8")),
    }
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    _outcome(hosts.RELEASE).write_text(text, encoding="utf-8")


def pages() -> dict[Path, str]:
    """Each page that has a table between its two marks, as it must be."""
    result: dict[Path, str] = {}
    for name, table in (("settings", settings_table), ("methods", methods_table)):
        begin, end = f"<!-- {name}: begin -->\n", f"\n<!-- {name}: end -->"
        (path,) = (p for p in DOCS.glob("*.md") if begin in p.read_text("utf-8"))
        before, _, rest = result.get(path, path.read_text("utf-8")).partition(begin)
        result[path] = before + begin + table() + end + rest.partition(end)[2]
    return result


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        take(Path(argument))
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
