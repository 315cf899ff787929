"""Writes the table of docs/methods.md from what the matrix of methods did: `make docs` calls it.

The outcome of each release is a file of docs/results. To renew one, run the matrix and hand its
file to this script, with a Python that has that release::

    METAMASK_SOLO_MATRIX=matrix.json OMP_NUM_THREADS=1 \\
      python -m pytest tests/hosts/test_matrix.py -m "soak or not soak"
    python tools/methods_table.py matrix.json
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from marked import with_table

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "methods.md"
RESULTS = {
    "1.0.2": ROOT / "docs" / "results" / "methods_1.0.2.json",
    "main": ROOT / "docs" / "results" / "methods_main.json",
}
# what the matrix notes, and how the table says it
COLUMNS = {"pretrain": "pretrains", "resume": "resumes", "knn": "kNN", "fold": "folds"}
OURS = "metamask"


def table(results: dict[str, dict[str, Any]]) -> str:
    """A Markdown table with a row for each method, and columns for each release.

    Args:
        results: release to what its file holds.
    """
    heads = [f"{release}: {head}" for release in results for head in COLUMNS.values()]
    methods = {method for content in results.values() for method in content["methods"]}
    lines = [
        "| " + " | ".join(["method", *heads]) + " |",
        "| --- |" + " :---: |" * len(heads),
    ]
    for method in sorted(methods, key=lambda name: (name != OURS, name)):
        cells = [
            _cell(content["methods"].get(method), key, method)
            for content in results.values()
            for key in COLUMNS
        ]
        lines.append("| " + " | ".join([f"`{method}`", *cells]) + " |")
    with_ = [f"{release} with {_versions(content)}" for release, content in results.items()]
    return "\n".join([*lines, "", f"Run on {'; '.join(with_)}."])


def _cell(outcome: dict[str, bool] | None, key: str, method: str) -> str:
    if outcome is None:
        return "–"
    if key == "fold" and method != OURS:
        return ""
    return {True: "yes", False: "**no**", None: "not run"}[outcome.get(key)]


def _versions(content: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    return f"{packages} (commit {content['commit']})"


def read_results() -> dict[str, dict[str, Any]]:
    return {release: json.loads(file.read_text("utf-8")) for release, file in RESULTS.items()}


def take(outcome: Path) -> Path:
    """Makes a file of docs/results of what the matrix wrote; returns it."""
    from metamask_solo import hosts

    git = ["git", "-C", str(ROOT), "rev-parse", "--short=7", "HEAD"]
    content = {
        "commit": subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip(),
        "versions": {
            "Python": platform.python_version(),
            **{name: version(name) for name in ("torch", "lightning")},
        },
        "methods": json.loads(outcome.read_text(encoding="utf-8")),
    }
    file = RESULTS[hosts.RELEASE]
    file.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return file


if __name__ == "__main__":
    for path in sys.argv[1:]:
        print(take(Path(path)))
    PAGE.write_text(
        with_table(PAGE.read_text(encoding="utf-8"), "methods", table(read_results())),
        encoding="utf-8",
    )
