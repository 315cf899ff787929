"""The mask's optimiser, its schedule and its history. Knows of torch only."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metamask_solo.errors import UserError
from metamask_solo.method.mask import DimensionalMask
from metamask_solo.method.settings import MaskSettings


class MaskOptimizer:
    """Moves the mask's logits along their hypergradient, and remembers how they moved.

    Counters and optimiser belong to one fit: each :meth:`start` begins anew, unless the fit goes on
    after its first step and the state of a checkpoint was loaded since the last one.

    Args:
        mask: the mask; its logits are moved in place.
        settings: its optimiser, rates and schedule.

    Attributes:
        history: (step, mask) at the start and at the end of each epoch.
        updates: updates so far, of the whole run, without those that were skipped.
        skipped: updates that were skipped, since their gradient was not finite or refused.
    """

    def __init__(self, mask: DimensionalMask, settings: MaskSettings):
        self.mask, self.settings = mask, settings
        self.optimizer: torch.optim.Optimizer | None = None
        self.history: list[tuple[int, Tensor]] = []
        self.updates, self.skipped, self.planned = 0, 0, math.inf
        self._loaded: Mapping[str, Any] = {}

    def start(self, step: int, planned: float) -> None:
        """Makes the optimiser when training starts, with the state of the checkpoint, if any.

        Args:
            step: steps of the network so far.
            planned: updates of the mask in the whole run, infinity where nobody knows.

        Raises:
            UserError: a cosine without an end.
        """
        settings, logits = self.settings, [self.mask.logits]
        if settings.schedule == "cosine" and math.isinf(planned):
            raise UserError("method_kwargs.mask.schedule=cosine: needs max_epochs or max_steps")
        shared: Any = {"lr": settings.lr, "weight_decay": settings.weight_decay}
        if settings.optimizer == "adam":
            self.optimizer = torch.optim.Adam(logits, betas=(settings.momentum, 0.999), **shared)
        else:
            self.optimizer = torch.optim.SGD(logits, momentum=settings.momentum, **shared)
        self.planned, self.history = planned, []
        # a fit from the first step goes on with nothing, such as one on the weights of another run
        loaded = self._loaded if step else {}
        earlier = loaded.get("mask_optimizer", {"updates": 0, "skipped": 0})
        self.updates, self.skipped = earlier["updates"], earlier["skipped"]
        if "optimizer" in earlier:
            # moments come from the checkpoint, rates from the file, as for the network
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({**earlier["optimizer"], "param_groups": groups})
            kept = loaded["history"]
            self.history = list(zip(kept["step"].tolist(), kept["mask"].unbind(), strict=True))
        self._loaded = {}
        self.remember(step)

    def step(self, gradient: Tensor, due: int | None = None) -> bool:
        """Moves the logits along ``gradient``; one that is not finite is skipped, and counted.

        Args:
            gradient: of the logits, (D,).
            due: how many of the planned updates were due before this one, for the cosine; None:
                those that were made.

        Returns:
            Whether the logits moved.
        """
        assert self.optimizer is not None  # made by start
        logits, settings = self.mask.logits, self.settings
        rate = settings.lr
        if settings.schedule == "cosine":
            due = self.updates + self.skipped if due is None else due
            done = min(1.0, due / max(1, int(self.planned)))
            rate *= (1 + math.cos(math.pi * done)) / 2
        self.optimizer.param_groups[0]["lr"] = rate
        if not gradient.isfinite().all():
            self.skipped += 1
            return False
        logits.grad = gradient.to(logits.dtype, copy=True)  # clipping changes it
        if settings.clip_grad is not None:
            nn.utils.clip_grad_norm_([logits], settings.clip_grad)
        self.optimizer.step()
        logits.grad = None
        self.updates += 1
        return True

    def remember(self, step: int) -> None:
        """Keeps the mask for the analysis."""
        if not self.history or self.history[-1][0] < step:
            self.history.append((step, self.mask.mask().detach().float().cpu()))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: kind, optimiser, counters and history."""
        if self.optimizer is None:  # before training; what was loaded is kept
            return {"kind": self.mask.kind, **self._loaded}
        steps, masks = zip(*self.history, strict=True)
        return {
            "kind": self.mask.kind,
            "mask_optimizer": {
                "name": self.settings.optimizer,
                "optimizer": self.optimizer.state_dict(),
                "updates": self.updates,
                "skipped": self.skipped,
            },
            "history": {"step": torch.tensor(steps), "mask": torch.stack(masks)},
        }

    def check(self, state: Mapping[str, Any]) -> None:
        """Raises UserError if the state is that of another kind of mask, or another optimiser."""
        earlier = {
            "kind": state.get("kind", self.mask.kind),
            "optimizer": state.get("mask_optimizer", {}).get("name", self.settings.optimizer),
        }
        for name, value in earlier.items():
            now = getattr(self.settings, name)
            if now != value:
                raise UserError(
                    f"method_kwargs.mask.{name}={now}: the checkpoint has {value}, which a "
                    "resumed run cannot change"
                )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the state of a checkpoint, with which the next :meth:`start` goes on.

        Raises:
            UserError: see :meth:`check`.
        """
        self.check(state)
        self._loaded = state
