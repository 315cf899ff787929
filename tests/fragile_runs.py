"""Runs that are killed, or sent a signal, at a chosen moment; for the tests in tests/faults."""

import io
import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path
from threading import Timer
from typing import Any

import torch
from omegaconf import DictConfig
from runs import pretrain_config, use_small_backbone

from metamask_solo.hosts import pl

EPOCHS, STEPS = 3, 2  # of the run below, steps in each epoch
# the moments at which a run can be killed, and how often each comes in a whole run
MOMENTS = {
    **dict.fromkeys(("step", "hook"), EPOCHS * STEPS),
    "validation": 2 * EPOCHS * STEPS,  # of two batches
    **dict.fromkeys(("writing", "renaming", "renamed"), EPOCHS),
}

# a process takes seconds to import everything; this server does it once, and forks
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["metamask_solo.training.pretrain"])


def fragile_config(data: Path, out: Path, **overrides: Any) -> DictConfig:
    """Three epochs of two steps, each validated, with everything in it that has a state."""
    overrides = {"max_epochs": EPOCHS, "auto_resume__enabled": True, **overrides}
    # of 20 training images, 2 are dropped; of 10 to validate on, one is a batch of its own
    overrides |= {"val_check_interval": 1, "optimizer__batch_size": 9}
    cfg = pretrain_config(data, out, fold_at_end=False, **overrides)
    cfg.scheduler = {"name": "warmup_cosine", "warmup_epochs": 1}
    cfg.method_kwargs.mask = {"optimizer": "adam", "lr": 0.1, "schedule": "cosine"}
    return cfg


class SmallBackbone(pl.Callback):  # type: ignore[name-defined]
    def setup(self, trainer: Any, model: Any, stage: str) -> None:
        use_small_backbone(model)


class SignalAt(pl.Callback):  # type: ignore[name-defined]
    """Sends the run and its workers a signal when a moment comes for the n-th time, from 1.

    Args:
        delay: seconds from that moment to the signal.
    """

    def __init__(self, moment: str, n: int, number: int = signal.SIGKILL, delay: float = 0.0):
        self.moment = moment
        self.left = n
        self.number = number
        self.delay = delay

    def came(self, moment: str) -> None:
        self.left -= moment == self.moment
        if self.left == 0:
            self.left = -1
            if self.delay:
                Timer(self.delay, os.killpg, (os.getpid(), self.number)).start()
            else:
                os.killpg(os.getpid(), self.number)

    def on_train_start(self, trainer: Any, model: Any) -> None:
        compute_gradient, save_whole, rename = model.mask_gradient, torch.save, os.replace

        def mask_gradient(views: Any) -> torch.Tensor:
            gradient = compute_gradient(views)
            self.came("hook")
            return gradient

        def save(content: Any, path: Any) -> None:
            buffer = io.BytesIO()
            save_whole(content, buffer)
            half = len(buffer.getvalue()) // 2
            with open(path, "wb") as file:
                file.write(buffer.getvalue()[:half])
                file.flush()
                self.came("writing")
                file.write(buffer.getvalue()[half:])

        def replace(source: Any, target: Any) -> None:
            checkpoint = str(target).endswith(".ckpt")
            if checkpoint:
                self.came("renaming")
            rename(source, target)
            if checkpoint:
                self.came("renamed")

        model.mask_gradient, torch.save, os.replace = mask_gradient, save, replace

    def on_after_backward(self, trainer: Any, model: Any) -> None:
        self.came("step")

    def on_validation_batch_start(self, *_: Any) -> None:
        self.came("validation")


class FullDisk(pl.Callback):  # type: ignore[name-defined]
    """From an epoch on, no file can grow beyond 64 KiB."""

    def __init__(self, epoch: int):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: Any, model: Any) -> None:
        if trainer.current_epoch == self.epoch:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))


def _body(log: Path, cfg: DictConfig, callbacks: tuple[Any, ...]) -> None:
    from metamask_solo.errors import RunStopped, UserError
    from metamask_solo.training.pretrain import pretrain_run

    os.setsid()  # a group of its own, as a shell, Slurm or a container makes one
    multiprocessing.set_start_method("fork", force=True)  # of workers, as in a command
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    try:
        pretrain_run(cfg, callbacks=(SmallBackbone(), *callbacks))
    except (RunStopped, UserError) as error:
        print(error)
        sys.stdout.flush()
        os._exit(error.exit_code if isinstance(error, RunStopped) else 2)


def run(log: Path, cfg: DictConfig, *callbacks: Any) -> int:
    """Pretrains in a process of its own that prints to ``log``; returns its exit code."""
    process = SERVER.Process(target=_body, args=(log, cfg, callbacks))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode
