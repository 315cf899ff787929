"""Sweeps of ``metamask-solo pretrain`` by one of Hydra's launchers."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from runs import pretrain_config

from metamask_solo.__main__ import main


@pytest.mark.slow
def test_jobs_at_the_same_time_are_runs_of_their_own(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METAMASK_SOLO_RUN", "same")  # as after a run in the same process
    cfg = pretrain_config(images, tmp_path / "runs", fold_at_end=False)
    OmegaConf.save(cfg, tmp_path / "sweep.yaml")
    command = ["pretrain", "--config-path", str(tmp_path), "--config-name", "sweep", "-m"]
    launcher = ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10"]
    assert main([*command, *launcher, "seed=0,1", "hydra.sweep.dir=jobs"]) == 0

    folders = [*(tmp_path / "runs" / "metamask").iterdir()]
    seeds, losses = set(), set()
    for folder in folders:
        seeds.add(json.loads((folder / "args.json").read_text())["seed"])
        metrics = json.loads((folder / "finished.json").read_text())["metrics"]
        losses.add(metrics["train_nce_loss_epoch"])
        assert len(list(folder.glob("*.ckpt"))) == 1
    assert len(folders) == 2 and seeds == {0, 1} and len(losses) == 2
