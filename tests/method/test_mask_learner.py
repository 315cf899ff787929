"""The mask's life cycle alone: schedule, when it moves, state, and what may be continued."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from metamask_solo.errors import UserError
from metamask_solo.method.mask import DimensionalMask
from metamask_solo.method.mask_learner import MaskLearner
from metamask_solo.method.settings import SETTINGS, MetaMaskSettings
from metamask_solo.validation import validated


def learner(**given: Any) -> MaskLearner:
    """A learner of five dimensions; ``mask__lr=1.0`` is a setting."""
    settings: dict[str, Any] = {"mask": {}, "meta": {}}
    for key, value in given.items():
        group, _, name = key.partition("__")
        settings[group][name] = value
    checked = validated(MetaMaskSettings, settings)
    return MaskLearner(DimensionalMask(5, checked.mask.kind), checked.mask, checked.meta)


def gradients(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(count, 5, generator=generator))


@pytest.mark.parametrize(("steps", "every"), [(7, 3), (6, 3), (5, 1), (2, 3)])
def test_the_cosine_plans_as_many_updates_as_happen(steps: int, every: int) -> None:
    own = learner(mask__schedule="cosine", mask__lr=0.5, meta__every_n_steps=every)
    own.start(0, steps)
    rates = []
    for step in range(1, steps + 1):
        if own.due(step):
            own.step(torch.ones(5))
            assert own.optimizer is not None
            rates.append(own.optimizer.param_groups[0]["lr"])
    happen = steps // every
    expected = [0.25 * (1 + math.cos(math.pi * i / happen)) for i in range(happen)]
    assert rates == pytest.approx(expected)
    assert own.planned == own.updates == happen


def test_the_mask_moves_after_every_nth_step_that_was_taken() -> None:
    own = learner(meta__every_n_steps=2)
    own.start(0, 100)
    # with accumulation a step is asked for more than once
    asked = [(0, False), (1, False), (1, False), (2, False), (2, False), (3, False), (4, True)]
    assert [own.due(*each) for each in asked] == [False] * 3 + [True] + [False] * 3
    assert own.due(6)
    off = learner(meta__enabled=False)
    off.start(0, 100)
    assert not off.due(1)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("schedule", ["fixed", "cosine"])
def test_stopped_and_continued_is_never_stopped(optimizer: str, schedule: str) -> None:
    settings = {"mask__optimizer": optimizer, "mask__schedule": schedule, "mask__lr": 0.1}
    whole, first, second = (learner(**settings) for _ in range(3))
    bad = torch.full((5,), float("nan"))
    course = [*gradients(3), bad, *gradients(3)]
    whole.start(0, len(course))
    first.start(0, len(course))
    for i, gradient in enumerate(course):
        if i == 4:
            first.remember(i)
            second.mask.load_state_dict(first.mask.state_dict())
            second.load_state_dict(first.state_dict())
            second.start(i, len(course))
        for own in (whole, second if i >= 4 else first):
            own.step(gradient)
    assert torch.equal(whole.mask.logits, second.mask.logits)
    assert (second.updates, second.skipped) == (whole.updates, whole.skipped) == (6, 1)
    assert [step for step, _ in second.history] == [0, 4]


def test_a_longer_run_follows_its_own_cosine() -> None:
    """The old plan would have left the rate at 0 for good."""
    first = learner(mask__schedule="cosine")
    first.start(0, 4)
    for gradient in gradients(4):
        first.step(gradient)
    longer = learner(mask__schedule="cosine")
    longer.load_state_dict(first.state_dict())
    longer.start(4, 8)
    before = longer.mask.logits.clone()
    longer.step(torch.ones(5))
    assert longer.optimizer is not None
    assert longer.optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * 1e-3)
    assert not torch.equal(before, longer.mask.logits)


OTHER: dict[str, Any] = {
    "mask.kind": "linear",
    "mask.initial_logit": 0.5,
    "mask.optimizer": "adam",
    "mask.lr": 0.5,
    "mask.momentum": 0.5,
    "mask.weight_decay": 0.5,
    "mask.schedule": "cosine",
    "mask.clip_grad": 0.5,
    "meta.enabled": False,
    "meta.hypergradient": "plain",
    "meta.radius": 0.5,
    "meta.trial_lr": 0.5,
    "meta.trial_momentum": False,
    "meta.trial_weight_decay": False,
    "meta.every_n_steps": 5,
    "meta.trial_scope": "heads",
    "meta.batch_fraction": 0.5,
}


def test_every_setting_of_mask_and_meta_update_is_tried() -> None:
    assert OTHER.keys() == {key for key in SETTINGS if "." in key}


@pytest.mark.parametrize("key", OTHER)
def test_another_setting_is_refused_by_name(key: str) -> None:
    old = learner()
    old.start(0, 10)
    old.step(torch.ones(5))
    changed = learner(**{key.replace(".", "__"): OTHER[key]})
    with pytest.raises(UserError) as caught:
        changed.load_state_dict(old.state_dict())
    assert str(caught.value).startswith(f"method_kwargs.{key}=")
    assert "\n" not in str(caught.value)


def state_of_version_0_1_0() -> dict[str, Any]:
    logits = torch.nn.Parameter(torch.zeros(5))
    optimizer = torch.optim.SGD([logits], lr=1e-3, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for gradient in gradients(4):
        logits.grad = gradient
        optimizer.step()
        scheduler.step()
    states = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    return {"kind": "sigmoid", "mask_optimizer": {**states, "skipped": 1}}


def test_a_checkpoint_of_version_0_1_0_is_continued() -> None:
    own = learner(mask__schedule="cosine")
    own.load_state_dict(state_of_version_0_1_0())
    own.start(4, 10)
    own.step(torch.ones(5))
    assert own.optimizer is not None
    rate = 0.5e-3 * (1 + math.cos(math.pi * 4 / 10))
    assert own.optimizer.param_groups[0]["lr"] == pytest.approx(rate)


@pytest.mark.parametrize(
    "other",
    [
        {"mask__schedule": "cosine", "mask__optimizer": "adam"},
        {"mask__schedule": "cosine", "mask__lr": 0.5},
        {"mask__schedule": "cosine", "mask__weight_decay": 0.0},
        {"mask__schedule": "fixed"},
        {"mask__schedule": "cosine", "mask__kind": "linear"},
    ],
)
def test_what_version_0_1_0_tells_of_its_settings_is_checked(other: dict[str, Any]) -> None:
    name = list(other)[-1].replace("__", ".")
    with pytest.raises(UserError, match=f"method_kwargs.{name}="):
        learner(**other).load_state_dict(state_of_version_0_1_0())


def test_a_cosine_needs_an_end() -> None:
    with pytest.raises(UserError, match="schedule=cosine"):
        learner(mask__schedule="cosine").start(0, math.inf)


def test_a_clipped_gradient_has_the_norm_that_was_asked_for() -> None:
    own = learner(mask__clip_grad=1e-3, mask__momentum=0.0, mask__weight_decay=0.0, mask__lr=1.0)
    own.start(0, 10)
    own.step(gradients(1)[0])
    assert float(own.mask.logits.norm()) == pytest.approx(1e-3, rel=1e-4)
