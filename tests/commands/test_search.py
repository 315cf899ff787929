"""Sweeps (-m) and searches: what ends one, the table at its end, a W&B run for each job."""

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from runs import pretrain_config, train
from small_resnet import write_module

from metamask_solo.__main__ import main
from metamask_solo.commands import pretrain
from metamask_solo.errors import RunStopped, UserError
from metamask_solo.hosts import pl
from metamask_solo.training.endings import scripts_folder
from metamask_solo.training.pretrain import pretrain_run
from metamask_solo.training.resume import FitResult

pytestmark = pytest.mark.usefixtures("small_backbone")
DIGITS = str(scripts_folder() / "pretrain" / "digits")


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[Any]]:
    """Replaces the training of each job by a function of its config; collects the configs."""
    monkeypatch.chdir(tmp_path)

    def replace(train: Callable[[Any], float]) -> list[Any]:
        configs: list[Any] = []

        def job(cfg: Any) -> FitResult:
            configs.append(cfg)
            value = train(cfg)
            metrics = {"val_knn_acc1": value, "val_acc1": 10.0}
            return FitResult(tmp_path / f"run-{cfg.seed}", None, metrics, 1.0)

        monkeypatch.setattr(pretrain, "pretrain_run", job)
        return configs

    return replace


def sweep(*arguments: str, name: str = "metamask") -> int:
    command = ["pretrain", "--config-path", DIGITS, "--config-name", name, "-m", *arguments]
    return main([*command, "hydra.sweep.dir=jobs"])


def search(*arguments: str) -> int:
    # optuna 2 begins no file with sqlalchemy 2, which may be installed for other packages
    return sweep(*arguments, "hydra.sweeper.storage=null", name="metamask_optuna")


def accuracy(cfg: Any) -> float:
    return 50.0 + float(cfg.method_kwargs.alpha)


def diverge(cfg: Any) -> float:
    raise RunStopped("step 3: the loss not finite")


class Signal(pl.Callback):  # type: ignore[name-defined]
    def __init__(self, number: signal.Signals):
        self.number = number

    def on_train_batch_start(self, *_: Any) -> None:
        os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_sweep_and_not_one_job(
    number: signal.Signals,
    images: Path,
    tmp_path: Path,
    jobs: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a real run in the first job: it is saved, and no other begins."""
    small = pretrain_config(images, tmp_path / "runs", "simclr")
    configs = jobs(lambda cfg: pretrain_run(small, callbacks=(Signal(number),)))
    assert sweep("seed=0,1,2") == 128 + number
    assert len(configs) == 1 and len(list(tmp_path.glob("runs/**/*.ckpt"))) == 1
    printed = capsys.readouterr().err
    assert f"stopped by {number.name} in epoch 0, after step 1" in printed
    assert "Error executing" not in printed
    jobs(lambda cfg: 1.0)  # a later command in the same process starts jobs again
    assert sweep("seed=0,1") == 0


def test_other_jobs_go_on_after_one_that_failed_and_a_table_says_which_is_best(
    jobs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = jobs(lambda cfg: diverge(cfg) if cfg.seed == 1 else 40.0 + cfg.seed)
    assert sweep("seed=0,1,2", "optimizer.lr=0.5") == 1
    assert [cfg.seed for cfg in configs] == [0, 1, 2]
    out, err = capsys.readouterr()
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["overrides", "val_knn_acc1", "val_acc1", "folder"]
    assert [row[:2] for row in rows[1:3]] == [["seed=2", "42.00"], ["seed=0", "40.00"]]
    assert rows[1][3].endswith("run-2") and rows[3] == ["seed=1", "failed"]
    assert "failed: step 3" in err and "Error executing" not in err


def test_a_diverged_trial_is_marked_and_the_search_goes_on(
    jobs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models: list[Any] = []

    def train(cfg: Any) -> float:
        # the model of a trial that failed would fill the GPU
        assert all(model() is None for model in models)
        if len(configs) == 2:
            model = torch.nn.Linear(1, 1)
            models.append(weakref.ref(model))
            diverge(cfg)
        return float("nan") if len(configs) == 3 else accuracy(cfg)

    configs = jobs(train)
    assert search("hydra.sweeper.n_trials=5") == 1
    assert len(configs) == 5
    assert "failed: step 3" in capsys.readouterr().err
    best = yaml.safe_load((tmp_path / "jobs/optimization_results.yaml").read_text())
    alphas = [cfg.method_kwargs.alpha for i, cfg in enumerate(configs) if i not in (1, 2)]
    assert best["best_value"] == pytest.approx(50 + max(alphas))


def refuse(cfg: Any) -> float:
    raise UserError("method_kwargs.alpha=-1: must be at least 0")


@pytest.mark.parametrize(
    ("job", "override", "code", "begun", "line"),
    [
        (accuracy, "knn_eval.enabled=False", 2, 0, "no objective, no run computes val_knn"),
        (accuracy, "limit_val_batches=0", 2, 0, "no objective, no run computes val_knn"),
        (refuse, "seed=1", 2, 1, "method_kwargs.alpha=-1: must be at least 0"),
        (diverge, "seed=1", 1, 3, "every trial of the search failed"),
    ],
)
def test_a_search_in_which_nothing_works_is_one_line(
    job: Any,
    override: str,
    code: int,
    begun: int,
    line: str,
    jobs: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    configs = jobs(job)
    assert search(override, "hydra.sweeper.n_trials=3") == code
    assert len(configs) == begun and line in capsys.readouterr().err


@pytest.mark.slow
def test_jobs_at_the_same_time_are_runs_of_their_own_and_sigterm_ends_them(
    images: Path, tmp_path: Path
) -> None:
    cfg = pretrain_config(images, tmp_path / "runs", max_epochs=100_000, imports=["small"])
    OmegaConf.save(cfg, tmp_path / "sweep.yaml")
    command = [sys.executable, "-m", "metamask_solo", "pretrain", "--config-path", str(tmp_path)]
    command += ["--config-name", "sweep", "-m", "seed=0,1,2,3", "hydra.sweep.dir=jobs"]
    command += ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    environment = {**os.environ, "PYTHONPATH": write_module(tmp_path)}
    environment["METAMASK_SOLO_RUN"] = "same"  # as after a run in the same process
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
        # both jobs train: a checkpoint lies in the folder of each
        while len({p.parent for p in tmp_path.glob("runs/*/*/*.ckpt")}) < 2:
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.2)
        process.terminate()
        assert process.wait(300) == 143, (tmp_path / "log").read_text()
    args = [json.loads(path.read_text()) for path in tmp_path.glob("runs/metamask/*/args.json")]
    assert sorted(arguments["seed"] for arguments in args) == [0, 1]
    assert not list(tmp_path.rglob("finished.json"))
    assert "stopped by SIGTERM in epoch" in (tmp_path / "log").read_text()


def test_each_job_has_a_wandb_run_of_its_own(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = []

    class Look(pl.Callback):  # type: ignore[name-defined]
        def on_train_start(self, trainer: Any, model: Any) -> None:
            ids.append(wandb.run.id)

    for seed in (0, 1):
        cfg = pretrain_config(images, tmp_path / "runs", "simclr", seed=seed)
        cfg.wandb = {"enabled": True, "offline": True, "project": "test", "entity": None}
        _, fit = train(cfg, Look())
        assert wandb.run is None  # closed
        assert ids[-1] == fit.folder.name
        assert (fit.folder / "metrics.csv").is_file()  # and the CSV is there too
    assert len(set(ids)) == 2
