"""Optimiser and schedule of a run, built alike on both releases from what the file says.

The releases differ here, each with faults of its own: 1.0.2 steps its schedules by epochs and has
no working LARS; GitHub main's warm-up schedule gives every group one rate where there is no
warm-up, and exceeds the base rate where the warm-up is no whole number of steps. A resumed schedule
of either goes on with the plan of the checkpoint, whatever the file says. Here a schedule is a
plain function of how far a run is; its plan comes from the file, and the checkpoint says how far.
"""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from metamask_solo.errors import UserError

Rate = Callable[[float, float], float]


@dataclass(frozen=True)
class Plan:
    """What a config says of optimiser and schedule; the rates are those in force.

    Attributes:
        optimizer: the class.
        lr, weight_decay: for groups that have none of their own.
        kwargs: more arguments of the optimiser.
        exclude_bias_n_norm_wd: tensors of one dimension have no weight decay.
        scheduler: ``none``, ``warmup_cosine``, ``cosine``, ``step`` or ``reduce``.
        interval: what a cosine moves by, ``step`` or ``epoch``.
        warmup_epochs, warmup_start_lr, min_lr: of ``warmup_cosine``; ``min_lr`` of ``cosine`` too.
        decay_epochs: epochs before which ``step`` divides the rate by ten.
        max_epochs: length of the run.
    """

    optimizer: type[Optimizer]
    lr: float
    weight_decay: float
    kwargs: dict[str, Any] = field(default_factory=dict)
    exclude_bias_n_norm_wd: bool = False
    scheduler: str = "none"
    interval: str = "step"
    warmup_epochs: float = 10
    warmup_start_lr: float = 3e-5
    min_lr: float = 0.0
    decay_epochs: tuple[int, ...] = ()
    max_epochs: int = 1

    def __post_init__(self) -> None:
        if "betas" in self.kwargs:
            self.kwargs["betas"] = tuple(self.kwargs["betas"])


def plan_of(cfg: DictConfig, optimizer: type[Optimizer], accumulation: int = 1) -> Plan:
    """The plan of a completed config.

    Args:
        optimizer: the class that ``optimizer.name`` stands for.
        accumulation: the factor of all rates; solo-learn scales those of pretraining by
            ``accumulate_grad_batches``.
    """

    def value(key: str, default: Any) -> Any:
        found = OmegaConf.select(cfg, key, default=default)
        found = default if found is None else found
        return OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found

    return Plan(
        optimizer=optimizer,
        lr=value("optimizer.lr", 0.0) * accumulation,
        weight_decay=value("optimizer.weight_decay", 0.0),
        kwargs=dict(value("optimizer.kwargs", {})),
        exclude_bias_n_norm_wd=value("optimizer.exclude_bias_n_norm_wd", False),
        scheduler=value("scheduler.name", "none"),
        interval=value("scheduler.interval", "step"),
        warmup_epochs=value("scheduler.warmup_epochs", 10),
        warmup_start_lr=value("scheduler.warmup_start_lr", 3e-5) * accumulation,
        min_lr=value("scheduler.min_lr", 0.0) * accumulation,
        decay_epochs=tuple(value("scheduler.lr_decay_steps", ())),
        max_epochs=value("max_epochs", 1),
    )


@dataclass(frozen=True)
class Length:
    """How long a run is.

    Attributes:
        steps: optimiser steps that the run will take.
        steps_per_epoch: optimiser steps of one epoch.
    """

    steps: float
    steps_per_epoch: int

    @property
    def epochs(self) -> float:
        return math.ceil(self.steps / self.steps_per_epoch) if self.steps < math.inf else math.inf

    @classmethod
    def of(cls, trainer: Any) -> "Length":
        """The length of a run of a trainer: limits, accumulation and ``max_steps`` counted."""
        steps = trainer.estimated_stepping_batches  # first: it loads the data where need be
        batches = trainer.num_training_batches
        return cls(steps, max(1, math.ceil(batches / trainer.accumulate_grad_batches)))


class Schedule(LRScheduler):
    """Rates as a function of how far the run is: closed, so that it can stand anywhere.

    A checkpoint holds the position alone, counted in epochs as well, so that a run that goes on
    with another length, rate or schedule stands where it was, on the plan of its file. Loading it
    also gives the optimiser's groups the settings of the file, which Lightning just replaced by
    those of the checkpoint.

    Args:
        optimizer: the optimiser.
        rate: base rate and position to rate.
        per_epoch: positions in an epoch: its steps, or 1.
        fixed: indexes of the groups that keep their base rate.
    """

    def __init__(self, optimizer: Optimizer, rate: Rate, per_epoch: int, fixed: Iterable[int] = ()):
        self.rate = rate
        self.per_epoch = per_epoch
        self.fixed = frozenset(fixed)
        super().__init__(optimizer)
        self.settings = [
            {key: value for key, value in group.items() if key not in ("params", "lr")}
            for group in optimizer.param_groups
        ]

    def get_lr(self) -> list[Any]:
        return [
            base if i in self.fixed else self.rate(float(base), self.last_epoch)
            for i, base in enumerate(self.base_lrs)
        ]

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch, "per_epoch": self.per_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # a host's own schedule counted what ours counts, but does not say how much an epoch is
        per_epoch = state_dict.get("per_epoch", self.per_epoch)
        self.last_epoch = round(state_dict["last_epoch"] * self.per_epoch / per_epoch)
        self._step_count = self.last_epoch + 1
        rates = self.get_lr()
        for group, settings, rate in zip(
            self.optimizer.param_groups, self.settings, rates, strict=True
        ):
            group.update(settings, lr=rate)
        self._last_lr = rates


