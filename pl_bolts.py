"""What solo-learn 1.0.2 imports of lightning-bolts, which does not import with Lightning 2.

A module in the place of the package: ``from pl_bolts.optimizers.lr_scheduler import
LinearWarmupCosineAnnealingLR``. It is a file of its own, and no folder, since Python takes a folder
first: where lightning-bolts is installed, that goes first, and the two share no file.
"""

import math
import sys
from types import ModuleType
from typing import Any

from torch.optim.lr_scheduler import LRScheduler


class LinearWarmupCosineAnnealingLR(LRScheduler):
    """A linear rise over the warm-up, then a cosine fall; by steps or by epochs.

    Args:
        optimizer: the optimiser.
        warmup_epochs: length of the rise, of which the last position has the base rate.
        max_epochs: position at which ``eta_min`` is reached.
        warmup_start_lr: rate at the first position of a rise.
        eta_min: rate at the end.
    """

    def __init__(
        self,
        optimizer: Any,
        warmup_epochs: float,
        max_epochs: float,
        warmup_start_lr: float = 0.0,
        eta_min: float = 0.0,
    ):
        self.warmup_epochs = warmup_epochs
        self.max_epochs = max_epochs
        self.warmup_start_lr = warmup_start_lr
        self.eta_min = eta_min
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        return [self._rate(base, self.last_epoch) for base in self.base_lrs]

    def _rate(self, base: Any, position: int) -> Any:
        if position < self.warmup_epochs:
            rise = position / max(1, self.warmup_epochs - 1)
            return self.warmup_start_lr + rise * (base - self.warmup_start_lr)
        fall = (position - self.warmup_epochs) / max(1, self.max_epochs - self.warmup_epochs)
        return self.eta_min + (base - self.eta_min) * (1 + math.cos(math.pi * fall)) / 2


__path__: list[str] = []  # makes it a package, whose modules stand below
optimizers = ModuleType("pl_bolts.optimizers")
lr_scheduler = ModuleType("pl_bolts.optimizers.lr_scheduler")
vars(lr_scheduler)["LinearWarmupCosineAnnealingLR"] = LinearWarmupCosineAnnealingLR
vars(optimizers)["lr_scheduler"] = lr_scheduler
sys.modules |= {module.__name__: module for module in (optimizers, lr_scheduler)}
