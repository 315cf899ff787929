"""A run that is killed at any moment, or asked to stop, and continued, ends as if it never was."""

import json
import random
import signal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from fragile_runs import EPOCHS, MOMENTS, STEPS, SignalAt, fragile_config, run

from metamask_solo.checkpoints.reading import load_raw
from metamask_solo.training.callbacks import LIGHTNING
from metamask_solo.training.resume import read_metrics


class End(NamedTuple):
    """Of a finished run."""

    state: dict[str, Any]  # the last checkpoint
    losses: list[tuple[int, float]]  # steps and losses of its validations
    metrics: dict[str, float]  # of the last validation


def end_of(out: Path) -> End:
    (summary,) = out.rglob("finished.json")
    assert not list(summary.parent.glob(".*")), "a temporary file was left"
    (checkpoint,) = summary.parent.glob("*.ckpt")  # keep_prev is off
    rows = read_metrics(summary.parent)[["step", "val_loss"]].dropna()
    metrics = json.loads(summary.read_text())["metrics"]
    return End(
        load_raw(checkpoint),
        list(rows.itertuples(index=False, name=None)),
        {name: value for name, value in metrics.items() if name.startswith("val_")},
    )


def assert_same_end(out: Path, unbroken: End) -> None:
    one, two = end_of(out), unbroken
    assert one.state["global_step"] == two.state["global_step"] == EPOCHS * STEPS
    assert one.state["state_dict"].keys() == two.state["state_dict"].keys()
    for name, tensor in two.state["state_dict"].items():
        assert torch.equal(one.state["state_dict"][name], tensor), name
    for part in (lambda s: s["optimizer_states"], lambda s: s["metamask"]["mask_optimizer"]):
        assert str(part(one.state)) == str(part(two.state))  # shows tensors in part
    # a stop notes its step, too
    history, expected = (end.state["metamask"]["history"] for end in (one, two))
    masks = dict(zip(history["step"].tolist(), history["mask"], strict=True))
    for step, mask in zip(expected["step"].tolist(), expected["mask"], strict=True):
        assert torch.equal(mask, masks[step]), step
    assert one.losses == two.losses and one.metrics == two.metrics  # neither gap nor repetition
    assert len(one.losses) == EPOCHS * STEPS and "val_acc1" in one.metrics


@pytest.fixture(scope="module")
def unbroken(images: Path, tmp_path_factory: pytest.TempPathFactory) -> End:
    out = tmp_path_factory.mktemp("unbroken")
    assert run(out / "log.txt", fragile_config(images, out)) == 0
    return end_of(out)


def at_random(seed: int) -> SignalAt:
    """One of the moments, or after one of the first steps, at any time."""
    rng = random.Random(seed)
    moment = rng.choice([*MOMENTS])
    if rng.random() < 0.3:
        return SignalAt("step", rng.randint(1, 4), delay=rng.uniform(0.001, 0.05))
    return SignalAt(moment, rng.randint(1, MOMENTS[moment]))


@pytest.mark.parametrize(
    "killer",
    [
        SignalAt("writing", 2),
        SignalAt("hook", 4),
        SignalAt("renamed", EPOCHS),  # the last checkpoint: nothing is left to train
        *(pytest.param(at_random(seed), marks=pytest.mark.soak) for seed in range(100, 120)),
    ],
    ids=lambda killer: f"{killer.moment}-{killer.left}",
)
def test_a_killed_run_ends_like_an_unbroken_one(
    killer: SignalAt, images: Path, tmp_path: Path, unbroken: End
) -> None:
    cfg = fragile_config(images, tmp_path / "runs")
    code = run(tmp_path / "first.txt", cfg, killer)
    assert code == -signal.SIGKILL, (tmp_path / "first.txt").read_text()
    saved = list((tmp_path / "runs").rglob("*.ckpt"))
    assert run(tmp_path / "second.txt", cfg) == 0, (tmp_path / "second.txt").read_text()
    printed = (tmp_path / "second.txt").read_text()
    assert ("resuming from" in printed) == bool(saved)  # else it began anew, in another folder
    assert_same_end(tmp_path / "runs", unbroken)


@pytest.mark.parametrize(
    "number, moment, n, step, words",
    [
        # in the second epoch, after the first of two steps, which a validation follows
        (signal.SIGUSR1, "step", 3, 3, "(epoch 1, after batch 1)"),
        (signal.SIGTERM, "hook", 4, 4, "(epoch 2)"),  # in the last step of the second epoch
        (signal.SIGTERM, "validation", 3, 2, "(epoch 1)"),
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
    last_line = (tmp_path / "first.txt").read_text().splitlines()[-1]
    assert last_line.startswith(f"stopped by {number.name} in epoch")
    if LIGHTNING < (2, 6) and number == signal.SIGUSR1:
        # it gives up the validation, and so nothing is saved of this epoch, which is said
        assert "after step 3; the last checkpoint is" in last_line and "ep=0" in last_line
        return
    (checkpoint,) = (tmp_path / "runs").rglob("*.ckpt")
    assert f"the last checkpoint is {checkpoint}; the same command continues" in last_line
    assert load_raw(checkpoint)["global_step"] == step
    assert run(tmp_path / "second.txt", cfg) == 0
    assert f"resuming from {checkpoint} {words}" in (tmp_path / "second.txt").read_text()
    assert_same_end(tmp_path / "runs", unbroken)
