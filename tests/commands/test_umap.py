"""The command ``metamask-solo umap``."""

import shutil
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from drawn import misplaced
from matplotlib.figure import Figure

from metamask_solo.__main__ import main
from metamask_solo.analysis.figures import draw_scatter


@pytest.mark.slow
def test_it_draws_the_same_twice_and_says_what_it_read(
    runs: dict[str, Path], images: Path, tmp_path: Path, figures: list[Figure], capsys
) -> None:
    def draw(out: str, *options: str) -> str:
        command = ["umap", str(runs["metamask"]), "--num-workers=0", f"--out={tmp_path / out}"]
        assert main([*command, *options]) == 0
        return figures[-1].axes[0].get_title().replace("\n", " ")

    for name in ("first.png", "again.png"):
        title = draw(name, "--split=train", "--samples=18", "--seed=3")
    assert title.endswith("masked backbone features of 18 train images")
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    assert "first.png: 18 train images, 5 classes" in capsys.readouterr().out
    (tmp_path / "flat").mkdir()
    for file in (images / "train").rglob("*.png"):
        shutil.copy(file, tmp_path / "flat" / f"{file.parent.name}-{file.name}")
    title = draw("flat.png", f"--data={tmp_path / 'flat'}", "--plain")
    assert title.endswith("plain backbone features of 20 images")
    assert "flat.png: 20 images, no classes" in capsys.readouterr().out


def test_each_class_has_its_name_and_colour_whichever_are_drawn(
    tmp_path: Path, figures: list[Figure]
) -> None:
    names = ["_hidden", r"$\bad$", "a class name with many more words than a legend can hold"]
    names += ["d", "e"]
    title = "a-long-name-of-a-run-" * 5 + "$x$.ckpt\nmasked backbone features of 60 val images"
    points, file = np.random.default_rng(0).normal(size=(60, 2)), tmp_path / "plot.svg"

    def colours(classes: list[str], drawn: range) -> dict[int, tuple[float, ...]]:
        labels = np.array(drawn)[np.arange(60) % len(drawn)]
        draw_scatter(points, labels, classes, title, file)
        assert misplaced(figures[-1]) == []
        (scatter,) = figures[-1].axes[0].collections
        faces = map(tuple, scatter.get_facecolor())  # type: ignore[arg-type]
        return dict(zip(labels.tolist(), faces, strict=True))

    many = [f"c{i}" for i in range(30)]
    assert colours(many, range(7, 20)).items() <= colours(many, range(30)).items()
    assert "class" in figures[-1].axes[1].get_ylabel()  # of a colour bar
    every = colours(names, range(5))
    assert colours(names, range(1, 4)).items() <= every.items()
    axes = figures[-1].axes[0]
    legend: Any = axes.get_legend()
    written = ["0 _hidden", r"1 $\bad$", "2 a class name with many more…", "3 d", "4 e"]
    assert [text.get_text() for text in legend.get_texts()] == written
    dots = [matplotlib.colors.to_rgb(line.get_color()) for line in legend.get_lines()]
    assert dots == [every[label][:3] for label in range(5)] and len({*dots}) == 5
    assert "$x$" in axes.get_title()
    assert axes.get_window_extent().width > 0.5 * figures[-1].bbox.width
    assert file.read_text().lstrip().startswith("<?xml")


def test_a_collapsed_run_and_a_missing_package_are_refused(
    runs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Path(shutil.copytree(runs["metamask"].parent, tmp_path / "run"), "run.ckpt")
    raw = torch.load(run, weights_only=True)
    raw["state_dict"]["mask.logits"].fill_(-1e4)
    torch.save(raw, run)
    out = tmp_path / "plot.png"
    command = ["umap", str(run), "--split=train", f"--out={out}", "--num-workers=0"]
    assert main(command) == 2
    assert "a drawing would show rounding errors" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "umap", None)
    assert main(command) == 2
    assert "pip install 'metamask-solo[umap]'" in capsys.readouterr().err
    assert not out.exists()
