"""The figures, the page and the folder."""

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from drawn import misplaced
from PIL import Image
from scipy import stats

from metamask_solo.analysis import drawing
from metamask_solo.analysis.figures import FIGURES, draw_figures
from metamask_solo.analysis.output import check_output, write_output
from metamask_solo.analysis.records import Analysis, Data, Settings
from metamask_solo.analysis.report import answers, clear_errors, report_html
from metamask_solo.analysis.study import Study, study
from metamask_solo.errors import UserError

DIMS = 24
DATA = Data(folder="data/<set>", classes=4, train_images=200, val_images=80, background=True)
SETTINGS = Settings(
    seed=0, samples=1000, draws=3, knn_k=5, knn_temperature=1.0, penalties=[1.0, 0.1]
)


@pytest.fixture(scope="module")
def studies(confounded) -> list[Study]:
    subjects = [confounded("1: metamask", True), confounded("2: simclr", False)]
    return [study(subject, background, seed=0, draws=3) for subject, background in subjects]


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Drawing takes the time of these tests; nothing here depends on the resolution."""
    monkeypatch.setitem(drawing.STYLE, "savefig.dpi", 40)


class Page(HTMLParser):
    """Collects what a browser would load, and checks that every element is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.sources: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.sources += [v for k, v in attrs if k in ("src", "href", "action", "data", "srcset")]
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_every_figure_has_names_and_units_on_its_axes(studies):
    for name, draw in FIGURES.items():
        figure = draw(studies)
        assert figure is not None, name
        assert figure.get_figwidth() > 6  # inches
        axes = [axis for axis in figure.axes if axis.get_visible() and axis.axison]
        assert axes
        for axis in axes:
            if axis.get_label() == "<colorbar>":
                assert axis.get_ylabel()
                continue
            assert re.search(r"\(.+\)", axis.get_xlabel()), (name, axis.get_xlabel())
            named_bars = name in (
                "bracket",
                "differences",
            )  # its vertical axis lists the checkpoints
            assert named_bars or re.search(r"\(.+\)", axis.get_ylabel()), (name, axis.get_ylabel())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "spread"),
    [
        (["1: a name that is long and has blanks in it"], 5e-4),
        (["1: metamask-finite-difference-textured-digits", "2: " + "METAMASK-" * 5, "3: a"], 1.0),
        ([f"{number}: run-{number}" for number in range(1, 5)], 1.0),
    ],
)
def test_no_text_leaves_its_panel_or_runs_over_another(confounded, names, spread):
    subject, background = confounded()
    assert subject.mask is not None and subject.history is not None
    steps, masks = subject.history
    mask, masks = (0.5 + spread * (values - 0.5) for values in (subject.mask, masks))
    subject = replace(subject, mask=mask, history=(steps, masks))
    found = study(subject, background, seed=0, draws=2)
    several = [replace(found, name=name) for name in names]
    with matplotlib.rc_context(drawing.STYLE):
        for name, draw in FIGURES.items():
            figure = draw(several)
            assert figure is not None
            assert misplaced(figure) == [], name


def test_a_mask_that_hardly_moved_looks_like_one(confounded):
    subject, background = confounded()
    subject = replace(subject, mask=0.5 + 5e-4 * (subject.mask - 0.5))
    found = study(subject, background, seed=0, draws=2)
    for draw in (FIGURES["mask"], FIGURES["information"]):
        axes = draw([found]).axes
        low, high = axes[0].get_xlim()
        assert high - low >= 0.1
        assert "0.4998 to 0.5002" in axes[0].get_title() + axes[0].get_xlabel()


def test_curves_that_coincide_say_so(confounded):
    subject, background = confounded()
    still = replace(subject, mask=np.full(DIMS, 0.5, dtype=np.float32))
    found = [study(one, background, seed=0, draws=2) for one in (still, subject)]
    found = [replace(one, name=name) for one, name in zip(found, ("1: a", "2: b"), strict=True)]
    figure = FIGURES["spectrum"](found)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    ends = [label.partition(" (")[2] for label in labels]
    assert ends == ["", "coincides with 1, plain)", "coincides with 1, plain)", ""]
    assert figure.axes[0].get_title().endswith("\n2 coincides with 1")


@pytest.mark.slow
def test_figures_are_png_files_and_the_same_every_time(studies):
    first = draw_figures(studies)
    assert list(first) == list(FIGURES)
    for content in first.values():
        assert Image.open(io.BytesIO(content)).format == "PNG"
    assert draw_figures(studies) == first


def test_figures_without_a_mask(studies):
    drawn = draw_figures(studies[1:])
    assert set(FIGURES) - set(drawn) == {"mask", "information", "differences"}


def test_figures_of_a_constant_mask_without_history(confounded):
    subject, _ = confounded()
    subject = replace(subject, mask=np.full(DIMS, 0.5, dtype=np.float32), history=None)
    found = study(subject, None, seed=0, draws=2)
    assert set(FIGURES) - set(draw_figures([found])) == {"information"}


