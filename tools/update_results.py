"""Renews the tables of docs/results.md from the rows in docs/results.

Run it by ``python tools/update_results.py``. A table stands between two comments; the first names
the arguments of ``metamask-solo benchmark`` that print it. Its headings are lowered by two.
"""

import os
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results.md"
BLOCK = re.compile(
    r"(<!-- metamask-solo benchmark (\S+) ([^>]*?) ?--from-rows -->\n).*?(<!-- end -->)", re.DOTALL
)


def renewed(text: str) -> str:
    """The page with each table as its rows make it."""
    from metamask_solo.benchmark.file import read_file
    from metamask_solo.commands.benchmark import report_of_rows

    def table(found: "re.Match[str]") -> str:
        head, file, overrides, end = found.groups()
        benchmark = read_file(ROOT / file, [_from_root(word) for word in overrides.split()])
        report = report_of_rows(benchmark).split("\n", 1)[1].strip()
        return f"{head}\n{re.sub(r'^## ', '#### ', report, flags=re.MULTILINE)}\n\n{end}"

    return BLOCK.sub(table, text)


def _from_root(override: str) -> str:
    key, _, value = override.partition("=")
    return f"{key}={ROOT / value}" if key == "rows" else override


def draw(text: str) -> None:
    """Draws anew the figures of the page, docs/<name of the rows>.png, that are there."""
    from metamask_solo.benchmark.figures import draw_figures
    from metamask_solo.benchmark.file import read_file
    from metamask_solo.benchmark.rows import read_csv

    for _, file, overrides, _ in BLOCK.findall(text):
        benchmark = read_file(ROOT / file, [_from_root(word) for word in overrides.split()])
        rows = benchmark.rows_file
        if rows is None:
            continue
        for name, content in draw_figures(benchmark, read_csv(rows)).items():
            ending = "" if name == "accuracy" else f"_{name}"
            place = PAGE.parent / f"{rows.stem}{ending}.png"
            if f"({place.name})" in text:
                place.write_bytes(content)


if __name__ == "__main__":
    os.chdir(ROOT)  # a file names its rows from there
    PAGE.write_text(renewed(PAGE.read_text()))
    draw(PAGE.read_text())
