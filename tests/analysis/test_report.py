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

from metamask_solo.analysis import figures
from metamask_solo.analysis.figures import FIGURES, draw_figures
from metamask_solo.analysis.measure_checkpoint import Measures, measure_checkpoint
from metamask_solo.analysis.report import (
    answers,
    check_output,
    clear_errors,
    report_html,
    write_analysis,
)
from metamask_solo.errors import UserError

DIMS, CLASSES = 24, 4


ABOUT = {
    "data": "data/<set>",
    "images": {"train": 200, "val": 80},
    "classes": CLASSES,
    "doubts": ["12 of 80 validation images are copies of training images"],
    "photographs": True,
    "seed": 0,
    "draws": 3,
}


@pytest.fixture(scope="module")
def measured(confounded) -> list[Measures]:
    checkpoints = [confounded("1: metamask", True), confounded("2: simclr", False)]
    return [measure_checkpoint(*checkpoint, seed=0, draws=3) for checkpoint in checkpoints]


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
        self.rows: list[list[str]] = []  # of all tables
        self.feed(text)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.sources += [v for k, v in attrs if k in ("src", "href", "action", "data", "srcset")]
        if tag not in ("img", "meta"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1][-1] += data


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "spread"),
    [
        (["1: a name that is long and has blanks in it"], 5e-4),
        (["1: metamask-textured-digits", "2: " + "METAMASK-" * 5, "3: a", "4: b"], 1.0),
    ],
)
def test_axes_are_named_and_no_text_leaves_its_panel(confounded, names, spread):
    known, *images = confounded()
    mask, history = (0.5 + spread * (values - 0.5) for values in (known.mask, known.history))
    known = replace(known, mask=mask, history=history)
    of = measure_checkpoint(known, *images, seed=0, draws=2)
    with matplotlib.rc_context(figures.STYLE):
        for name, (_, draw) in FIGURES.items():
            figure = draw([replace(of, name=label) for label in names])
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
    known, splits, _ = confounded()
    about = ABOUT
    if case == "collapsed":
        splits = {n: replace(s, features=np.full_like(s.features, 1.5)) for n, s in splits.items()}
    elif case == "no labels":
        splits = {"train": replace(splits["train"], labels=np.full(200, -1))}
        about = {**ABOUT, "images": {"train": 200}, "classes": None}
    else:
        known, splits = replace(known, notes=("features of 3 images are NaN",)), {}
    one = measure_checkpoint(known, splits, None, seed=0, draws=2)
    missing = {
        "collapsed": set(),
        "no labels": {"subsets", "bounds"},
        "not finite": set(FIGURES) - {"mask"},
    }[case]
    drawn = draw_figures([one])
    assert set(FIGURES) - set(drawn) == missing
    page = Page(report_html(about, [one], drawn))
    assert all(f"1: metamask: {note}." in page.text for note in one.notes)
    assert ("Accuracies need labels" in page.text) == (case != "collapsed")
    if case != "no labels":  # the others are shown all the same
        page = Page(report_html(ABOUT, [one, *measured], draw_figures([one, *measured])))
        assert ("features not measured" in page.text) == (case == "not finite")


@pytest.mark.slow
def test_folder_and_page_are_whole_and_load_nothing(measured, tmp_path):
    out = tmp_path / "new" / "out"
    check_output(out)
    write_analysis(out, ABOUT, measured)
    names = {path.name for path in out.iterdir()}
    assert names == {"analysis.json", "report.html", *(f"{name}.png" for name in FIGURES)}
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    page = Page((out / "report.html").read_text(encoding="utf-8"))
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
    assert "2: simclr: simclr, 24 dimensions, no mask of its own" in page.text
    plain, masked = (100 * measured[0].accuracy.loc["knn", name] for name in ("plain", "masked"))
    row = next(row for row in page.rows if row[:2] == ["1: metamask", "kNN"])
    assert row[2:5] == [f"{value:.2f}" for value in (plain, masked, masked - plain)]
    assert ["2: simclr", "kNN"] in [row[:2] for row in page.rows]
    assert sum(row[-1] == "yes" for row in page.rows) == 2 + 3  # kinds of information, and bounds
    numbers = json.loads((out / "analysis.json").read_text(encoding="utf-8"))
    one = numbers["checkpoints"][0]
    assert (one["name"], len(one["mask"])) == ("1: metamask", DIMS)
    assert one["accuracy"]["knn"]["plain"] == measured[0].accuracy.plain["knn"]
    assert one["bounds"]["masked"]["width"] == pytest.approx(measured[0].bounds.width["masked"])

    check_output(out)  # an earlier analysis is replaced
    write_analysis(out, ABOUT, measured)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first
    write_analysis(out, ABOUT, measured[1:])
    assert not (out / "mask.png").exists()


def test_page_says_when_the_mask_damps_the_wrong_dimensions(confounded):
    known, *images = confounded()
    against = replace(known, mask=known.mask[::-1].copy(), history=None)
    page = report_html(ABOUT, [measure_checkpoint(against, *images, 0, 2)], {})
    assert page.count("<td>the opposite</td>") == 2


def test_somebody_elses_folder_is_refused(tmp_path):
    check_output(tmp_path)  # empty
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    with pytest.raises(UserError, match="no analysis of this command"):
        check_output(tmp_path)
    for below in (file, file / "out"):
        with pytest.raises(UserError, match="name a folder"):
            check_output(below)


def test_one_of_many_gains_is_clear_by_chance_as_rarely_as_a_single_one(measured, rng):
    assert clear_errors(1) == pytest.approx(stats.norm.isf(0.025))
    for rows in (1, 8, 40):
        largest = rng.normal(size=(20_000, rows)).max(axis=1)
        assert np.mean(largest > clear_errors(rows)) == pytest.approx(0.025, abs=0.004)

    def answer(copies: int) -> str:
        gained = []
        for name in [f"run {number}" for number in range(copies)]:
            none = replace(measured[0].subsets["knn"], gain=0.0, gain_error=0.01)
            some = replace(none, gain=0.024 if not gained else 0.0)
            subsets = {"knn": some, "ridge": none}
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
        (0.0, 0.0, "nearly alike"),
    ],
)
def test_a_mask_is_spread_out_relative_to_its_largest_weight(measured, low, high, verdict):
    statistics = {**measured[0].mask_statistics, "min": low, "max": high}
    assert verdict in answers([replace(measured[0], mask_statistics=statistics)])[0]
