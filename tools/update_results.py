"""Renews the tables of README and docs/results.md, and their figures, from docs/results.

Run it by ``python tools/update_results.py``. A block stands between two comments; the first names
sections of the report and the arguments of ``metamask-solo benchmark`` that print them.
"""

import os
import re
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parents[1]
TITLES = {
    "random": "untrained backbone",
    "pixels": "pixels",
    "simclr": "SimCLR",
    "barlow_twins": "Barlow Twins",
    "vicreg": "VICReg",
    "joint": 'both losses, no mask ("joint")',
    "fixed_mask": "the same with a mask that stays",
    "heads": "MetaMask, trial step of the heads only",
    "fast": 'MetaMask, every fourth step ("fast")',
    "metamask": "MetaMask, the paper's setting",
}
PAGES = [ROOT / "README.md", ROOT / "docs" / "results.md"]
BLOCK = re.compile(r"(<!-- rows: (\S+) (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def renewed(text: str) -> str:
    """The page with each block as its rows make it."""
    from metamask_solo.benchmark import report
    from metamask_solo.benchmark.results import rows_of
    from metamask_solo.benchmark.schema import read_file

    def block(match: "re.Match[str]") -> str:
        head, wanted, arguments, end = match.groups()
        config, *overrides = arguments.split()
        benchmark = read_file(config, overrides)
        rows = rows_of(benchmark)
        if wanted == "short":
            return "\n".join([head.rstrip(), report.markdown_block(short_table(rows)), end])
        sections = dict(report.sections(benchmark, rows))
        parts = [report.markdown_block(b) for title in wanted.split(",") for b in sections[title]]
        return "\n".join([head.rstrip(), "\n\n".join(parts), end])

    return BLOCK.sub(block, text)


def short_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean ± standard deviation of each method in one decimal."""
    table: dict[str, list[str]] = {"method": [], "kNN %": [], "linear %": []}
    for method, runs in rows.groupby("method", sort=False):
        table["method"].append(TITLES[str(method)])
        for measure, column in (("knn", "kNN %"), ("linear", "linear %")):
            spread = f" ± {runs[measure].std():.1f}" if len(runs) > 1 else ""
            table[column].append(f"{runs[measure].mean():.1f}{spread}")
    return pd.DataFrame(table)


def draw() -> None:
    """Draws the figures of the page, docs/cifar10….png."""
    from metamask_solo.benchmark.figures import draw_figures
    from metamask_solo.benchmark.results import rows_of
    from metamask_solo.benchmark.schema import read_file

    benchmark = read_file("cifar10_small", [])
    for name, content in draw_figures(benchmark, rows_of(benchmark)).items():
        ending = "" if name == "accuracy" else f"_{name}"
        (ROOT / "docs" / f"cifar10{ending}.png").write_bytes(content)


if __name__ == "__main__":
    os.chdir(ROOT)  # a benchmark's file names its rows from there
    for page in PAGES:
        page.write_text(renewed(page.read_text()))
    draw()
