"""What a run shows and logs: its warnings, its last lines, with labels and without."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from runs import pretrain_config

from metamask_solo.training.pretrain import pretrain_run
from metamask_solo.training.resume import read_metrics
from metamask_solo.training.trainer import quiet


def test_what_a_user_can_act_on_is_still_shown() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with quiet():
            warnings.warn("Found 70 module(s) in eval mode at the start of training.", stacklevel=1)
            warnings.warn("`torch.jit.script` is deprecated.", FutureWarning, stacklevel=1)
            warnings.warn("num_workers may be a bottleneck", stacklevel=1)
    assert [str(w.message) for w in caught] == ["num_workers may be a bottleneck"]


def test_a_run_shows_its_profile_and_ends_with_its_folder_and_the_next_commands(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = pretrain_config(images, tmp_path, optimizer__lr=0.01, profiler="simple")
    cfg.enable_progress_bar = True
    result = pretrain_run(cfg)
    shown = capsys.readouterr()
    assert f"folder: {result.folder}" in shown.out
    assert f"next: metamask-solo plot {result.folder}" in shown.out
    assert f"metamask-solo knn {result.folder}" in shown.out
    assert f"checkpoint: {result.checkpoint}" in shown.out
    assert json.loads((result.folder / "args.json").read_text())["method"] == "metamask"
    (profile,) = result.folder.glob("*profile*.txt")
    for text in (shown.out, profile.read_text()):
        assert "run_training_batch" in text


@pytest.mark.parametrize("method", ["metamask", "byol"])
def test_training_without_labels_logs_no_classifier_and_names_no_command_that_needs_them(
    method: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, image in enumerate(sorted((images / "train").rglob("*.png"))):
        (flat / f"{i}.png").symlink_to(image)
    cfg = pretrain_config(images, tmp_path, method, max_epochs=2, data__no_labels=True, momentum={})
    cfg.data.train_path, cfg.log_every_n_steps, cfg.log_rankme = str(flat), 1, False
    result = pretrain_run(cfg)

    printed = capsys.readouterr().out
    assert "metamask-solo knn" not in printed
    assert f"metamask-solo umap {result.folder}" in printed
    table = read_metrics(result.folder)
    assert any(name.startswith("train_") for name in table)
    assert not [name for name in table if "class_loss" in name or "acc" in name]
    assert not [name for name in table if "rankme" in name]  # switched off
    assert np.isfinite(table.fillna(0)).all(axis=None)
