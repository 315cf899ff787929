"""The command ``metamask-solo plot``: each case is a run's folder as people have it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn import misplaced
from matplotlib.figure import Figure

from metamask_solo.__main__ import main

Plot = Callable[..., dict[str, Any]]


def write_run(folder: Path, losses: list[Any], log: str = "logs/version_0", **config: Any) -> Path:
    """A run that logged a loss and an online kNN accuracy an epoch."""
    rows = ["epoch,step,train_loss_epoch,val_knn_acc1"]
    rows += [f"{epoch},{9 * epoch + 8},{loss},{50 + epoch}" for epoch, loss in enumerate(losses)]
    (folder / log).mkdir(parents=True, exist_ok=True)
    (folder / log / "metrics.csv").write_text("\n".join(rows) + "\n")
    if config:
        base = {"backbone": {"name": "resnet18"}, "method": "simclr", "data": {"dataset": "custom"}}
        (folder / "args.json").write_text(json.dumps(base | config))
    return folder


@pytest.fixture
def plot(tmp_path: Path, figures: list[Figure]) -> Plot:
    """Runs the command, and returns the panels by the first line of their titles."""

    def plot(*runs: Path) -> dict[str, Any]:
        out = tmp_path / "plot.png"
        assert main(["plot", *map(str, runs), "--out", str(out)]) == 0
        assert out.read_bytes().startswith(b"\x89PNG")
        figure = figures[-1]
        assert misplaced(figure) == []
        return {a.get_title().partition("\n")[0]: a for a in figure.axes if a.get_visible()}

    return plot


def labels(axis: Any) -> list[str]:
    return [line.get_label() for line in axis.lines]


def test_the_curves_and_the_mask_are_those_that_were_logged(plot: Plot, tmp_path: Path) -> None:
    one = write_run(tmp_path / "a", [4.0, 3.0, 2.5], name="metamask")
    two = write_run(tmp_path / "b", [4.0, 3.0, 2.5], name="simclr")
    # the average of an EMA is not the last one of the history
    state = {"backbone.weight": torch.ones(1), "mask.logits": torch.linspace(-0.04, 0.08, 8)}
    state["mask._extra_state"] = torch.tensor(0)  # sigmoid
    masks = torch.stack([torch.full((8,), 0.5), torch.linspace(0.49, 0.52, 8)])
    history = {"step": torch.tensor([0, 9]), "mask": masks}
    torch.save({"state_dict": state, "metamask": {"history": history}}, one / "last.ckpt")

    panels = plot(one, two / "logs" / ".." / "args.json")
    assert list(panels) == ["training loss", "online kNN", "mask of 1: metamask"]
    loss = panels["training loss"]
    for line in loss.lines:
        np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3])
        np.testing.assert_array_equal(line.get_ydata(), [4.0, 3.0, 2.5])
    assert labels(loss) == ["1: metamask", "2: simclr"]
    assert loss.lines[0].get_linewidth() > loss.lines[1].get_linewidth()  # and so none is hidden
    mask = panels["mask of 1: metamask"]
    assert "at the end: 0.4900 to 0.5200" in mask.get_title()
    assert mask.lines[0].get_xdata().tolist() == [0, 9]
    assert mask.get_xlabel() == "optimiser step (count)" and loss.get_xlabel() == "epoch"
    low, high = mask.get_ylim()
    assert high - low >= 0.1  # a mask that hardly moved does not fill the panel


def test_a_loss_that_is_no_number_breaks_the_line(plot: Plot, tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", [4.0, "nan", 3.0, "inf", "", 2.0, 1.5])
    line = plot(run)["training loss"].lines[0]
    np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3, 4, 6, 7])
    np.testing.assert_array_equal(line.get_ydata(), [4.0, np.nan, 3.0, np.nan, 2.0, 1.5])
    # between two gaps there is no line, so that a point must be marked to be seen
    long = write_run(tmp_path / "long", [1.0] * 29 + ["nan", 2.0, "nan"] + [1.0] * 29)
    assert 30 in plot(long)["training loss"].lines[0].get_markevery()


def test_logs_as_people_have_them(plot: Plot, tmp_path: Path) -> None:
    other_folder = write_run(tmp_path / "other", [4.0, 3.0])
    write_run(other_folder, [9.0, 9.0], log="logs/version_old")
    metrics_alone = write_run(tmp_path / "alone", [4.0, 3.0], log="")
    without_step = write_run(tmp_path / "step", [4.0, 3.0]) / "logs/version_0/metrics.csv"
    without_step.write_text(without_step.read_text().replace("1,17,3.0", "1,,3.0"))
    with_mark = write_run(tmp_path / "mark", [4.0, 3.0], log="") / "metrics.csv"
    with_mark.write_bytes(b"\xef\xbb\xbf" + with_mark.read_bytes())
    lines = plot(other_folder, metrics_alone, without_step.parents[2], with_mark.parent)
    for line in lines["training loss"].lines:
        np.testing.assert_array_equal(line.get_xdata(), [1, 2])
        np.testing.assert_array_equal(line.get_ydata(), [4.0, 3.0])


def test_runs_of_one_name_are_labelled_by_what_differs(plot: Plot, tmp_path: Path) -> None:
    def sweep(folder: str, lr: float, seed: int, mask_lr: float = 0.1) -> Path:
        settings: dict[str, Any] = {"optimizer": {"lr": lr}, "seed": seed}
        settings["data"] = {"dataset": "custom", "num_workers": seed}
        settings["method_kwargs"] = {"mask": {"lr": mask_lr}}
        return write_run(tmp_path / folder, [lr + seed, 1.0], name="sweep", **settings)

    runs = [sweep("a", 0.1, 0), sweep("b", 0.3, 0), sweep("c", 0.3, 1), sweep("d", 0.3, 1)]
    alone = write_run(tmp_path / "e", [9.0, 1.0], name="alone")
    assert labels(plot(*runs, alone)["training loss"])[1:] == [
        "2: sweep (scaled lr=0.3, seed=0)",
        "3: sweep (scaled lr=0.3, seed=1, c)",
        "4: sweep (scaled lr=0.3, seed=1, d)",
        "5: alone",
    ]
    assert labels(plot(runs[0], sweep("z", 0.3, 0, mask_lr=1.0))["training loss"]) == [
        "1: sweep (mask.lr=0.1, scaled lr=0.1)",
        "2: sweep (mask.lr=1.0, scaled lr=0.3)",
    ]
