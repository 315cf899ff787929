"""The mask's life while the network trains: its optimiser, its schedule, when it moves, its past.

Torch only: metamask.py tells it of steps and checkpoints, and computes the gradient.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metamask_solo.errors import UserError
from metamask_solo.method.mask import DimensionalMask
from metamask_solo.method.settings import MaskSettings, MetaSettings
from metamask_solo.validation import shown


class MaskLearner:
    """Moves the mask after the network's steps, and remembers how.

    The logits and the state of their optimiser are in single precision (or double), whatever the
    network's: the steps are far smaller than what half precision tells apart.

    Args:
        mask: the mask; its logits are moved in place.
        mask_settings: its optimiser, rates and schedule.
        meta_settings: when it moves. All settings of both go into the checkpoint, and a run is
            continued with those that it began with.

    Attributes:
        history: (step, mask) at the start and at the end of each epoch.
        updates: updates so far, of the whole run; those that were skipped are not among them.
        skipped: gradients that were not finite, and skipped.
    """

    def __init__(
        self, mask: DimensionalMask, mask_settings: MaskSettings, meta_settings: MetaSettings
    ):
        self.mask = mask
        self.mask_settings, self.meta_settings = mask_settings, meta_settings
        self.optimizer: torch.optim.Optimizer | None = None
        self.history: list[tuple[int, Tensor]] = []
        self.updates = 0
        self.skipped = 0
        self.planned = 0
        self._last_step = 0
        self._restored: Mapping[str, Any] | None = None  # until the optimiser is there

    def start(self, step: int, steps: float) -> None:
        """Makes the optimiser when training starts, with the state of the checkpoint, if any.

        Args:
            step: steps of the network so far.
            steps: steps of the network in the whole run, infinity where nobody knows.

        Raises:
            UserError: a cosine without an end.
        """
        settings = self.mask_settings
        if settings.schedule == "cosine" and math.isinf(steps):
            raise UserError("method_kwargs.mask.schedule=cosine: needs max_epochs or max_steps")
        every = self.meta_settings.every_n_steps
        self.planned = 0 if math.isinf(steps) else int(steps) // every
        self._last_step = step
        kind: Any = torch.optim.SGD
        more: dict[str, Any] = {"momentum": settings.momentum}
        if settings.optimizer == "adam":
            kind, more = torch.optim.Adam, {"betas": (settings.momentum, 0.999)}
        self.optimizer = kind(
            [self.mask.logits], lr=settings.lr, weight_decay=settings.weight_decay, **more
        )
        if self._restored is not None:
            self.optimizer.load_state_dict(dict(self._restored))
            self._restored = None
        self.remember(step)

    def due(self, step: int, dropped: bool = False) -> bool:
        """Whether the mask moves now; to be asked after each batch.

        It moves after every n-th step of the network that was really taken.

        Args:
            step: steps of the network so far.
            dropped: whether the last of them was counted but not taken (overflow in half
                precision).
        """
        stepped = step > self._last_step
        self._last_step = step
        meta = self.meta_settings
        return stepped and not dropped and meta.enabled and step % meta.every_n_steps == 0

    def step(self, gradient: Tensor) -> bool:
        """Moves the logits along ``gradient``; one that is not finite is skipped, and counted.

        Returns:
            Whether the logits moved.
        """
        assert self.optimizer is not None  # made by start
        logits, largest = self.mask.logits, self.mask_settings.clip_grad
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate()
        if not gradient.isfinite().all():
            self.skipped += 1
            return False
        logits.grad = gradient.to(logits.dtype)
        if largest is not None:
            nn.utils.clip_grad_norm_([logits], largest)
        self.optimizer.step()
        logits.grad = None
        self.updates += 1
        return True

    def _rate(self) -> float:
        """The rate of the next update; the plan is that of this run, should it end later now."""
        rate = self.mask_settings.lr
        if self.mask_settings.schedule == "fixed":
            return rate
        done = min(1.0, (self.updates + self.skipped) / max(1, self.planned))
        return rate * (1 + math.cos(math.pi * done)) / 2

    def remember(self, step: int) -> None:
        """Keeps the mask for the analysis."""
        if not self.history or self.history[-1][0] < step:
            self.history.append((step, self.mask.mask().detach().float().cpu()))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: settings, optimiser, counts and history."""
        settings = {"mask": self.mask_settings.plain(), "meta": self.meta_settings.plain()}
        state: dict[str, Any] = {"kind": self.mask.kind, "settings": settings}
        if self.optimizer is not None:
            state["mask_optimizer"] = {
                "optimizer": self.optimizer.state_dict(),
                "updates": self.updates,
                "skipped": self.skipped,
            }
        if self.history:
            steps, masks = zip(*self.history, strict=True)
            state["history"] = {"step": torch.tensor(steps), "mask": torch.stack(masks)}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the state of a checkpoint; the optimiser gets its part when training starts.

        Raises:
            UserError: the checkpoint's run has other settings of mask or meta-update.
        """
        self.check_same_settings(state)
        if "mask_optimizer" in state:
            own = state["mask_optimizer"]
            self.skipped = own["skipped"]
            # version 0.1.0 counted them only where there was a schedule
            past = own.get("scheduler") or {"last_epoch": self.skipped}
            self.updates = own.get("updates", past["last_epoch"] - self.skipped)
            self._restored = own["optimizer"]
        history = state.get("history", {"step": [], "mask": []})
        self.history = [
            (int(step), mask) for step, mask in zip(history["step"], history["mask"], strict=True)
        ]

    def check_same_settings(self, state: Mapping[str, Any]) -> None:
        """Refuses to continue a run with other settings of mask or meta-update than it began with.

        All of them are part of what the state means: an optimiser's buffers belong to its kind,
        its rate and its decay, and a mask to the way its gradient was computed.

        Args:
            state: what :meth:`state_dict` gave, also that of version 0.1.0.

        Raises:
            UserError: a setting is another one.
        """
        own = {"mask": self.mask_settings, "meta": self.meta_settings}
        theirs = state.get("settings") or _settings_of_version_0_1_0(state)
        for group, values in theirs.items():
            for name, value in values.items():
                here = getattr(own[group], name, value)
                if here != value:
                    raise UserError(
                        f"method_kwargs.{group}.{name}={shown(here)}: the checkpoint has "
                        f"{shown(value)}; a run is continued with the settings that it began with"
                    )


def _settings_of_version_0_1_0(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What can be told of a checkpoint that does not hold its settings."""
    found: dict[str, Any] = {}
    if "kind" in state:
        found["kind"] = state["kind"]
    if "mask_optimizer" in state:
        own = state["mask_optimizer"]
        group = own["optimizer"]["param_groups"][0]
        found |= {
            "optimizer": "adam" if "betas" in group else "sgd",
            "lr": group.get("initial_lr", group["lr"]),
            "momentum": group["betas"][0] if "betas" in group else group["momentum"],
            "weight_decay": group["weight_decay"],
            "schedule": "fixed" if own.get("scheduler") is None else "cosine",
        }
    return {"mask": found}
