"""Lightning callbacks of every run: whole checkpoints, finite losses, signals, what is shown."""

import math
import os
import random
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader

from metamask_solo.atomic_files import atomic_write, remove_leftovers
from metamask_solo.checkpoints.reading import load_raw
from metamask_solo.errors import RunStopped, UserError
from metamask_solo.evaluation.features import rankme
from metamask_solo.hosts import pl
from metamask_solo.training.config import one_line
from metamask_solo.training.resume import position, write_args

LIGHTNING = tuple(int(part) for part in pl.__version__.split(".")[:2])
LOOK_EVERY = 10  # steps, where none is logged
ADVICE = "try a lower optimizer.lr, a higher temperature or precision=32, and look at the data"


class SafeCheckpointIO(pl.plugins.TorchCheckpointIO):  # type: ignore[name-defined]
    """Lightning's reading and writing of checkpoints: whole files only, and no code from them."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        with atomic_write(path) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return load_raw(Path(path))


class Checkpointer(pl.Callback):  # type: ignore[name-defined]
    """Saves where solo-learn does, but never half a file, and always the last state.

    A file is written under a temporary name and then renamed; the one before it is removed only
    after that (``keep_prev`` keeps it). Random states go into it too. Weights that are not finite
    are never saved.

    Args:
        cfg: a completed config.
        folder: the run's.
        resume: the checkpoint at which it goes on, of the same run or of another one.
    """

    def __init__(self, cfg: DictConfig, folder: Path, resume: Path | None):
        self.cfg = cfg
        self.folder = folder
        self.last = resume if resume is not None and resume.parent == folder else None
        self._saved_step: int | None = None
        self._random: dict[str, Any] | None = None

    def setup(self, trainer: Any, model: Any, stage: str) -> None:
        self.folder = trainer.strategy.broadcast(self.folder)  # torchrun's processes do not know it

    def on_train_start(self, trainer: Any, model: Any) -> None:
        if self._random is not None:
            _set_random_state(self._random)
            self._random = None
        if trainer.is_global_zero:
            self.tidy()
            write_args(self.cfg, self.folder)

    def on_train_epoch_end(self, trainer: Any, model: Any) -> None:
        epoch = trainer.current_epoch
        # a limit of steps or time ends a run within an epoch, which is its last one then
        last = trainer.should_stop or trainer.received_sigterm or epoch + 1 == trainer.max_epochs
        last = last or 0 < trainer.max_steps <= trainer.global_step
        if last or epoch % self.cfg.checkpoint.frequency == 0:
            self.save(trainer)

    def on_validation_end(self, trainer: Any, model: Any) -> None:
        # here, since one that is saved a moment later goes on with a step too many in the logs
        if trainer.received_sigterm and not trainer.sanity_checking:
            self.save(trainer)

    def on_train_end(self, trainer: Any, model: Any) -> None:
        # a callback behind this one can have ended the run after its last epoch
        if trainer.global_step != self._saved_step:
            self.save(trainer)

    def save(self, trainer: Any) -> None:
        """Writes a checkpoint of the current epoch; every process takes part, one writes.

        Raises:
            RunStopped: a weight is not finite.
            UserError: the file cannot be written.
        """
        name = f"{self.cfg.name}-{self.folder.name}-ep={trainer.current_epoch}.ckpt"
        path = self.folder / name.replace("/", "-")
        self._check_weights(trainer)
        trainer.save_checkpoint(path)
        self.last = path
        self._saved_step = trainer.global_step
        if trainer.is_global_zero:
            self.tidy()

    def tidy(self) -> None:
        """Removes what the last checkpoint replaces, and what a killed process left behind."""
        remove_leftovers(self.folder, "*.ckpt")
        if self.last is not None and not self.cfg.checkpoint.keep_prev:
            # Lightning's own in Slurm is a copy
            for path in (*self.folder.glob("*-ep=*.ckpt"), *self.folder.glob("hpc_ckpt_*.ckpt")):
                if path.name != self.last.name:
                    path.unlink(missing_ok=True)

    def _check_weights(self, trainer: Any) -> None:
        names = _not_finite(trainer.lightning_module)
        if _any_process(trainer, bool(names)):
            raise RunStopped(
                f"step {trainer.global_step}: {names[0] if names else 'a weight'} is not finite, "
                f"so nothing was saved; {ADVICE}; {self.what_is_left()}"
            )

    def what_is_left(self) -> str:
        """Words for what a run that ends now leaves."""
        return f"the last checkpoint is {self.last}" if self.last else "there is no checkpoint"

    def state_dict(self) -> dict[str, Any]:
        return {"random": _random_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._random = state["random"]


class LastMetrics(pl.Callback):  # type: ignore[name-defined]
    """Keeps in a checkpoint what was logged last, and after which step the last validation was.

    A run that is continued behind its last validation does not validate again.
    """

    def __init__(self) -> None:
        self._before: dict[str, float] = {}
        self.validated = 0

    def on_validation_end(self, trainer: Any, model: Any) -> None:
        # what is missing now is not of these weights
        self._before = {k: v for k, v in self._before.items() if not k.startswith("val_")}
        self.validated = trainer.global_step

    def of(self, trainer: Any) -> dict[str, float]:
        """The last value of everything logged."""
        now = {name: float(value) for name, value in trainer.callback_metrics.items()}
        # what is of a whole epoch is missing where an epoch was entered in its middle
        kept = {k: v for k, v in self._before.items() if not now or not k.startswith("train_")}
        return kept | now

    def note(self, trainer: Any) -> str:
        """Says which weights were validated, where these are not the last ones."""
        validates = any(name.startswith("val_") for name in self.of(trainer))
        if not validates or self.validated >= trainer.global_step:
            return ""
        return f"(validated after step {self.validated} of {trainer.global_step})"

    def on_save_checkpoint(self, trainer: Any, model: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["last_metrics"] = {"before": self.of(trainer), "validated": self.validated}

    def on_load_checkpoint(self, trainer: Any, model: Any, checkpoint: dict[str, Any]) -> None:
        last = checkpoint.get("last_metrics", {})  # none in one of solo-learn's own scripts
        self._before, self.validated = last.get("before", {}), last.get("validated", 0)


def _random_state() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()  # type: ignore[misc]
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))


class FiniteLoss(pl.Callback):  # type: ignore[name-defined]
    """Stops a run whose loss is no longer finite, and counts the steps that fp16 overflow skips.

    Looks at the steps that are logged, so that the device need not wait at each one; weights are
    looked at before they are saved. In fp16 an overflow is usual: the step is skipped and the loss
    scale halved. It means trouble when the scale falls below 1, 16 halvings below its start.
    """

    def __init__(self, checkpointer: Checkpointer | None):
        self.checkpointer = checkpointer
        self.skipped = 0
        self._step, self._scale = 0, 0.0

    def on_train_start(self, trainer: Any, model: Any) -> None:
        self._step, self._scale = trainer.global_step, _loss_scale(trainer) or 0.0

    def on_train_batch_end(
        self, trainer: Any, model: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        scale = _loss_scale(trainer)
        if scale is not None:
            if trainer.global_step > self._step:  # with accumulation, not after every batch
                self.skipped += scale < self._scale
                self._step, self._scale = trainer.global_step, scale
            model.log("skipped_steps", float(self.skipped))
        # 0 means that nothing is logged: a look now and then is due nevertheless
        logged = trainer.global_step % (trainer.log_every_n_steps or LOOK_EVERY) == 0
        if not logged or outputs is None or (scale is not None and scale >= 1):
            return
        # DeepCluster's loss of the first epoch is NaN, of images without a cluster: no weight is
        wrong = not loss_of(outputs).isfinite() and (scale is not None or bool(_not_finite(model)))
        if _any_process(trainer, wrong):
            terms = [
                name.removesuffix("_step")
                for name, value in trainer.callback_metrics.items()
                if "loss" in name and name.startswith("train") and not value.isfinite()
            ]
            left = self.checkpointer.what_is_left() if self.checkpointer else "none were kept"
            raise RunStopped(
                f"step {trainer.global_step}: not finite: "
                f"{', '.join(dict.fromkeys(terms)) or 'the loss'}; {ADVICE}; {left}"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped = state["skipped"]


def _not_finite(model: Any) -> list[str]:
    """Names of the weights and buffers that are not finite."""
    sums = {  # of 0, or NaN where a number is not finite
        name: (0 * tensor.detach()).sum().to(model.device, torch.float32)
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, Tensor) and tensor.is_floating_point()
    }
    # read at once: a wait for the device per tensor would take longer than the saving
    finite = torch.stack([*sums.values()]).isfinite().tolist()
    return [name for name, is_finite in zip(sums, finite, strict=True) if not is_finite]


def loss_of(outputs: Any) -> Any:
    """The loss that a training step gave Lightning."""
    return outputs["loss"] if isinstance(outputs, Mapping) else outputs


def _loss_scale(trainer: Any) -> float | None:
    """The factor of fp16 loss scaling, None where there is no such scaling."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler.get_scale() if scaler is not None and scaler.is_enabled() else None


