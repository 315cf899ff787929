"""A run that is killed at any moment, or asked to stop, and continued, ends as if it never was."""

import json
import random
import signal
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
import torch
from fragile_runs import EPOCHS, MOMENTS, STEPS, SignalAt, fragile_config, run

from metamask_solo.checkpoints.reading import load_raw
from metamask_solo.training.resume import read_metrics


class End(NamedTuple):
    state: dict[str, Any]
    metrics: pd.DataFrame


def end_of(out: Path) -> End:
    """The last checkpoint of the one finished run in a folder, and what it logged."""
    (summary,) = out.rglob("finished.json")
    assert not list(summary.parent.glob(".*")), "a temporary file was left"
    (checkpoint,) = summary.parent.glob("*.ckpt")  # keep_prev is off
    return End(load_raw(checkpoint), read_metrics(summary.parent))


def assert_same_end(out: Path, unbroken: End) -> None:
    (one, metrics), (two, expected) = end_of(out), unbroken
    assert one["global_step"] == two["global_step"] == EPOCHS * STEPS
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for name, tensor in two["state_dict"].items():
        assert torch.equal(one["state_dict"][name], tensor), name
    optimizers = [(s["optimizer_states"], s["metamask"]["mask_optimizer"]) for s in (one, two)]
    assert str(optimizers[0]) == str(optimizers[1])  # shows tensors in part; weights are compared
    # a stop notes its step, too
    history, expected_history = (s["metamask"]["history"] for s in (one, two))
    masks = dict(zip(history["step"].tolist(), history["mask"], strict=True))
    for step, mask in zip(expected_history["step"].tolist(), expected_history["mask"], strict=True):
        assert torch.equal(mask, masks[step]), step
    # neither gap nor repetition
    rows = [table[["step", "val_loss"]].dropna() for table in (metrics, expected)]
    assert rows[0].reset_index(drop=True).equals(rows[1].reset_index(drop=True))
    assert len(rows[0]) == EPOCHS


@pytest.fixture(scope="module")
def unbroken(images: Path, tmp_path_factory: pytest.TempPathFactory) -> End:
    out = tmp_path_factory.mktemp("unbroken")
    assert run(out / "log.txt", fragile_config(images, out)) == 0
    return end_of(out)


@pytest.mark.parametrize(
    "kill", [1, 2, 3, *(pytest.param(kill, marks=pytest.mark.soak) for kill in range(100, 120))]
)
def test_a_killed_run_ends_like_an_unbroken_one(
    kill: int, images: Path, tmp_path: Path, unbroken: End
) -> None:
    """Killed at a random one of its moments, or a little later."""
    rng = random.Random(kill)
    cfg = fragile_config(images, tmp_path / "runs")
    moment = rng.choice([*MOMENTS])
    if rng.random() < 0.3:  # after one of the first steps, at any time
        killer = SignalAt("step", rng.randint(1, 4), delay=rng.uniform(0.001, 0.05))
    else:
        killer = SignalAt(moment, rng.randint(1, MOMENTS[moment]))
    code = run(tmp_path / "first.txt", cfg, killer)
    assert code == -signal.SIGKILL, (tmp_path / "first.txt").read_text()
    saved = list((tmp_path / "runs").rglob("*.ckpt"))
    assert run(tmp_path / "second.txt", cfg) == 0, (tmp_path / "second.txt").read_text()
    printed = (tmp_path / "second.txt").read_text()
    assert ("resuming from" in printed) == bool(saved)  # else it began anew, in another folder
    assert_same_end(tmp_path / "runs", unbroken)


def test_a_run_killed_after_its_last_checkpoint_is_finished(
    images: Path, tmp_path: Path, unbroken: End
) -> None:
    cfg = fragile_config(images, tmp_path / "runs")
    assert run(tmp_path / "first.txt", cfg, SignalAt("renamed", EPOCHS)) == -signal.SIGKILL
    assert run(tmp_path / "second.txt", cfg) == 0
    assert_same_end(tmp_path / "runs", unbroken)
    (summary,) = tmp_path.rglob("finished.json")
    assert {"val_acc1", "val_loss"} <= json.loads(summary.read_text())["metrics"].keys()


@pytest.mark.parametrize(
    "number, moment, n, step, words",
    [
        # in the second epoch, after the first of two steps
        (signal.SIGUSR1, "step", 3, 3, "(epoch 1, after batch 1)"),
        (signal.SIGTERM, "hook", 4, 4, "(epoch 2)"),  # in the last step of the second epoch
        (signal.SIGTERM, "validation", 1, 2, "(epoch 1)"),
    ],
)
def test_a_signal_saves_and_stops(
    number: signal.Signals,
    moment: str,
    n: int,
    step: int,
    words: str,
    images: Path,
    tmp_path: Path,
    unbroken: End,
) -> None:
    # without the signal, the second epoch would not be saved; the signal reaches the workers too
    cfg = fragile_config(images, tmp_path / "runs", checkpoint__frequency=2, data__num_workers=1)
    code = run(tmp_path / "first.txt", cfg, SignalAt(moment, n, number))
    assert code == 128 + number, (tmp_path / "first.txt").read_text()
    (checkpoint,) = (tmp_path / "runs").rglob("*.ckpt")
    last_line = (tmp_path / "first.txt").read_text().splitlines()[-1]
    assert last_line.startswith(f"stopped by {number.name} in epoch")
    assert f"the last checkpoint is {checkpoint}; the same command continues" in last_line
    assert load_raw(checkpoint)["global_step"] == step
    assert run(tmp_path / "second.txt", cfg) == 0
    assert f"resuming from {checkpoint} {words}" in (tmp_path / "second.txt").read_text()
    assert_same_end(tmp_path / "runs", unbroken)
