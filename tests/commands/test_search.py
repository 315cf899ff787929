"""Sweeps (-m) and searches: what ends one, what is kept, and one W&B run for each job."""

import gc
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from metamask_solo.training.sweeps import Job
from omegaconf import DictConfig, OmegaConf
from runs import pretrain_config, train

from metamask_solo.__main__ import main
from metamask_solo.commands import pretrain
from metamask_solo.errors import RunStopped, UserError
from metamask_solo.hosts import pl
from metamask_solo.training.endings import scripts_folder
from metamask_solo.training.pretrain import pretrain_run
from metamask_solo.training.resume import FitResult

DIGITS = str(scripts_folder() / "pretrain" / "digits")
SIMCLR = {"proj_hidden_dim": 16, "proj_output_dim": 16, "temperature": 0.2}


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[Any]]:
    """Replaces the training of each job by a function of its config; collects the configs."""
    monkeypatch.chdir(tmp_path)

    def replace(train: Callable[[Any], float]) -> list[Any]:
        seen: list[Any] = []

        def job(cfg: Any) -> FitResult:
            seen.append(cfg)
            metrics = {"val_knn_acc1": train(cfg)} if train is not None else {}
            return FitResult(tmp_path, None, metrics, 1.0)

        monkeypatch.setattr(pretrain, "pretrain_run", job)
        return seen

    return replace


def sweep(*arguments: str, name: str = "metamask") -> int:
    command = ["pretrain", "--config-path", DIGITS, "--config-name", name, "-m", *arguments]
    return main([*command, "hydra.sweep.dir=jobs"])


def search(*arguments: str) -> int:
    return sweep(*arguments, name="metamask_optuna")


def trials(folder: Path) -> dict[str, int]:
    (file,) = folder.glob("*.db")
    storage = f"sqlite:///{file}"
    (summary,) = optuna.get_all_study_summaries(storage)
    study = optuna.load_study(study_name=summary.study_name, storage=storage)
    states = [trial.state.name for trial in study.trials]
    return {state: states.count(state) for state in set(states)}


