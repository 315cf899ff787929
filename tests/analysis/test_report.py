"""The figures, the page and the folder."""

import base64
import io
import json
import re
from dataclasses import replace

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

ABOUT = {
    "data": "data/<set>",
    "images": {"train": 200, "val": 80},
    "classes": 4,
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


def test_what_was_not_measured_is_not_drawn(confounded, measured):
    known, splits, _ = confounded()
    same = {n: replace(s, features=np.full_like(s.features, 1.5)) for n, s in splits.items()}
    unlabelled = {"train": replace(splits["train"], labels=np.full(200, -1))}
    collapsed, unlabelled, diverged = (
        measure_checkpoint(known, kept, None, seed=0, draws=2) for kept in (same, unlabelled, {})
    )
    assert set(draw_figures([unlabelled])) == set(FIGURES) - {"subsets", "bounds"}
    assert set(draw_figures([diverged])) == {"mask"}
    # the others are shown all the same
    assert set(draw_figures([collapsed, diverged, measured[0]])) == set(FIGURES)


@pytest.mark.slow
def test_folder_and_page_are_whole_and_load_nothing(measured, tmp_path):
    out = tmp_path / "new" / "out"
    check_output(out)
    write_analysis(out, ABOUT, measured)
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    assert set(first) == {"analysis.json", "report.html", *(f"{name}.png" for name in FIGURES)}

    page = first["report.html"].decode()
    sources = re.findall(r'\b(?:src|href|action|data|srcset)="([^"]*)"', page)
    contents = [base64.b64decode(s.removeprefix("data:image/png;base64,")) for s in sources]
    assert [Image.open(io.BytesIO(content)).format for content in contents] == ["PNG"] * 6
    assert sorted(contents) == sorted(first[f"{name}.png"] for name in FIGURES)
    page = " ".join(page.split())
    assert (
        "200 training images and 80 validation images in 4 classes of data/&lt;set&gt;, seed 0."
        in page
    )
    assert "12 of 80 validation images are copies of training images" in page
    assert "2: simclr: simclr, 24 dimensions, no mask of its own" in page
    plain, masked = (100 * measured[0].accuracy.loc["knn", name] for name in ("plain", "masked"))
    cells = [f"<td>{value:.2f}</td>" for value in (plain, masked, masked - plain)]
    assert f"<th>kNN</th> {' '.join(cells)}" in page
    assert page.count("<td>yes</td>") == 2 + 3  # kinds of information, and bounds

    numbers = json.loads(first["analysis.json"])
    one = numbers["checkpoints"][0]
    assert (one["name"], len(one["mask"])) == ("1: metamask", 24)
    assert one["accuracy"]["knn"]["plain"] == measured[0].accuracy.plain["knn"]
    assert one["bounds"]["masked"]["width"] == pytest.approx(measured[0].bounds.width["masked"])

    check_output(out)  # an earlier analysis is replaced
    write_analysis(out, ABOUT, measured)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first
    write_analysis(out, ABOUT, measured[1:])
    assert not (out / "mask.png").exists()


def test_somebody_elses_folder_is_refused(tmp_path):
    check_output(tmp_path)  # empty
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    with pytest.raises(UserError, match="no analysis of this command"):
        check_output(tmp_path)
    with pytest.raises(UserError, match="name a folder"):
        check_output(file / "out")


def test_page_says_when_the_mask_damps_the_wrong_dimensions(confounded):
    known, *images = confounded()
    against = replace(known, mask=known.mask[::-1].copy(), history=None)
    page = report_html(ABOUT, [measure_checkpoint(against, *images, 0, 2)], {})
    assert page.count("<td>the opposite</td>") == 2


def test_one_of_many_gains_is_clear_by_chance_as_rarely_as_a_single_one(measured, rng):
    assert clear_errors(1) == pytest.approx(stats.norm.isf(0.025))
    for rows in (1, 8, 40):
        largest = rng.normal(size=(20_000, rows)).max(axis=1)
        assert np.mean(largest > clear_errors(rows)) == pytest.approx(0.025, abs=0.004)

    def answer(copies: int) -> str:
        none = replace(measured[0].subsets["knn"], gain=0.0, gain_error=0.01)
        runs = [
            replace(measured[0], name=f"run {number}", subsets={"knn": none, "ridge": none})
            for number in range(copies)
        ]
        runs[0].subsets["knn"] = replace(none, gain=0.024)
        return answers(runs)[1]

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
