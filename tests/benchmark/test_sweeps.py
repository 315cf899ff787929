"""Sweeps of ``metamask-solo pretrain`` by Hydra's launchers: every job is a run of its own."""

import json
from pathlib import Path

import pytest
from joblib.externals.loky import get_reusable_executor

from metamask_solo.__main__ import main

pytestmark = pytest.mark.slow
DIGITS = Path(__file__).parents[2] / "scripts" / "pretrain" / "digits"


@pytest.mark.parametrize(
    "launcher",
    [
        ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
        ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10"],
    ],
)
def test_jobs_at_the_same_time_are_runs_of_their_own(
    launcher: list[str], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METAMASK_SOLO_RUN", "same")  # as after a run in the same process
    # workers that another test left have its folder and environment
    get_reusable_executor().shutdown(wait=True)

    small = {
        "data.train_path": images / "train",
        "data.val_path": images / "val",
        "data.num_workers": 0,
        "optimizer.batch_size": 10,
        "max_epochs": 1,
        "knn_eval.k": 3,
        "accelerator": "cpu",
        "method_kwargs.proj_hidden_dim": 16,
        "method_kwargs.proj_output_dim": 16,
        "method_kwargs.contrastive_hidden_dim": 16,
        "method_kwargs.contrastive_output_dim": 8,
        "fold_at_end": "false",
        "enable_progress_bar": "false",
        "hydra.sweep.dir": "jobs",
    }
    command = ["pretrain", "--config-path", str(DIGITS), "--config-name", "metamask", "-m"]
    overrides = [*launcher, "seed=0,1", *(f"{key}={value}" for key, value in small.items())]
    assert main([*command, *overrides]) == 0

    folders = [*(tmp_path / "trained_models" / "metamask").iterdir()]
    seeds, losses = set(), set()
    for folder in folders:
        seeds.add(json.loads((folder / "args.json").read_text())["seed"])
        metrics = json.loads((folder / "finished.json").read_text())["metrics"]
        losses.add(metrics["train_nce_loss_epoch"])
        assert len(list(folder.glob("*.ckpt"))) == 1
    assert len(folders) == 2 and seeds == {0, 1} and len(losses) == 2
