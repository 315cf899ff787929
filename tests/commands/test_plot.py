"""``metamask-solo plot``, the bar of a run, and what its console shows."""

import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from drawn import misplaced
from matplotlib.figure import Figure
from runs import pretrain_config

from metamask_solo.__main__ import main
from metamask_solo.checkpoints.reading import read_checkpoint
from metamask_solo.training.console import quiet
from metamask_solo.training.pretraining import pretrain_run
from metamask_solo.training.progress import Bar
from metamask_solo.training.resume import read_metrics

SIMCLR = {"proj_hidden_dim": 16, "proj_output_dim": 16, "temperature": 0.2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, images: Path) -> list[Path]:
    out = tmp_path_factory.mktemp("runs")
    knn = {"enabled": True, "k": 3, "distance_func": "cosine"}
    found = []
    for method in ("metamask", "simclr"):
        cfg = pretrain_config(images, out, method, max_epochs=2, optimizer__lr=0.01, knn_eval=knn)
        if method == "metamask":
            cfg.method_kwargs.scale_loss = 0.5
        else:
            cfg.method_kwargs = {"proj_hidden_dim": 16, "proj_output_dim": 8, "temperature": 0.2}
        found.append(pretrain_run(cfg).folder)
    return found


def test_the_curves_are_those_that_were_logged(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k))[1]
    )
    out = tmp_path / "plot.png"
    assert main(["plot", *map(str, [*runs, runs[1]]), "--out", str(out)]) == 0

    assert out.read_bytes().startswith(b"\x89PNG")
    axes = {a.get_title().split("\n")[0]: a for a in saved[0].axes if a.get_visible()}
    titles = ("contrastive loss (NT-Xent)", "redundancy loss (Barlow Twins)", "online kNN")
    assert {*titles, "RankMe of the backbone's features", "mask of 1: metamask-test"} <= {*axes}
    for title, column in (
        ("online kNN", "val_knn_acc1"),
        ("RankMe of the backbone's features", "train_rankme"),
    ):
        for run, line in zip([*runs, runs[1]], axes[title].lines, strict=True):
            values = [float(row[column]) for row in read_metrics(run) if row.get(column)]
            np.testing.assert_allclose(line.get_ydata(), values)
        assert "coincide" in axes[title].get_title()
    # without the weight of each method, so that the curves can be compared
    line = axes["redundancy loss (Barlow Twins)"].lines[0]
    logged = [row["train_barlow_loss_epoch"] for row in read_metrics(runs[0])]
    values = [float(value) / 0.5 for value in logged if value]
    np.testing.assert_allclose(line.get_ydata(), values)
    assert misplaced(saved[0]) == []
    mask = read_checkpoint(runs[0]).mask
    assert mask is not None
    low, high = axes["mask of 1: metamask-test"].get_ylim()
    assert high - low >= 0.1  # a mask that hardly moved does not fill the panel
    assert f"{mask.min():.4f} to {mask.max():.4f}" in saved[0].axes[-1].get_title() or any(
        f"{mask.min():.4f} to {mask.max():.4f}" in a.get_title() for a in saved[0].axes
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["gone"], "gone: no such run"),
        (["."], "no metrics were logged"),
        ([".", "--out", "plot.gif"], "must end in .png"),
    ],
)
def test_what_cannot_be_drawn_is_said(
    argv: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plot", *argv]) == 2
    assert message in capsys.readouterr().err


def test_the_bar_shows_loss_knn_and_mask_and_no_version_number() -> None:
    known = {"val_knn_acc1": 61.25, "mask_min": 0.41, "mask_max": 0.6, "lr": 0.1}
    trainer = SimpleNamespace(callback_metrics={k: torch.tensor(v) for k, v in known.items()})
    bar = Bar()
    bar._loss = torch.tensor(1.23456)

    assert bar.get_metrics(trainer, None) == {
        "loss": "1.235",
        "online kNN %": "61.2",
        "mask": "0.410–0.600",
    }


def test_what_a_user_can_act_on_is_still_shown() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with quiet():
            warnings.warn("Found 70 module(s) in eval mode at the start of training.", stacklevel=1)
            warnings.warn("`torch.jit.script` is deprecated.", FutureWarning, stacklevel=1)
            warnings.warn("num_workers may be a bottleneck", stacklevel=1)
    assert [str(w.message) for w in caught] == ["num_workers may be a bottleneck"]


def test_a_run_ends_with_its_folder_and_the_next_commands(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = pretrain_run(pretrain_config(images, tmp_path, optimizer__lr=0.01))
    printed = capsys.readouterr().out
    assert f"folder: {result.folder}" in printed
    assert f"next: metamask-solo plot {result.folder}" in printed
    assert f"metamask-solo knn {result.folder}" in printed
    assert json.loads((result.folder / "args.json").read_text())["method"] == "metamask"


def test_without_labels_no_next_command_needs_them(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = pretrain_config(
        images, tmp_path, method="simclr", data__no_labels=True, data__val_path=None
    )
    cfg.method_kwargs = SIMCLR
    result = pretrain_run(cfg)
    printed = capsys.readouterr().out
    assert "metamask-solo knn" not in printed
    assert f"metamask-solo umap {result.folder}" in printed


def test_a_run_begins_with_the_size_of_its_model(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = pretrain_config(
        images,
        tmp_path,
        "simclr",
        fast_dev_run=True,
        method_kwargs=SIMCLR,
        enable_model_summary=None,
    )
    pretrain_run(cfg)
    printed = capsys.readouterr().out
    # ResNet-18, its projector and the online classifier of five classes
    assert re.search(r"^parameters: 1[12],\d{3},\d{3}, trained: 1[12],\d{3},\d{3}$", printed, re.M)
    assert "FLOP" not in printed

    cfg.enable_model_summary = False
    pretrain_run(cfg)
    assert "parameters:" not in capsys.readouterr().out
