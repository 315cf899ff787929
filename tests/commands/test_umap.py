"""The command ``metamask-solo umap``."""

import importlib.machinery
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints_of_runs import write_run
from drawn import misplaced
from matplotlib.figure import Figure
from PIL import Image

from metamask_solo.checkpoints.reading import load_backbone
from metamask_solo.commands import umap
from metamask_solo.data.images import image_loader
from metamask_solo.errors import UserError
from metamask_solo.evaluation.features import extract_features


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "metamask", images)


class FirstTwo:
    """Stands in for umap-learn's UMAP, whose import alone takes seconds: keeps two dimensions."""

    calls: list[tuple[np.ndarray, dict[str, Any]]] = []

    def __init__(self, **settings: Any):
        self.settings = settings

    def fit_transform(self, features: np.ndarray) -> np.ndarray:
        self.calls.append((features, self.settings))
        return features[:, :2]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[np.ndarray, dict[str, Any]]]:
    module = types.ModuleType("umap")
    module.__spec__ = importlib.machinery.ModuleSpec("umap", None)
    module.UMAP = FirstTwo  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "umap", module)
    monkeypatch.setattr(FirstTwo, "calls", [])
    return FirstTwo.calls


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    saved: list[Figure] = []
    save = Figure.savefig

    def record(self: Figure, *args: Any, **kwargs: Any) -> None:
        saved.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", record)
    return saved


def draw(run: Path, out: Path, *options: str) -> None:
    common = ["--split", "train", "--num-workers", "0", "--out", str(out)]
    assert umap.main([str(run), *common, *options]) == 0


@pytest.mark.parametrize(("option", "masked"), [([], True), (["--plain"], False)])
def test_each_image_is_drawn_in_the_colour_of_its_class(
    run: Path,
    images: Path,
    tmp_path: Path,
    calls: list[Any],
    figures: list[Figure],
    option: list[str],
    masked: bool,
) -> None:
    draw(run, tmp_path / "plot.png", *option)

    backbone, checkpoint = load_backbone(run, masked)
    features, labels = extract_features(backbone, image_loader(images / "train", checkpoint.config))
    torch.testing.assert_close(torch.from_numpy(calls[0][0]), features)
    axes = figures[0].axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        f"class_{label}" for label in range(5)
    ]
    for label, points in enumerate(axes.collections):
        expected = features[labels == label, :2].numpy()
        np.testing.assert_allclose(points.get_offsets(), expected, rtol=1e-5)
    assert len({tuple(points.get_facecolor()[0]) for points in axes.collections}) == 5
    assert ("masked" if masked else "plain") in axes.get_title()
    assert Image.open(tmp_path / "plot.png").size > (500, 500)


def test_many_classes_get_a_colour_bar(tmp_path: Path, figures: list[Figure]) -> None:
    points, labels = np.random.default_rng(0).normal(size=(60, 2)), np.arange(60) % 30

    umap._draw(points, labels, [f"class {i}" for i in range(30)], "$title", tmp_path / "plot.svg")

    axes, bar = figures[0].axes
    assert axes.get_legend() is None
    assert "class" in bar.get_ylabel()
    np.testing.assert_array_equal(axes.collections[0].get_array(), labels)
    assert (tmp_path / "plot.svg").read_text().lstrip().startswith("<?xml")


def test_long_and_special_names_are_drawn_whole_and_as_they_stand(
    tmp_path: Path, figures: list[Figure]
) -> None:
    points, labels = np.random.default_rng(0).normal(size=(60, 2)), np.arange(60) % 3
    names = ["_hidden", r"$\bad$", "a class name with many more words than a legend can hold"]
    title = "a-long-name-of-a-run-" * 5 + "$x$.ckpt\nmasked backbone features of 60 val images"

    umap._draw(points, labels, names, title, tmp_path / "plot.png")

    axes = figures[0].axes[0]
    drawn = [text.get_text() for text in axes.get_legend().get_texts()]
    assert drawn == ["_hidden", r"$\bad$", "a class name with many more w…"]
    assert "$x$" in axes.get_title()
    assert misplaced(figures[0]) == []
    assert axes.get_window_extent().width > 0.5 * figures[0].bbox.width


def test_samples_and_seed_choose_the_images(
    run: Path, tmp_path: Path, calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 0, 1):
        draw(run, tmp_path / "plot.png", "--samples", "16", "--seed", str(seed))

    first, again, other = (features for features, _ in calls)
    assert len(first) == 16
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert [settings["random_state"] for _, settings in calls] == [0, 0, 1]
    assert "plot.png: 16 images" in capsys.readouterr().out


@pytest.mark.slow
def test_umap_itself_gives_the_same_drawing_twice(run: Path, tmp_path: Path) -> None:
    draw(run, tmp_path / "first.png", "--features", "projector", "--seed", "3")
    draw(run, tmp_path / "again.png", "--features", "projector", "--seed", "3")

    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "again.png").read_bytes()


def test_without_umap_learn_it_says_how_to_install_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)

    with pytest.raises(UserError, match="pip install umap-learn"):
        draw(run, tmp_path / "plot.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", "15"], "15 images: UMAP needs more than 15"),
        (["--samples", "0"], "--samples=0"),
        (["--seed", "-1"], "--seed=-1"),
        (["--out", "plot.gif"], "--out=plot.gif: must end in .png"),
        (["--data", "gone"], "--data=gone: no such folder"),
    ],
)
def test_what_cannot_be_done_is_said(
    run: Path, tmp_path: Path, calls: list[Any], options: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        draw(run, tmp_path / "plot.png", *options)

    assert list(tmp_path.iterdir()) == []