@pytest.mark.slow
def test_folder_and_page_are_whole_and_load_nothing(studies, tmp_path):
    out = tmp_path / "new" / "out"
    write_output(out, DATA, SETTINGS, studies)
    names = {path.name for path in out.iterdir()}
    assert names == {"analysis.json", "report.html", *(f"{name}.png" for name in FIGURES)}
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    assert page.open == []
    assert len(page.sources) == len(FIGURES)
    for source in page.sources:
        head, content = source.split(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(content).startswith(b"\x89PNG")
    assert page.text.count("How to read:") == 6
    assert "data/<set>" in page.text
    assert "2: simclr: no mask of its own (none was learned" in page.text
    assert "2: simclr: no mask of its own, or one that is the same for all dimensions" in page.text
    row = re.search(r"<td>class</td>.*", (out / "report.html").read_text(encoding="utf-8"))
    assert row is not None and "<td>yes</td>" in row[0]
    numbers = json.loads((out / "analysis.json").read_text(encoding="utf-8"))
    assert numbers["made_by"] == "metamask-solo analyze"
    assert [found["name"] for found in numbers["checkpoints"]] == ["1: metamask", "2: simclr"]
    assert numbers["settings"]["draws"] == 3

    check_output(out)  # an earlier analysis is replaced
    write_output(out, DATA, SETTINGS, studies[1:])
    assert not (out / "mask.png").exists()
    assert len(json.loads((out / "analysis.json").read_text())["checkpoints"]) == 1


def page_of(found: Study, background: bool = True) -> str:
    data = replace(DATA, background=background)
    return report_html(Analysis("test", data, SETTINGS, [found.numbers]), {})


def test_page_tells_when_the_mask_damps_the_wrong_dimensions(confounded, studies, tmp_path):
    against, background = confounded()
    against = replace(against, mask=against.mask[::-1].copy(), history=None)
    found = study(against, background, seed=0, draws=2)
    page = page_of(found)
    assert page.count("<td>the opposite</td>") == 3
    assert "no metadata.csv" not in page


def test_page_without_any_mask(studies):
    page = Page(page_of(studies[1], background=False))
    assert "2: simclr: no mask of its own (none was learned" in page.text
    assert page.sources == []


def test_page_without_metadata(studies):
    page = Page(page_of(studies[0], background=False))
    assert "no metadata.csv" in page.text


def test_somebody_elses_folder_is_refused(tmp_path):
    check_output(tmp_path / "new")
    check_output(tmp_path)  # empty
    (tmp_path / "analysis.json").write_text('{"made_by": "another"}')
    with pytest.raises(UserError, match="no analysis of this command"):
        check_output(tmp_path)
    (tmp_path / "analysis.json").write_text("[")
    with pytest.raises(UserError, match="no analysis of this command"):
        check_output(tmp_path)
    for below in (tmp_path / "analysis.json", tmp_path / "analysis.json" / "out"):
        with pytest.raises(UserError, match="analysis.json is a file"):
            check_output(below)


def test_a_folder_without_permission_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(UserError, match="no permission for"):
        check_output(tmp_path / "a" / "b")


def test_one_of_many_gains_is_clear_by_chance_as_rarely_as_a_single_one():
    assert clear_errors(1) == pytest.approx(stats.norm.isf(0.025))
    rng = np.random.default_rng(0)
    for rows in (1, 8, 40):
        largest = rng.normal(size=(20_000, rows)).max(axis=1)
        assert np.mean(largest > clear_errors(rows)) == pytest.approx(0.025, abs=0.004)


def test_a_gain_is_named_where_it_is_clear_among_all_rows(studies):
    def answer(copies: int) -> str:
        gained = []
        for name in [f"run {number}" for number in range(copies)]:
            numbers = studies[0].numbers
            assert numbers.subsets is not None
            none = replace(numbers.subsets.knn, held_out_gain=0.0, held_out_gain_error=0.01)
            some = replace(none, held_out_gain=0.024 if not gained else 0.0)
            found = replace(numbers.subsets, knn=some, linear=none)
            gained.append(replace(numbers, name=name, subsets=found))
        return answers(gained)[1]

    assert "better left out, in run 0 (kNN)." in answer(1)
    assert "no evidence" in answer(20)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.38, 0.65, "spread out"),
        (0.0005, 0.04, "spread out"),  # 80 times as much, however small
        (0.49, 0.51, "nearly alike"),
        (0.1, 0.1, "nearly alike"),  # wherever it came from
        (0.0, 0.0, "nearly alike"),
        (-0.5, -0.1, "spread out"),
    ],
)
def test_a_mask_is_spread_out_relative_to_its_largest_weight(studies, low, high, verdict):
    numbers = studies[0].numbers
    statistics = replace(numbers.mask.statistics, min=low, max=high)
    numbers = replace(numbers, mask=replace(numbers.mask, statistics=statistics))
    assert verdict in answers([numbers])[0]
