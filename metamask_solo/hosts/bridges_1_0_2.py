"""The things that solo-learn 1.0.2 misses on Lightning 2.

Imports no solo-learn: :mod:`metamask_solo.bolts_1_0_2` offers the first bridge to it, from this
file, while it is imported. `make setup` also puts a stand-in for ``pl_bolts`` into the environment,
so that ``import solo`` works before ``import metamask_solo`` as well.
"""

import functools
import importlib
import math
import types
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import LRScheduler


class LinearWarmupCosineAnnealingLR(LRScheduler):
    """A schedule comes from lightning-bolts, which does not import with Lightning 2.

    A linear rise from ``warmup_start_lr`` over ``warmup_epochs``, then a cosine fall to
    ``eta_min`` at ``max_epochs``.
    """

    def __init__(
        self,
        optimizer: Any,
        warmup_epochs: int,
        max_epochs: int,
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

    def _rate(self, base: Any, epoch: int) -> Any:
        if epoch < self.warmup_epochs:
            rise = epoch / max(1, self.warmup_epochs - 1)
            return self.warmup_start_lr + rise * (base - self.warmup_start_lr)
        fall = (epoch - self.warmup_epochs) / max(1, self.max_epochs - self.warmup_epochs)
        return self.eta_min + (base - self.eta_min) * (1 + math.cos(math.pi * fall)) / 2


def import_distutils() -> None:
    """DINO uses ``distutils.util``, but imports ``distutils`` alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        importlib.import_module("distutils.util")


def bridge_validation(cls: type) -> None:
    """Lightning 2 refuses a module whose ``validation_epoch_end`` can be called."""
    bridged: Any = cls
    construct = bridged.__init__

    @functools.wraps(construct)
    def construct_bridged(self: Any, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        # hides the method from Lightning's check; super() and the class still reach it
        self.__dict__["validation_epoch_end"] = None
        self.__dict__["_validation_outputs"] = []

    def on_validation_batch_end(
        self: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._validation_outputs.append(outputs)

    def on_validation_epoch_end(self: Any) -> None:
        type(self).validation_epoch_end(self, self._validation_outputs)
        self._validation_outputs.clear()

    bridged.__init__ = construct_bridged
    bridged.on_validation_batch_end = on_validation_batch_end
    bridged.on_validation_epoch_end = on_validation_epoch_end


def bridge_momentum_update(cls: Any) -> None:
    """Lightning 2 passes no ``dataloader_idx`` to ``on_train_batch_end``.

    The plan of τ is that of the steps that the run will take, as on GitHub main; this release's
    counts the whole loader, whatever the limits of the trainer are.
    """
    update = cls.on_train_batch_end

    @functools.wraps(update)
    def bridged(self: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        stepped = self.trainer.global_step > self.last_step
        update(self, outputs, batch, batch_idx, 0)
        if stepped:
            self.momentum_updater.update_tau(
                cur_step=self.trainer.global_step,
                max_steps=self.trainer.estimated_stepping_batches,
            )

    cls.on_train_batch_end = bridged


def bridge_gradient_clipping(dino: Any) -> None:
    """DINO's own ``clip_gradients(value)`` has the name of a method of Lightning's."""
    own = dino.clip_gradients
    lightnings = super(dino, dino).clip_gradients

    @functools.wraps(own)
    def bridged(self: Any, first: Any, *args: Any, **kwargs: Any) -> None:
        if args or kwargs:
            lightnings(self, first, *args, **kwargs)
        else:
            own(self, first)

    dino.clip_gradients = bridged


class _TorchWithCholesky(types.ModuleType):
    """The torch module with the function that it no longer has."""

    cholesky = staticmethod(torch.linalg.cholesky)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def bridge_whitening(module: Any) -> None:
    """W-MSE whitens with ``torch.cholesky``, which torch 2.13 removed."""
    module.torch = _TorchWithCholesky("torch")


def bridge_cosine(knn: Any) -> None:
    """The online kNN takes the plain dot product for the cosine."""
    compute = knn.compute

    @functools.wraps(compute)
    def bridged(self: Any) -> Any:
        if self.distance_fx == "cosine":
            self.train_features = [F.normalize(features) for features in self.train_features]
            self.test_features = [F.normalize(features) for features in self.test_features]
        return compute(self)

    knn.compute = bridged
