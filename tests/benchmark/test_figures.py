"""Figures and pages of a benchmark, from the rows of the results page."""

from pathlib import Path

import matplotlib
import pytest
from drawn import misplaced

from metamask_solo.analysis.figures import STYLE
from metamask_solo.benchmark import figures, report
from metamask_solo.benchmark.results import rows_of, same_methods
from metamask_solo.benchmark.schema import BenchmarkFile, read_file
from metamask_solo.benchmark.statistics import compare

ROOT = Path(__file__).resolve().parents[2]


def read(name: str, rows: str, *overrides: str) -> BenchmarkFile:
    path = ROOT / "docs" / "results" / f"{rows}.csv"
    return read_file(ROOT / "scripts" / "benchmark" / f"{name}.yaml", [f"rows={path}", *overrides])


@pytest.mark.parametrize(
    "benchmark", [read("cifar10_small", "cifar10"), read("digits", "digits", "evaluations=[knn]")]
)
def test_no_text_leaves_its_panel(benchmark: BenchmarkFile) -> None:
    rows = rows_of(benchmark)
    family = compare(rows, benchmark.pairs({*rows.method}, same_methods(rows)), benchmark.measured)
    with matplotlib.rc_context(STYLE):
        drawn = [
            figures.accuracy_figure(rows, benchmark.measured),
            figures.differences_figure(family),
        ]
    for figure in drawn:
        assert misplaced(figure) == []
    # the intervals that are drawn are those of the comparisons
    axis = drawn[1].axes[0]
    names = [text.get_text() for text in axis.get_yticklabels()]
    for line in family[family.measure == "knn"].itertuples():
        height = names.index(f"{line.method} − {line.baseline}")
        (interval,) = (x for x in axis.lines if list(x.get_ydata()) == [height] * 2)
        assert list(interval.get_xdata()) == [line.low, line.high]


def test_a_search_shows_its_settings_and_compares_nothing() -> None:
    benchmark = read("cifar10_search", "cifar10_search")
    rows = rows_of(benchmark)
    titles = [title for title, _ in report.sections(benchmark, rows)]
    assert titles == ["Results", "Best settings"]
    assert {*figures.draw_figures(benchmark, rows)} >= {"accuracy"}


def test_both_pages_hold_answer_tables_and_figures() -> None:
    """The sentences and numbers themselves stand in docs/results.md, which tests/docs checks."""
    benchmark = read("cifar10_small", "cifar10")
    sections = report.sections(benchmark, rows_of(benchmark), ["<note>"])
    text = report.markdown("a & b", "line", sections, ["accuracy"])
    page = report.page("a & b", "line", sections, {"accuracy": b"png"})

    assert text.startswith("# a & b\n\nline\n\n## Answer\n\n- Does MetaMask help? ")
    assert "**-1.71 (-2.90 to -0.51)**" in text and text.endswith("![accuracy](accuracy.png)\n")
    assert "<h1>a &amp; b</h1>" in page and "<li>&lt;note&gt;</li>" in page
    assert "<td><b>-1.71 (-2.90 to -0.51)</b></td>" in page
    assert 'src="data:image/png;base64,cG5n"' in page
