"""The mask's optimiser alone: schedule, state, and what may be resumed."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from metamask_solo.errors import UserError
from metamask_solo.method.mask import DimensionalMask
from metamask_solo.method.mask_optimizer import MaskOptimizer
from metamask_solo.method.settings import MaskSettings


def mask_optimizer(**settings: Any) -> MaskOptimizer:
    """One whose steps are the gradient's, unless the settings say otherwise."""
    checked = MaskSettings(**{"momentum": 0.0, "weight_decay": 0.0, **settings})
    return MaskOptimizer(DimensionalMask(5, checked.kind), checked)


def gradients(count: int) -> list[Tensor]:
    return list(torch.randn(count, 5, generator=torch.Generator().manual_seed(0)))


def move(optimizer: MaskOptimizer, gradient: Tensor) -> Tensor:
    before = optimizer.mask.logits.clone()
    optimizer.step(gradient)
    return before - optimizer.mask.logits


@pytest.mark.parametrize("planned", [2.0, 7 / 3, 5.0])
def test_the_cosine_falls_to_zero_over_the_planned_updates(planned: float) -> None:
    moved = mask_optimizer(schedule="cosine", lr=0.5)
    moved.start(0, planned)
    updates = range(int(planned))
    rates = [float(move(moved, torch.ones(5))[0]) for _ in updates]
    expected = [0.25 * (1 + math.cos(math.pi * i / len(updates))) for i in updates]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("schedule", ["fixed", "cosine"])
def test_stopped_and_resumed_is_never_stopped(optimizer: str, schedule: str) -> None:
    settings = {"optimizer": optimizer, "schedule": schedule, "lr": 0.1, "momentum": 0.9}
    whole, first, second = (mask_optimizer(**settings) for _ in range(3))
    course = [*gradients(3), torch.full((5,), float("nan")), *gradients(3)]
    whole.start(0, len(course))
    first.start(0, len(course))
    for i, gradient in enumerate(course):
        if i == 4:
            first.remember(i)
            second.mask.load_state_dict(first.mask.state_dict())
            second.load_state_dict(first.state_dict())
            second.start(i, len(course))
        for running in (whole, second if i >= 4 else first):
            running.step(gradient)
    assert torch.equal(whole.mask.logits, second.mask.logits)
    assert (second.updates, second.skipped) == (whole.updates, whole.skipped) == (6, 1)
    assert [step for step, _ in second.history] == [0, 4]


def test_a_new_fit_starts_anew() -> None:
    """At the end of its cosine, a second fit would not move the mask at all."""
    twice = mask_optimizer(schedule="cosine", lr=0.5)
    for _ in range(2):
        twice.start(0, 3)
        assert float(sum(move(twice, g) for g in gradients(3)).abs().max()) > 0.05
        assert twice.updates == 3
        # as when a checkpoint of the fit is loaded for its weights
        twice.load_state_dict(twice.state_dict())


def test_a_longer_run_follows_the_cosine_and_the_rate_of_its_file() -> None:
    first = mask_optimizer(schedule="cosine")
    first.start(0, 4)
    for gradient in gradients(4):
        first.step(gradient)
    longer = mask_optimizer(schedule="cosine", lr=0.5)
    longer.load_state_dict(first.state_dict())
    longer.start(4, 8)
    torch.testing.assert_close(move(longer, torch.ones(5)), torch.full((5,), 0.25))


def test_what_cannot_go_on_is_refused() -> None:
    earlier = mask_optimizer()
    earlier.start(0, 10)
    for name, value in (("kind", "linear"), ("optimizer", "adam")):
        with pytest.raises(UserError, match=f"method_kwargs.mask.{name}=.*the checkpoint has"):
            mask_optimizer(**{name: value}).load_state_dict(earlier.state_dict())
    with pytest.raises(UserError, match="schedule=cosine"):
        mask_optimizer(schedule="cosine").start(0, math.inf)


def test_a_clipped_gradient_has_the_norm_that_was_asked_for() -> None:
    clipped = mask_optimizer(clip_grad=1e-3, lr=1.0)
    clipped.start(0, 10)
    assert float(move(clipped, gradients(1)[0]).norm()) == pytest.approx(1e-3, rel=1e-4)
