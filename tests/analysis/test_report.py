"""The figures, the page and the folder."""

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import matplotlib
import numpy as np
import pytest
from drawn import misplaced
from PIL import Image
from scipy import stats

from metamask_solo.analysis import figures
from metamask_solo.analysis.figures import FIGURES, draw_figures
from metamask_solo.analysis.measure_checkpoint import Measures, measure_checkpoint
from metamask_solo.analysis.report import (
    Analysis,
    answers,
    check_output,
    clear_errors,
    report_html,
    write_analysis,
)
from metamask_solo.errors import UserError

DIMS, CLASSES = 24, 4


@pytest.fixture(scope="module")
def measured(confounded) -> list[Measures]:
    subjects = [confounded("1: metamask", True), confounded("2: simclr", False)]
    return [measure_checkpoint(subject, background, 0, 3) for subject, background in subjects]


def analysis(*checkpoints: Measures, **changes: Any) -> Analysis:
    of = Analysis(
        data="data/<set>",
        images={"train": 200, "val": 80},
        classes=CLASSES,
        doubts=["12 of 80 validation images are copies of training images"],
        background=True,
        seed=0,
        samples=1000,
        draws=3,
        untrained={"pixels": {"knn": 0.25, "linear": 0.3}},
        checkpoints=list(checkpoints),
    )
    return replace(of, **changes)


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Drawing takes the time of these tests; nothing here depends on the resolution."""
    monkeypatch.setitem(figures.STYLE, "savefig.dpi", 40)


class Page(HTMLParser):
    """Collects what a browser would load, and checks that every element is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.sources: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.sources += [v for k, v in attrs if k in ("src", "href", "action", "data", "srcset")]
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "spread"),
    [
        (["1: a name that is long and has blanks in it"], 5e-4),
        (["1: metamask-finite-difference-textured-digits", "2: " + "METAMASK-" * 5, "3: a"], 1.0),
        ([f"{number}: run-{number}" for number in range(1, 5)], 1.0),
    ],
)
def test_axes_are_named_and_no_text_leaves_its_panel(confounded, names, spread):
    subject, background = confounded()
    steps, masks = subject.history
    mask, masks = (0.5 + spread * (values - 0.5) for values in (subject.mask, masks))
    subject = replace(subject, mask=mask, history=(steps, masks))
    of = measure_checkpoint(subject, background, seed=0, draws=2)
    with matplotlib.rc_context(figures.STYLE):
        for name, draw in FIGURES.items():
            figure = draw([replace(of, name=label) for label in names])
            assert figure is not None
            assert misplaced(figure) == [], name
            axes = [axis for axis in figure.axes if axis.get_visible() and axis.axison]
            for axis in axes:
                if axis.get_label() != "<colorbar>":
                    assert re.search(r"\(.+\)", axis.get_xlabel()), (name, axis.get_xlabel())
            if spread < 0.01 and name in ("mask", "information"):
                low, high = axes[0].get_xlim()
                assert high - low >= 0.1  # a mask that hardly moved looks like one
                assert "0.4998 to 0.5002" in axes[0].get_title() + axes[0].get_xlabel()


@pytest.mark.parametrize("case", ["collapsed", "no labels", "not finite"])
def test_what_was_not_measured_is_not_drawn_and_said(confounded, measured, case):
    subject, _ = confounded()
    if case == "collapsed":
        subject.train.features[:] = 1.5
        subject.val.features[:] = 1.5
    elif case == "no labels":
        unlabelled = replace(subject.train, labels=np.full(200, -1))
        subject = replace(subject, train=unlabelled, val=None)
    else:
        subject = replace(subject, train=None, val=None, notes=["features of 3 images are NaN"])
    one = measure_checkpoint(subject, None, seed=0, draws=2)
    missing = {
        "collapsed": set(),
        "no labels": {"subsets", "differences", "bounds"},
        "not finite": set(FIGURES) - {"mask"},
    }[case]
    drawn = draw_figures([one])
    assert set(FIGURES) - set(drawn) == missing
    data = {"images": {"train": 200}, "classes": None} if case == "no labels" else {}
    page = Page(report_html(analysis(one, **data), drawn))
    assert all(f"1: metamask: {note}." in page.text for note in one.notes)
    if case != "collapsed":
        assert "Accuracies need labels" in page.text
    if case != "no labels":  # the others are shown all the same
        page = Page(report_html(analysis(one, *measured), draw_figures([one, *measured])))
        assert "not measured" in page.text or case == "collapsed"