def accuracy(cfg: Any) -> float:
    return 50.0 + float(cfg.method_kwargs.alpha)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_sweep_and_not_one_job(
    number: signal.Signals,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a real run in the first job: it is saved, and no other begins."""
    monkeypatch.chdir(tmp_path)
    begun = []

    class Signal(pl.Callback):  # type: ignore[name-defined]
        def on_train_batch_start(self, *_: Any) -> None:
            os.kill(os.getpid(), number)

    def job(cfg: Any) -> FitResult:
        begun.append(cfg.seed)
        small = pretrain_config(images, tmp_path / "runs", "simclr", method_kwargs=SIMCLR)
        return pretrain_run(small, callbacks=(Signal(),))

    monkeypatch.setattr(pretrain, "pretrain_run", job)
    assert sweep("seed=0,1,2") == 128 + number
    assert begun == [0] and len(list((tmp_path / "runs").rglob("*.ckpt"))) == 1
    told = capsys.readouterr().err
    assert f"stopped by {number.name} in epoch 0, after step 1" in told
    assert "Error executing" not in told
    # a later command in the same process starts jobs again
    monkeypatch.setattr(pretrain, "pretrain_run", lambda cfg: FitResult(tmp_path, None, {}, 1.0))
    assert sweep("seed=0,1") == 0


def test_other_jobs_go_on_after_one_that_diverged(
    jobs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def diverge(cfg: Any) -> float:
        if cfg.seed == 1:
            raise RunStopped("step 3: the loss not finite")
        return 1.0

    seen = jobs(diverge)
    assert sweep("seed=0,1,2") == 1
    assert [cfg.seed for cfg in seen] == [0, 1, 2]
    assert "Error executing" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "without",
    ["knn_eval.enabled=False", "data.val_path=null", "data.no_labels=True", "limit_val_batches=0"],
)
def test_a_search_without_objective_is_refused_before_the_first_trial(
    without: str, jobs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = jobs(accuracy)
    assert search(without, "hydra.sweeper.n_trials=2") == 2
    assert not seen and not list(tmp_path.iterdir())
    assert f"{without}: then the search has no objective" in capsys.readouterr().err


def test_an_objective_that_no_run_computes_ends_the_search(
    jobs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = jobs(None)
    assert search("hydra.sweeper.n_trials=3") == 2
    assert len(seen) == 1 and "val_knn_acc1: the run did not compute it" in capsys.readouterr().err


def test_a_diverged_trial_is_marked_and_the_search_goes_on(
    jobs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(cfg: Any) -> float:
        if len(seen) == 2:
            raise RunStopped("step 3: the loss not finite")
        return float("nan") if len(seen) == 3 else accuracy(cfg)

    seen = jobs(train)
    assert search("hydra.sweeper.n_trials=5") == 0
    assert len(seen) == 5 and trials(tmp_path) == {"COMPLETE": 3, "FAIL": 2}
    assert "trial failed: step 3" in capsys.readouterr().err
    best = yaml.safe_load((tmp_path / "jobs/optimization_results.yaml").read_text())
    alphas = [cfg.method_kwargs.alpha for i, cfg in enumerate(seen) if i not in (1, 2)]
    assert best["best_value"] == pytest.approx(50 + max(alphas))


def test_a_stopped_search_goes_on_where_it_stopped(
    jobs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(cfg: Any) -> float:
        if len(seen) == 3:
            raise RunStopped("stopped by SIGTERM", 143)
        return accuracy(cfg)

    seen = jobs(stop)
    assert search("hydra.sweeper.n_trials=5") == 143
    again = jobs(accuracy)
    assert search("hydra.sweeper.n_trials=5") == 0
    assert "3 of 5 trials" in capsys.readouterr().out
    assert len(again) == 2 and trials(tmp_path) == {"COMPLETE": 4, "FAIL": 1}
    assert search("hydra.sweeper.n_trials=5") == 2
    assert "has 5 trials already" in capsys.readouterr().err


def test_a_search_in_which_nothing_works_is_one_line(
    jobs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def diverge(cfg: Any) -> float:
        raise RunStopped("step 3: the loss not finite")

    jobs(diverge)
    assert search("hydra.sweeper.n_trials=2") == 1
    assert "every trial of the search failed" in capsys.readouterr().err

    def refuse(cfg: Any) -> float:
        raise UserError("method_kwargs.alpha=-1: must be at least 0")

    seen = jobs(refuse)
    assert search("hydra.sweeper.n_trials=9", "hydra.sweeper.study_name=other") == 2
    assert len(seen) == 1 and "must be at least 0" in capsys.readouterr().err


@pytest.mark.slow
def test_sigterm_ends_jobs_in_other_processes_too(images: Path, tmp_path: Path) -> None:
    settings = {
        "data.train_path": images / "train",
        "data.val_path": images / "val",
        "data.num_workers": 0,
        "optimizer.batch_size": 10,
        "max_epochs": 500,
        "knn_eval.k": 3,
        "accelerator": "cpu",
        "method_kwargs.proj_hidden_dim": 16,
        "method_kwargs.proj_output_dim": 16,
        "method_kwargs.contrastive_hidden_dim": 16,
        "method_kwargs.contrastive_output_dim": 8,
        "hydra/launcher": "joblib",
        "hydra.launcher.n_jobs": 2,
        "hydra.sweep.dir": "jobs",
        "seed": "0,1,2,3",
    }
    command = [sys.executable, "-m", "metamask_solo", "pretrain", "--config-path", DIGITS]
    command += ["--config-name", "metamask", "-m", *(f"{k}={v}" for k, v in settings.items())]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
        # both jobs train: a checkpoint lies in the folder of each
        while len({p.parent for p in tmp_path.glob("trained_models/*/*/*.ckpt")}) < 2:
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.2)
        process.terminate()
        assert process.wait(300) == 143, (tmp_path / "log").read_text()
    assert len(list(tmp_path.glob("trained_models/metamask/*"))) == 2
    assert not list(tmp_path.rglob("finished.json"))
    # a worker's progress bar may be written after it, or before it in the same line
    told = (tmp_path / "log").read_text()
    assert "stopped by SIGTERM in epoch" in told and "the last checkpoint is" in told


def test_each_job_has_a_wandb_run_of_its_own(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = []
    for seed in (0, 1):
        cfg = pretrain_config(images, tmp_path / "runs", "simclr", method_kwargs=SIMCLR, seed=seed)
        cfg.wandb = {"enabled": True, "offline": True, "project": "test", "entity": None}

        class Look(pl.Callback):  # type: ignore[name-defined]
            def on_train_start(self, trainer: Any, model: Any) -> None:
                ids.append(wandb.run.id)

        _, fit = train(cfg, Look())
        assert wandb.run is None  # closed
        assert (fit.folder / "metrics.csv").is_file()  # and the CSV is there too
        assert ids[-1] == fit.folder.name
    assert len(set(ids)) == 2
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2


def test_the_model_of_the_job_before_is_gone() -> None:
    class Model:
        def __init__(self) -> None:
            self.trainer = self

    made: list[weakref.ref[Model]] = []

    def task(cfg: DictConfig) -> None:
        assert not any(model() for model in made)
        made.append(weakref.ref(Model()))

    job = Job(task)
    gc.disable()  # it would come in its own time
    try:
        for _ in range(3):
            job(OmegaConf.create())
    finally:
        gc.enable()
    assert len(made) == 3
