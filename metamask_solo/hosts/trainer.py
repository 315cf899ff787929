"""What the meta-update asks of Lightning's trainer; the same on both releases of solo-learn."""

from contextlib import AbstractContextManager
from typing import Any


def forward_context(trainer: Any) -> AbstractContextManager[None]:
    """The precision context (autocast or nothing) in which the trainer runs a training step."""
    return trainer.precision_plugin.forward_context()


def optimizer_step_was_skipped(trainer: Any) -> bool:
    """Whether fp16 loss scaling dropped the optimiser step that was just counted.

    The gradient scaler tells it only by lowering its scale, so this must be asked once a batch.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not scaler.is_enabled():
        return False
    before = getattr(trainer, "_metamask_loss_scale", None)
    scale = scaler.get_scale()
    trainer._metamask_loss_scale = scale
    return before is not None and scale < before


def loss_scale(trainer: Any) -> float | None:
    """The factor of fp16 loss scaling, None where there is no such scaling."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler.get_scale() if scaler is not None and scaler.is_enabled() else None
