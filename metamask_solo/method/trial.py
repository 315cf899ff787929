"""The virtual step of the optimiser, through which the mask is judged."""

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, fields

from torch import Tensor

from metamask_solo.errors import UserError


@dataclass(frozen=True)
class TrialStep:
    """The virtual optimiser step, which is that of ``torch.optim.SGD``.

    Θ⁺ = Θ − lr · b⁺ with b⁺ = momentum · b + (1 − dampening) · g and g = ∇L + weight_decay · Θ; a
    parameter without a buffer b takes its first step, b⁺ = g. With ``nesterov``,
    Θ⁺ = Θ − lr · (g + momentum · b⁺).

    Each is one number for all parameters, or one for each parameter name.

    Args:
        lr: learning rate, at least 0.
        momentum: at least 0.
        weight_decay: at least 0.
        momentum_buffers: parameter name to buffer; one that is missing or None does not exist yet.
        nesterov: whether the step looks ahead.
        dampening: within 0 and 1.

    Raises:
        UserError: a value is no number, or out of range.

    Example:
        >>> TrialStep(0.1, momentum=0.9, weight_decay={"weight": 1e-4, "bias": 0.0}).lr
        0.1
    """

    lr: float | Mapping[str, float]
    momentum: float | Mapping[str, float] = 0.0
    weight_decay: float | Mapping[str, float] = 0.0
    momentum_buffers: Mapping[str, Tensor | None] | None = None
    nesterov: bool | Mapping[str, bool] = False
    dampening: float | Mapping[str, float] = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            given = getattr(self, field.name)
            if field.name == "momentum_buffers":
                if not (given is None or isinstance(given, Mapping)):
                    raise UserError(f"momentum_buffers={given!r}: must map names to tensors")
                continue
            for value in given.values() if isinstance(given, Mapping) else [given]:
                if not isinstance(value, numbers.Real):
                    raise UserError(f"{field.name}={value!r}: must be a number")
                if not (math.isfinite(value) and float(value) >= 0):
                    raise UserError(f"{field.name}={value}: must be finite and at least 0")
                if field.name == "dampening" and float(value) > 1:
                    raise UserError(f"dampening={value}: must be at most 1")

    def of(self, name: str) -> tuple[float, float, float]:
        """What multiplies −∇L, −Θ and −b in the step of a parameter."""
        lr, momentum, decay, nesterov, dampening = (
            float(value[name] if isinstance(value, Mapping) else value)
            for value in (
                self.lr,
                self.momentum,
                self.weight_decay,
                self.nesterov,
                self.dampening,
            )
        )
        if momentum == 0:
            return lr, lr * decay, 0.0
        has_buffer = (self.momentum_buffers or {}).get(name) is not None
        new, old = (1 - dampening, momentum) if has_buffer else (1.0, 0.0)
        if nesterov:
            new, old = 1 + momentum * new, momentum * old
        return lr * new, lr * new * decay, lr * old