@pytest.mark.slow
def test_folder_and_page_are_whole_and_load_nothing(measured, tmp_path):
    out = tmp_path / "new" / "out"
    write_analysis(out, analysis(*measured))
    names = {path.name for path in out.iterdir()}
    assert names == {"analysis.json", "report.html", *(f"{name}.png" for name in FIGURES)}
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    html = (out / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == [] and len(page.sources) == len(FIGURES)
    for source in page.sources:
        head, content = source.split(",")
        assert head == "data:image/png;base64"
        assert Image.open(io.BytesIO(base64.b64decode(content))).format == "PNG"
    assert (
        "200 training images and 80 validation images in 4 classes of data/<set>, seed 0."
        in page.text
    )
    assert "12 of 80 validation images are copies of training images" in page.text
    assert "2: simclr: no mask of its own (none was learned" in page.text
    assert "2: simclr: no mask of its own, or one that is the same for all" in page.text
    assert "<td>pixels</td>" in html and "<td>30.0%</td>" in html
    assert re.search(r"<td>class</td>.*<td>yes</td>", html)
    numbers = json.loads((out / "analysis.json").read_text(encoding="utf-8"))
    assert [one["name"] for one in numbers["checkpoints"]] == ["1: metamask", "2: simclr"]

    check_output(out)  # an earlier analysis is replaced
    write_analysis(out, analysis(*measured))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first
    write_analysis(out, analysis(measured[1], background=False))
    assert not (out / "mask.png").exists()


def test_page_says_when_the_mask_damps_the_wrong_dimensions(confounded):
    against, background = confounded()
    against = replace(against, mask=against.mask[::-1].copy(), history=None)
    page = report_html(analysis(measure_checkpoint(against, background, 0, 2)), {})
    assert page.count("<td>the opposite</td>") == 3


def test_somebody_elses_folder_is_refused(tmp_path, monkeypatch):
    check_output(tmp_path / "new")
    check_output(tmp_path)  # empty
    file = tmp_path / "analysis.json"
    for content in ('{"made_by": "another"}', "["):
        file.write_text(content)
        with pytest.raises(UserError, match="no analysis of this command"):
            check_output(tmp_path)
    for below in (file, file / "out"):
        with pytest.raises(UserError, match="analysis.json is a file"):
            check_output(below)
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(UserError, match="no permission for"):
        check_output(tmp_path / "a" / "b")


def test_one_of_many_gains_is_clear_by_chance_as_rarely_as_a_single_one(measured, rng):
    assert clear_errors(1) == pytest.approx(stats.norm.isf(0.025))
    for rows in (1, 8, 40):
        largest = rng.normal(size=(20_000, rows)).max(axis=1)
        assert np.mean(largest > clear_errors(rows)) == pytest.approx(0.025, abs=0.004)

    def answer(copies: int) -> str:
        gained = []
        for name in [f"run {number}" for number in range(copies)]:
            none = replace(measured[0].subsets.curves["knn"], gain=0.0, gain_error=0.01)
            some = replace(none, gain=0.024 if not gained else 0.0)
            subsets = replace(measured[0].subsets, curves={"knn": some, "ridge": none})
            gained.append(replace(measured[0], name=name, subsets=subsets))
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
def test_a_mask_is_spread_out_relative_to_its_largest_weight(measured, low, high, verdict):
    mask = measured[0].mask
    mask = replace(mask, statistics={**mask.statistics, "min": low, "max": high})
    assert verdict in answers([replace(measured[0], mask=mask)])[0]
