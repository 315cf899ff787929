"""What is asked of Lightning's trainer; the same on both releases of solo-learn."""

from contextlib import AbstractContextManager
from typing import Any


def forward_context(trainer: Any) -> AbstractContextManager[None]:
    """The precision context (autocast or nothing) in which the trainer runs a training step."""
    return trainer.precision_plugin.forward_context()


def loss_scale(trainer: Any) -> float | None:
    """The factor of fp16 loss scaling, None where there is no such scaling."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler.get_scale() if scaler is not None and scaler.is_enabled() else None


def watch_dropped_steps(trainer: Any) -> None:
    """Remembers the loss scale; to be called when training starts, or goes on."""
    trainer._metamask_dropped = (trainer.global_step, loss_scale(trainer), False)


def step_was_dropped(trainer: Any) -> bool:
    """Whether fp16 loss scaling dropped the optimiser step that was counted last.

    The gradient scaler tells it only by lowering its scale, so this must be asked after every
    batch; who asks, and how often, makes no difference. :func:`watch_dropped_steps` comes first.
    """
    step, before, dropped = trainer._metamask_dropped
    if trainer.global_step != step:
        scale = loss_scale(trainer)
        dropped = scale is not None and before is not None and scale < before
        trainer._metamask_dropped = (trainer.global_step, scale, dropped)
    return bool(dropped)
