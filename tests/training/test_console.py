"""What a run shows on the console: its bar, its warnings, its first and last lines."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import pretrain_config

from metamask_solo.training.callbacks import Bar
from metamask_solo.training.pretrain import pretrain_run
from metamask_solo.training.trainer import quiet

SIMCLR = {"proj_hidden_dim": 16, "proj_output_dim": 16, "temperature": 0.2}


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
