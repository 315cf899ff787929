"""The figures of a benchmark, from the rows of the results page."""

from pathlib import Path

import pytest
from drawn import misplaced
from scipy import stats

from metamask_solo.benchmark import figures
from metamask_solo.benchmark.file import BenchmarkFile, read_file
from metamask_solo.benchmark.rows import Row, group, read_csv

ROOT = Path(__file__).resolve().parents[2]


def read(name: str) -> tuple[BenchmarkFile, dict[str, list[Row]]]:
    rows = ROOT / "docs" / "results" / f"{name}.csv"
    file = read_file(
        ROOT / "scripts" / "benchmark" / f"{name}.yaml", [f"rows={rows}", "evaluations=[knn]"]
    )
    return file, group(read_csv(rows))


@pytest.mark.parametrize("name", ["digits", "textured-digits"])
def test_no_text_leaves_its_panel(name: str) -> None:
    file, groups = read(name)
    for figure in (
        figures.accuracy_figure(file, groups),
        figures.differences_figure(file, groups),
        figures.time_figure(file, groups),
        figures.curves_figure(groups),
    ):
        assert misplaced(figure) == []


def test_differences_stand_with_their_corrected_intervals() -> None:
    file, groups = read("digits")
    figure = figures.differences_figure(file, groups)
    axis = figure.axes[file.measured.index("knn")]
    places = {
        t.get_text(): y for t, y in zip(axis.get_yticklabels(), axis.get_yticks(), strict=True)
    }
    # pairs that a figure leaves out have no rows
    pairs = [pair for pair in file.pairs if {*pair} <= {*groups}]
    one, other = ({row.seed: row.metrics["knn"] for row in groups[m]} for m in pairs[0])
    paired = stats.ttest_rel([one[seed] for seed in one], [other[seed] for seed in one])
    count = len(figures.compare(pairs, groups, file.measured))
    expected = paired.confidence_interval(1 - 0.05 / count)
    place = places[" − ".join(pairs[0])]
    (drawn,) = (line for line in axis.lines if list(line.get_ydata()) == [place] * 2)
    assert list(drawn.get_xdata()) == pytest.approx([expected.low, expected.high])
