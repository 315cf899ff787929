"""Hydra's sweeps of ``metamask-solo pretrain``: every job a run of its own."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from joblib.externals.loky import get_reusable_executor
from runs import pretrain_config, train

from metamask_solo.__main__ import main
from metamask_solo.hosts import pl

pytestmark = pytest.mark.slow
SCRIPTS = Path(__file__).parents[2] / "scripts"


def sweep(images: Path, name: str, *arguments: str) -> None:
    """A sweep over runs of two steps, in the working folder."""
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
        "+fold_at_end": "false",
        "+enable_progress_bar": "false",
        "hydra.sweep.dir": "jobs",
    }
    folder = SCRIPTS / "pretrain" / "digits"
    command = ["pretrain", "--config-path", str(folder), "--config-name", name, "-m", *arguments]
    assert main([*command, *(f"{key}={value}" for key, value in small.items())]) == 0


def finished(root: Path) -> list[tuple[dict[str, Any], dict[str, float]]]:
    """Config and metrics of each run that ended as planned, and no other folder."""
    folders = sorted((root / "trained_models" / "metamask").iterdir())
    found = []
    for folder in folders:
        assert len(list(folder.glob("*.ckpt"))) == 1
        config = json.loads((folder / "args.json").read_text())
        metrics = json.loads((folder / "finished.json").read_text())["metrics"]
        found.append((config, metrics))
    return found


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

    sweep(images, "metamask", *launcher, "seed=0,1")

    runs = finished(tmp_path)
    assert sorted(config["seed"] for config, _ in runs) == [0, 1]
    losses = [metrics["train_nce_loss_epoch"] for _, metrics in runs]
    assert losses[0] != losses[1]


def test_optuna_maximises_the_knn_accuracy(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    sweep(images, "metamask_optuna", "hydra.sweeper.n_trials=2")

    found = yaml.safe_load((tmp_path / "jobs" / "optimization_results.yaml").read_text())
    scores = {}
    for config, metrics in finished(tmp_path):
        kwargs = config["method_kwargs"]
        scores[(kwargs["alpha"], kwargs["temperature"], kwargs["mask"]["lr"])] = metrics
    assert len(scores) == 2
    best = found["best_params"]
    names = ("method_kwargs.alpha", "method_kwargs.temperature", "method_kwargs.mask.lr")
    knn = {tried: metrics["val_knn_acc1"] for tried, metrics in scores.items()}
    assert found["best_value"] == max(knn.values()) == knn[tuple(best[name] for name in names)]


class StopAfterAnEpoch(pl.Callback):  # type: ignore[name-defined]
    def on_train_epoch_start(self, trainer: Any, model: Any) -> None:
        if trainer.current_epoch == 1:
            raise InterruptedError


def test_a_job_does_not_continue_one_with_other_settings(images: Path, tmp_path: Path) -> None:
    """What a sweep may vary decides whether an unfinished run is the same one."""

    def config(**overrides: Any) -> Any:
        return pretrain_config(
            images, tmp_path, "simclr", max_epochs=2, auto_resume__enabled=True, **overrides
        )

    kwargs = {"proj_hidden_dim": 16, "proj_output_dim": 16, "temperature": 0.2}
    with pytest.raises(InterruptedError):
        train(config(method_kwargs=kwargs), StopAfterAnEpoch())
    warm = {"name": "warmup_cosine", "warmup_epochs": 1}
    other = config().augmentations
    other[0].rrc.crop_min_scale = 0.8
    for changed in ({"scheduler": warm}, {"augmentations": other}):
        model, _ = train(config(method_kwargs=kwargs, **changed))
        assert model.trainer.global_step == 4
    _, fit = train(config(method_kwargs=kwargs))
    assert len(list((tmp_path / "simclr").iterdir())) == 3
    assert json.loads((fit.folder / "args.json").read_text())["scheduler"]["name"] == "none"