def warmup_cosine(warmup: float, total: float, start: float, end: float) -> Rate:
    """A linear rise from ``start`` over ``warmup`` positions, then a cosine to ``end``.

    The last position of the rise has the base rate. From ``total`` on the rate is ``end``.
    """

    def rate(base: float, position: float) -> float:
        if position < warmup:
            return start + min(1.0, position / max(1, warmup - 1)) * (base - start)
        fall = min(1.0, (position - warmup) / max(1, total - warmup))
        return end + (base - end) * (1 + math.cos(math.pi * fall)) / 2

    return rate


def optimizer_of(plan: Plan, groups: list[dict[str, Any]]) -> tuple[Optimizer, list[int]]:
    """The optimiser of parameter groups, and the indexes of those whose rate stays fixed.

    A group may say ``static_lr`` (SimSiam's predictor) and ``lr_scale`` (layer-wise decay).
    """
    split: list[dict[str, Any]] = []
    fixed = []
    for group in groups:
        options = {k: v for k, v in group.items() if k not in ("params", "static_lr", "lr_scale")}
        if "lr_scale" in group:
            options["lr"] = options.get("lr", plan.lr) * group["lr_scale"]
        params = list(group["params"])
        parts = [(params, options)]
        if plan.exclude_bias_n_norm_wd:
            name = {"name": f"{options['name']}_no_decay"} if "name" in options else {}
            flat = [p for p in params if p.ndim <= 1]
            parts = [
                ([p for p in params if p.ndim > 1], options),
                (flat, {**options, **name, "weight_decay": 0.0}),
            ]
        for members, part in parts:
            if members:
                fixed += [len(split)] if group.get("static_lr") else []
                split.append({"params": members, **part})
    settings: Any = {"lr": plan.lr, "weight_decay": plan.weight_decay, **plan.kwargs}
    try:
        return plan.optimizer(split, **settings), fixed
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer.kwargs={plan.kwargs}: {error}") from error


def build(plan: Plan, groups: list[dict[str, Any]], length: Length) -> Any:
    """Optimiser and schedule, as a Lightning module returns them from ``configure_optimizers``."""
    optimizer, fixed = optimizer_of(plan, groups)
    if plan.scheduler == "reduce":
        plateau = {"scheduler": ReduceLROnPlateau(optimizer), "monitor": "val_loss"}
        return {"optimizer": optimizer, "lr_scheduler": plateau}
    by_step = plan.interval == "step" and plan.scheduler in ("warmup_cosine", "cosine")
    per_epoch = length.steps_per_epoch if by_step else 1
    total = length.steps if by_step else length.epochs
    if plan.scheduler in ("warmup_cosine", "cosine"):
        if math.isinf(total):
            raise UserError(f"scheduler.name={plan.scheduler}: needs max_epochs or max_steps")
        warmup = plan.warmup_epochs * per_epoch if plan.scheduler == "warmup_cosine" else 0
        rate = warmup_cosine(warmup, total, plan.warmup_start_lr, plan.min_lr)
    elif plan.scheduler == "step":

        def rate(base: float, position: float) -> float:
            return base * 0.1 ** sum(epoch <= position for epoch in plan.decay_epochs)
    else:

        def rate(base: float, position: float) -> float:
            return base

    schedule = Schedule(optimizer, rate, per_epoch, fixed)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": schedule, "interval": "step" if by_step else "epoch"},
    }


def configure_like(model: Any, plan: Plan, groups: Callable[[], list[dict[str, Any]]]) -> None:
    """Builds optimiser and schedule from what the file says, alike on both releases.

    The model gets a ``configure_optimizers`` of ours in the place of its host's.

    Args:
        model: a method or a linear model of solo-learn.
        plan: what the config says.
        groups: the parameter groups, made anew at each call.
    """
    # partials, since a model that is sent to another process must be picklable
    model.build_optimizers = functools.partial(_build_for, plan, groups)
    model.configure_optimizers = functools.partial(_configure, model)


def _configure(model: Any) -> Any:
    return model.build_optimizers(Length.of(model.trainer))


def _build_for(plan: Plan, groups: Callable[[], list[dict[str, Any]]], length: Length) -> Any:
    return build(plan, groups(), length)
