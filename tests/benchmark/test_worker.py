"""One run of a benchmark: what it costs, what its evaluation doubts, and how long all will take."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import pretrain_config
from torch import nn

from metamask_solo.benchmark import launch, worker
from metamask_solo.benchmark.plan import read_plan
from metamask_solo.benchmark.results import read_json, write_json


def test_a_step_is_the_mean_of_an_epoch_and_the_median_of_epochs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every fourth step updates the mask; the second epoch was paused, the third is resumed."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    model: Any = nn.Linear(2, 1)
    model.device = torch.device("cpu")
    model.bias.requires_grad = False  # such as statistics: not trained, and not counted
    trainer = SimpleNamespace(train_dataloader=range(9))
    costs = worker.Costs()

    def epoch(pause: float = 0.0) -> None:
        costs.on_train_epoch_start(trainer, model)
        for step in range(9):
            costs.on_train_batch_start(trainer, model, None, step)
            now[0] += 1.0 + 4.0 * (step % 4 == 3) + pause * (step == 2)
            if step in (4, 8):  # validates within the epoch, too: the step before is left out
                costs.on_validation_end(trainer, model)
                now[0] += 10.0
        costs.on_train_epoch_end(trainer, model)

    epoch()
    epoch(pause=100.0)
    state = costs.state_dict()
    costs = worker.Costs()
    costs.load_state_dict(state)
    epoch()
    epoch()
    assert costs.means == pytest.approx([15 / 7, 115 / 7, 15 / 7, 15 / 7])
    assert costs.costs["seconds_per_step"] == pytest.approx(15 / 7)
    assert costs.costs["parameters"] == 2
    assert costs.costs["seconds_between_epochs"] == pytest.approx(37 - 9 * 15 / 7)


def test_what_an_evaluation_doubts_is_kept(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(images, tmp_path / "images")
    next((tmp_path / "images" / "val" / "class_1").iterdir()).unlink()
    config = pretrain_config(tmp_path / "images", tmp_path)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32**2, 4))
    nn.init.zeros_(flat[1].weight)
    notes = worker._measured(["knn"], flat, config, torch.ones(4))["notes"]
    collapse = "features: all features are (nearly) the same; the representation has collapsed"
    words = "this accuracy (22.22 %) is not above that of always guessing"
    assert notes.startswith(f"{collapse}; kNN, no mask: {words}") and f"; kNN: {words}" in notes
    assert f"note: {collapse}\n" in capsys.readouterr().err


def test_the_pixels_of_a_large_image_are_the_means_of_its_parts() -> None:
    images = torch.rand(2, 3, 128, 128)
    means = images.reshape(2, 3, 32, 4, 32, 4).mean((3, 5))
    torch.testing.assert_close(worker.Pixels()(images), means.flatten(1))


def test_the_forecast_is_of_one_run_after_the_other(
    benchmark_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[int] = []

    def train(folder: Path) -> int:
        task: Any = read_json(folder / "run.json")
        timed.append(task["config"]["limit_train_batches"])
        steps = {"seconds_per_step": 1.0, "batches": 40, "seconds_between_epochs": 0.0}
        write_json(folder / "result.json", {**steps, "seconds_per_epoch": 0.0})
        return 0

    monkeypatch.setattr(launch, "_train", train)
    more = ["method_kwargs.meta={every_n_steps: 4}", "accumulate_grad_batches=2"]
    launcher = {"name": "joblib", "n_jobs": -1}
    file = benchmark_file(seeds=[0, 1], epochs=10, launcher=launcher)
    plan = read_plan(file, ["only=[metamask]", f"methods.metamask.overrides={more}"])

    # 10 epochs of 40 steps and a validation, and an evaluation; twice
    expected = "2 runs, about 15 min here, one after the other"
    assert launch.forecast(plan, plan.runs) == expected
    assert timed == [9]  # an update of the mask in each epoch
