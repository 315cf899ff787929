"""What a run of solo-learn needs for going on where it stopped, and that no checkpoint has."""

import math
import sys
from typing import Any

import torch

from metamask_solo.errors import UserError
from metamask_solo.hosts import pl

KEY = "host_state"


class HostState(pl.Callback):  # type: ignore[name-defined]
    """Keeps in a checkpoint what solo-learn leaves out, and puts it back when a run goes on.

    - Buffers that a method makes when training starts, after a checkpoint was read (SwAV's queue,
      DeepCluster's memory), and DeepCluster's assignments of the epoch.
    - τ of momentum methods, a function of the step that a fresh object has forgotten.
    - DINO's epoch, which Lightning does not tell when a run goes on within one.
    - The random state of the checkpoint, from which the hooks of a method would draw.

    And it rounds a warm-up to steps (or epochs), which ``max_steps`` does not shorten, gives each
    group its own rate where there is none, and computes no online kNN of an epoch that is entered
    in its middle: some images would lack.

    It stands behind the callback that restores random states in ``on_train_start``. A checkpoint is
    to be written when all hooks of a batch are over, since τ moves in the last.

    Raises:
        UserError: a buffer of the checkpoint does not fit the config.
    """

    def __init__(self) -> None:
        self._at_setup: set[str] = set()
        self._state: dict[str, Any] | None = None
        self._random: torch.Tensor | None = None
        self._weights: dict[str, torch.Tensor] | None = None
        self._knn = False

    def setup(self, trainer: Any, model: Any, stage: str) -> None:
        self._at_setup = set(model.state_dict())

    def on_save_checkpoint(self, trainer: Any, model: Any, checkpoint: dict[str, Any]) -> None:
        weights = checkpoint["state_dict"]
        late = {name: weights.pop(name) for name in weights.keys() - self._at_setup}
        # a ModelCheckpoint that counts steps saves before the teacher moves
        behind = getattr(model, "last_step", trainer.global_step) < trainer.global_step
        checkpoint[KEY] = {"buffers": late, "teacher_behind": behind}
        if isinstance(getattr(model, "assignments", None), torch.Tensor):
            checkpoint[KEY]["assignments"] = model.assignments
        for schedule in checkpoint.get("lr_schedulers", []):
            # SimSiam's fixed rate is a function in the schedule: it would drag the optimiser into
            # the file, which no safe reader could open
            schedule.pop("get_lr", None)

    def on_load_checkpoint(self, trainer: Any, model: Any, checkpoint: dict[str, Any]) -> None:
        self._state = checkpoint.get(KEY, {})

    def on_train_start(self, trainer: Any, model: Any) -> None:
        self._random = torch.get_rng_state()
        self._knn = getattr(model, "knn_eval", False)
        for config in trainer.lr_scheduler_configs:
            schedule = config.scheduler
            if not hasattr(schedule, "warmup_epochs"):
                continue
            if trainer.global_step == 0 < trainer.max_steps and config.interval == "step":
                # GitHub main takes for an epoch what max_steps leaves of it
                batches, each = trainer.num_training_batches, trainer.accumulate_grad_batches
                schedule.warmup_epochs = model.warmup_epochs * math.ceil(batches / each)
            # GitHub main's schedule goes on from the last rate, and is at the base rate only where
            # a position equals the end of the warm-up
            schedule.warmup_epochs = round(schedule.warmup_epochs)
            if trainer.global_step == 0 == schedule.warmup_epochs:
                # else all groups would have the rate of the first, the online classifier's too
                groups = schedule.optimizer.param_groups
                for group, rate in zip(groups, schedule.base_lrs, strict=True):
                    group["lr"] = rate
            # of a schedule of one's own, nobody knows the length
            length = getattr(schedule, "max_epochs", math.inf)
            if trainer.is_global_zero and schedule.warmup_epochs >= length:
                key = f"scheduler.warmup_epochs={model.warmup_epochs:g}"
                words = "the run ends within the warm-up, and optimizer.lr is not reached before"
                print(f"note: {key}: {words}", file=sys.stderr)

    def on_train_epoch_start(self, trainer: Any, model: Any) -> None:
        if self._knn:
            model.knn_eval = True
        if self._state is not None:
            self._restore(trainer, model)
            self._weights = {name: w.clone() for name, w in model.state_dict().items()}

    def on_train_batch_start(self, trainer: Any, model: Any, batch: Any, batch_idx: int) -> None:
        if self._state is None:
            return
        if batch_idx > 0:  # the checkpoint is from within an epoch
            model.knn_eval = False
            if self._weights is not None:
                # Lightning before 2.5 starts the epoch again, and DeepCluster its clusters
                model.load_state_dict(self._weights)
            elif not hasattr(model, "kmeans"):
                model.on_train_epoch_start()
            self._restore(trainer, model)
        self._state = self._weights = None

    def _restore(self, trainer: Any, model: Any) -> None:
        assert self._state is not None and self._random is not None
        torch.set_rng_state(self._random)
        for name, value in self._state.get("buffers", {}).items():
            _restore_buffer(model, name, value)
        if "assignments" in self._state:
            model.assignments = self._state["assignments"].to(model.device)
        if hasattr(model, "momentum_updater"):
            # at 0, the next batch would count as a step even where it is accumulated
            model.last_step = step = trainer.global_step
            updater, steps = model.momentum_updater, trainer.estimated_stepping_batches
            if self._state.pop("teacher_behind", False):
                updater.update_tau(cur_step=step - 1, max_steps=steps)
                for pair in model.momentum_pairs:
                    updater.update(*pair)
            updater.update_tau(cur_step=step, max_steps=steps)


def _restore_buffer(model: Any, name: str, value: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    buffers = model.get_submodule(path)._buffers
    # None: All4One's positional encoding, which its first batch makes
    made = buffers.get(leaf, ...)
    if made is ... or (made is not None and made.shape != value.shape):
        shape = "none" if made is ... else f"one of {tuple(made.shape)}"
        raise UserError(
            f"resume: the checkpoint holds {name} of shape {tuple(value.shape)}, and this config "
            f"makes {shape}"
        )
    buffers[leaf] = value.to(model.device)