class Interruption(pl.Callback):  # type: ignore[name-defined]
    """SIGTERM, SIGUSR1 and Ctrl-C end a run after the step that is under way, with a checkpoint.

    In a validation they wait for its end; a second Ctrl-C waits for nothing. Inside Slurm, SIGUSR1
    also puts the job into the queue again, as Lightning does. A resumed run goes on in the middle
    of the epoch.
    """

    def __init__(self, checkpointer: Checkpointer | None, loader: DataLoader[Any]):
        self.checkpointer = checkpointer
        self.loader = loader
        self.received: signal.Signals | None = None
        self.where = "before the first step"
        self._between_epochs = False
        self._pass_on: Any = None
        self._save = False
        self._speaks = False
        self._requeue: Any = None

    def on_load_checkpoint(self, trainer: Any, model: Any, checkpoint: dict[str, Any]) -> None:
        epoch, batches = position(checkpoint)
        self._between_epochs = batches == 0
        if self._between_epochs:
            loops = checkpoint["loops"]["fit_loop"]
            done = (("epoch_progress", "started"), ("epoch_loop.batch_progress", "processed"))
            for name, last in done:
                for progress in (loops[name]["current"], loops[name]["total"]):
                    progress["processed"] = progress["completed"] = progress[last]
        sampler: Any = self.loader.sampler
        sampler.start_at(epoch, batches * (self.loader.batch_size or 1))
        after = f", after batch {batches}" if batches else ""
        print(f"resuming from {trainer.ckpt_path} (epoch {epoch}{after})")

    def on_train_start(self, trainer: Any, model: Any) -> None:
        if self._between_epochs:
            _no_restart(trainer)
        if threading.current_thread() is not threading.main_thread():
            return  # Python hands signals to the main thread only
        # Lightning's handlers would end the run, or save, wherever it is: they are called later
        self._pass_on = signal.getsignal(signal.SIGTERM)
        self._speaks = trainer.is_global_zero
        signal.signal(signal.SIGTERM, self._note)
        # others than Python's own, and Lightning's in Slurm, are somebody's, such as those of nohup
        for name, python in (("SIGUSR1", signal.SIG_DFL), ("SIGINT", signal.default_int_handler)):
            number = getattr(signal, name, None)
            before = None if number is None else signal.getsignal(number)
            lightnings = isinstance(before, type(self._pass_on))
            if number is not None and (before == python or lightnings):
                signal.signal(number, self._note)  # fit gives all of them back
                self._requeue = before if lightnings else self._requeue

    def _note(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT:
            if self.received is signal.SIGINT:
                raise KeyboardInterrupt
            if self._speaks:  # not print: it may be what was interrupted
                os.write(2, b"\nCtrl-C: saving after this step; once more to stop at once\n")
        self.received = signal.Signals(number)

    def on_train_batch_end(
        self, trainer: Any, model: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # left on to the end of the epoch, Lightning 2.1 would step the schedule twice there
        _no_restart(trainer)
        done = batch_idx + 1
        # the gradients accumulated so far are in no checkpoint; after the last batch comes
        # validation, and then the end of the epoch
        between_steps = done % trainer.accumulate_grad_batches == 0
        if between_steps and done < trainer.num_training_batches and self._asked(trainer):
            self._save = True
            self._stop(trainer)

    def on_validation_start(self, trainer: Any, model: Any) -> None:
        # Lightning would give up this validation, which follows the step; what an older one logs of
        # it then is not that of an unbroken run
        if self._save and LIGHTNING >= (2, 6):
            trainer._signal_connector.received_sigterm = False

    def on_validation_end(self, trainer: Any, model: Any) -> None:
        if self._save and LIGHTNING >= (2, 6):  # the checkpointer comes later, and saves
            trainer._signal_connector.received_sigterm, self._save = True, False

    def on_train_epoch_end(self, trainer: Any, model: Any) -> None:
        if self._asked(trainer):  # the checkpointer comes later, and saves
            self._stop(trainer)

    def on_exception(self, trainer: Any, model: Any, exception: BaseException) -> None:
        stopped = isinstance(exception, pl.utilities.exceptions.SIGTERMException)
        if stopped and self._save and self.checkpointer is not None and not trainer.validating:
            self.checkpointer.save(trainer)
        asked = getattr(self.received, "name", "") == "SIGUSR1"
        if stopped and self._requeue is not None and _any_process(trainer, asked):
            self._requeue(signal.SIGUSR1, None)

    def _asked(self, trainer: Any) -> bool:
        return self._pass_on is not None and _any_process(trainer, self.received is not None)

    def _stop(self, trainer: Any) -> None:
        self.where = f"in epoch {trainer.current_epoch}, after step {trainer.global_step}"
        self._pass_on(signal.SIGTERM, None)

    def report(self, where: str | None = None) -> RunStopped:
        """The one line for the user; the exit code is that of a process that the signal ended."""
        name = self.received or signal.SIGTERM
        if where is not None:
            return RunStopped(f"{name.name} {where}", 128 + name)
        left = "checkpoints are off"
        if self.checkpointer is not None:
            on = self.checkpointer.cfg.auto_resume.enabled
            command = "the same command" if on else "auto_resume.enabled=True"
            left = f"{self.checkpointer.what_is_left()}; {command} continues"
        return RunStopped(f"stopped by {name.name} {self.where}; {left}", 128 + name)


def _no_restart(trainer: Any) -> None:
    """Tells Lightning that it restarts no epoch, which its own setter refuses with max_steps."""
    loop = type(trainer.fit_loop)
    super(loop, loop).restarting.fset(trainer.fit_loop, False)  # type: ignore[misc]


def _any_process(trainer: Any, decision: bool) -> bool:
    """Whether a decision holds in any process of the run; each of them must ask."""
    if trainer.world_size == 1:
        return decision
    return bool(trainer.strategy.reduce_boolean_decision(decision, all=False))


class RankMe(pl.Callback):  # type: ignore[name-defined]
    """Logs ``train_rankme`` after each epoch, which falls when the features collapse.

    RankMe of the features that the last steps of the epoch computed anyway, of four times as many
    views as there are dimensions. With a mask, ``train_rankme_masked`` is that of the masked
    features with the mask at the epoch's end. Where nothing is logged it does nothing.
    """

    def __init__(self) -> None:
        self._features: deque[Tensor] = deque()
        self._listening = False
        self._handle: Any = None

    def on_train_start(self, trainer: Any, model: Any) -> None:
        if trainer.loggers:
            backbone = getattr(model, "backbone", None) or model.encoder
            self._handle = backbone.register_forward_hook(self._hear)

    def teardown(self, trainer: Any, model: Any, stage: str) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def on_train_batch_start(self, trainer: Any, model: Any, batch: Any, batch_idx: int) -> None:
        # not in an epoch that is entered in its middle: the unbroken run has other features
        self._listening = batch_idx == 0 or bool(self._features)

    def on_before_backward(self, trainer: Any, model: Any, loss: Any) -> None:
        # what follows, such as the mask's update, runs the backbone on the same images again
        self._listening = False

    def _hear(self, module: Any, inputs: Any, output: Any) -> None:
        if self._listening and isinstance(output, Tensor) and output.ndim == 2:
            self._features.append(output.detach())
            enough = 4 * output.shape[1]
            while sum(map(len, self._features)) - len(self._features[0]) >= enough:
                self._features.popleft()

    def on_train_epoch_end(self, trainer: Any, model: Any) -> None:
        if not self._features:
            return
        features = torch.cat([*self._features]).float()
        self._features.clear()
        if trainer.world_size > 1:
            features = model.all_gather(features).flatten(0, 1)
        if not features.isfinite().all():  # another callback stops the run
            return
        # equal in all processes
        model.log("train_rankme", rankme(features.cpu()), sync_dist=True)
        mask = getattr(model, "mask", None)
        if mask is not None and hasattr(mask, "mask"):
            masked = features * mask.mask().detach()
            model.log("train_rankme_masked", rankme(masked.cpu()), sync_dist=True)


class Forecast(pl.Callback):  # type: ignore[name-defined]
    """Says after the first steps how long the run will take; Lightning's bar tells of one epoch."""

    STEPS = 3  # at least, after a step that warms up

    def __init__(self) -> None:
        self._batches, self._start = 0, 0.0

    def on_train_batch_end(
        self, trainer: Any, model: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # whole periods: steps of the optimiser, and updates of the mask
        period = trainer.accumulate_grad_batches
        period *= model.settings.meta.every_n_steps if hasattr(model, "mask") else 1
        timed = period * math.ceil(self.STEPS / period)
        self._batches += 1
        if self._batches not in (1, 1 + timed):
            return
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        if self._batches == 1:
            self._start = time.monotonic()
        elif trainer.is_global_zero:
            seconds = (time.monotonic() - self._start) / timed
            steps = trainer.estimated_stepping_batches - trainer.global_step
            left = steps * trainer.accumulate_grad_batches * seconds
            if 60 < left < float("inf"):
                device = "GPU" if model.device.type == "cuda" else "CPU"
                duration = timedelta(minutes=round(left / 60))
                print(f"forecast: {duration} on this {device}, {seconds:.2g} s a step")


class Bar(pl.callbacks.TQDMProgressBar):  # type: ignore[name-defined]
    """Lightning's bar with the losses, the accuracies and the spread of the mask."""

    SHOWN = re.compile(r"train_\w*loss_step|val_(knn_)?acc1|mask_(min|max)")

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        print(file=sys.stderr)  # the error gets a line of its own

    def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        """What stands behind the bar."""
        logged = trainer.callback_metrics.items()
        return {name: f"{float(v):.3g}" for name, v in logged if self.SHOWN.fullmatch(name)}


def configured_callbacks(cfg: DictConfig) -> list[Any]:
    """The callbacks that a config names under ``callbacks``, each by its ``_target_``.

    Raises:
        UserError: one cannot be made, or is of the Lightning that this solo-learn does not use.
    """
    made = []
    for i, settings in enumerate(cfg.get("callbacks") or []):
        key = f"callbacks.{i}._target_={settings.get('_target_')}"
        with one_line(key):
            made.append(instantiate(OmegaConf.to_container(settings)))
        if not isinstance(made[-1], pl.Callback):
            raise UserError(f"{key}: must be a callback of {pl.__name__}, which solo-learn uses")
    return made
