"""The command ``metamask-solo umap``."""

import shutil
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from drawn import misplaced
from matplotlib.figure import Figure
from PIL import Image

from metamask_solo.analysis.figures import draw_scatter
from metamask_solo.commands import umap
from metamask_solo.errors import UserError


@pytest.fixture
def run(runs: dict[str, Path]) -> Path:
    return runs["metamask"]


def draw(run: Path, out: Path, *options: str) -> None:
    assert umap.main([str(run), "--num-workers", "0", "--out", str(out), *options]) == 0


@pytest.mark.slow
def test_it_draws_the_same_twice_and_says_what_it_read(
    run: Path, images: Path, tmp_path: Path, figures: list[Figure], capsys
) -> None:
    for name in ("first.png", "again.png"):
        draw(run, tmp_path / name, "--split", "train", "--samples", "18", "--seed", "3")
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    assert "first.png: 18 train images, 5 classes" in capsys.readouterr().out
    assert figures[0].axes[0].get_title().endswith("masked backbone features of 18 train images")
    flat = tmp_path / "flat"
    for file in sorted((images / "train").rglob("*.png")):
        flat.mkdir(exist_ok=True)
        shutil.copy(file, flat / f"{file.parent.name}-{file.name}")
    draw(run, tmp_path / "flat.png", "--data", str(flat), "--plain")
    title = figures[-1].axes[0].get_title().replace("\n", " ")
    assert title.endswith("plain backbone features of 20 images")
    assert "flat.png: 20 images, no classes" in capsys.readouterr().out
    assert Image.open(tmp_path / "flat.png").size > (500, 500)


def test_each_class_has_its_colour_whichever_are_drawn(
    tmp_path: Path, figures: list[Figure]
) -> None:
    points = np.random.default_rng(0).normal(size=(60, 2))
    for classes, drawn in ((5, range(5)), (5, range(1, 4)), (30, range(30)), (30, range(7, 20))):
        labels = np.array(drawn)[np.arange(60) % len(drawn)]
        draw_scatter(points, labels, [f"c{i}" for i in range(classes)], "", tmp_path / "a.svg")
    colours = []
    for figure in figures:
        figure.draw_without_rendering()
        (scatter,) = figure.axes[0].collections
        faces = dict(zip(scatter.get_array(), map(tuple, scatter.get_facecolor()), strict=True))  # type: ignore[arg-type]
        colours.append(faces)
        if legend := figure.axes[0].get_legend():
            names = [text.get_text() for text in legend.get_texts()]
            assert names == [f"{i} c{i}" for i in range(5)] and len(set(faces.values())) == len(
                faces
            )
            dots = [matplotlib.colors.to_rgb(line.get_color()) for line in legend.get_lines()]
            assert all(dots[int(label)] == face[:3] for label, face in faces.items())
        else:
            assert "class" in figure.axes[1].get_ylabel()
    for every, some in (colours[:2], colours[2:]):
        assert some.items() <= every.items()
    assert (tmp_path / "a.svg").read_text().lstrip().startswith("<?xml")


def test_long_and_special_names_are_drawn_whole_and_as_they_stand(
    tmp_path: Path, figures: list[Figure]
) -> None:
    points, labels = np.random.default_rng(0).normal(size=(60, 2)), np.arange(60) % 3
    names = ["_hidden", r"$\bad$", "a class name with many more words than a legend can hold"]
    title = "a-long-name-of-a-run-" * 5 + "$x$.ckpt\nmasked backbone features of 60 val images"

    draw_scatter(points, labels, names, title, tmp_path / "plot.png")

    axes = figures[0].axes[0]
    drawn = [text.get_text() for text in axes.get_legend().get_texts()]  # type: ignore[union-attr]
    assert drawn == ["0 _hidden", r"1 $\bad$", "2 a class name with many more…"]
    assert "$x$" in axes.get_title()
    assert misplaced(figures[0]) == []
    assert axes.get_window_extent().width > 0.5 * figures[0].bbox.width


def test_a_collapsed_run_is_not_drawn(run: Path, tmp_path: Path) -> None:
    raw = torch.load(run, weights_only=True)
    raw["state_dict"]["mask.logits"].fill_(-1e4)
    shutil.copytree(run.parent, tmp_path / "run")
    torch.save(raw, tmp_path / "run/run.ckpt")
    with pytest.raises(UserError, match="nearly"):
        draw(tmp_path / "run", tmp_path / "plot.png", "--split", "train")


def test_without_umap_learn_it_says_how_to_install_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(UserError, match=r"pip install 'metamask-solo\[umap\]'"):
        draw(run, tmp_path / "plot.png")
