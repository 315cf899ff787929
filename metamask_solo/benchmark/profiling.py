"""Where the time of one epoch goes, part by part, for ``metamask-solo profile``."""

import functools
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from metamask_solo.errors import UserError
from metamask_solo.hosts import RELEASE, pl
from metamask_solo.training.hydra_app import reason
from metamask_solo.training.overrides import compose_pretraining
from metamask_solo.training.pretraining import prepare_pretraining
from metamask_solo.training.sampling import trains_on_gpu
from metamask_solo.training.trainer import fit

REST = "rest"
# in the order of the table; augmentations stand behind "decode"
FIRST = ("decode",)
LAST = (
    "collate",
    "forward",
    "backward",
    "mask update",
    "optimiser",
    "validation",
    "checkpoint",
    REST,
)


class Parts:
    """Seconds of named parts; a part inside another counts for itself alone, so all add up.

    Args:
        wait: called before the clock is read; a GPU works on while Python goes on.
    """

    def __init__(self, wait: Callable[[], None] = lambda: None):
        self.wait = wait
        self.clear()

    def clear(self) -> None:
        """Forgets all; what is under way goes on from now."""
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self._open = getattr(self, "_open", [REST])
        self._since = time.perf_counter()

    def _book(self) -> None:
        self.wait()
        now = time.perf_counter()
        name = self._open[-1]
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now

    def enter(self, name: str) -> None:
        self._book()
        self._open.append(name)
        self.calls[name] = self.calls.get(name, 0) + 1

    def leave(self) -> None:
        self._book()
        if len(self._open) > 1:
            self._open.pop()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return call

    def finish(self) -> dict[str, float]:
        """All seconds, up to now."""
        self._book()
        return dict(self.seconds)


class _Timed:
    """A transform whose time is booked under its name."""

    def __init__(self, transform: Any, parts: Parts):
        self.transform = transform
        self.parts = parts
        self.name = name_of(transform)

    def __call__(self, image: Any) -> Any:
        with self.parts.part(self.name):
            return self.transform(image)


def name_of(transform: Any) -> str:
    """The class of a transform; of one that is applied by chance, the class of what it applies."""
    inner = getattr(transform, "transforms", None)
    if isinstance(inner, list | tuple) and len(inner) == 1:
        return name_of(inner[0])
    return type(transform).__name__


def time_transforms(transform: Any, parts: Parts) -> Any:
    """A transform that books each step of its pipelines; the pipelines are changed in place."""
    for attribute in ("transforms", "transform"):
        inner = getattr(transform, attribute, None)
        if isinstance(inner, list | tuple) and type(transform).__name__ != "RandomApply":
            setattr(transform, attribute, [time_transforms(step, parts) for step in inner])
            return transform
        if callable(inner):
            setattr(transform, attribute, time_transforms(inner, parts))
            return transform
    return _Timed(transform, parts)


class _Watch(pl.Callback):  # type: ignore[name-defined]
    """Puts the clock around what training calls, and starts counting after the first step."""

    def __init__(self, parts: Parts):
        self.parts = parts
        self.steps = 0
        self.seconds: dict[str, float] = {}

    def on_train_start(self, trainer: Any, model: Any) -> None:
        parts = self.parts
        model.training_step = parts.timed(model.training_step, "forward")
        model.backward = parts.timed(model.backward, "backward")
        if hasattr(model, "_update_mask"):
            model._update_mask = parts.timed(model._update_mask, "mask update")
        for optimizer in trainer.optimizers:
            optimizer.step = parts.timed(optimizer.step, "optimiser")
        trainer.save_checkpoint = parts.timed(trainer.save_checkpoint, "checkpoint")

    def on_train_batch_end(self, *args: Any) -> None:
        self.steps += 1
        if self.steps == 1:
            self.parts.clear()  # the first step also makes what the others find

    def on_validation_start(self, *args: Any) -> None:
        self.parts.enter("validation")

    def on_validation_end(self, *args: Any) -> None:
        self.parts.leave()

    def on_train_end(self, *args: Any) -> None:
        self.seconds = self.parts.finish()


@dataclass(frozen=True)
class Profile:
    """Where the time of an epoch went: seconds and calls by part, and what was run where."""

    config: str
    overrides: list[str]
    method: str
    device: str
    threads: int
    versions: dict[str, str]
    steps: int
    images: int
    seconds: dict[str, float]
    calls: dict[str, int]


def profile(path: str | Path, overrides: list[str], steps: int | None = None) -> Profile:
    """Trains one epoch of a pretraining file, with images read by the process that trains.

    Nothing is kept of the run. The clock waits for a GPU at each part, so that one's own work is
    not booked on another; the epoch itself is faster without that.

    Args:
        path: YAML file of a run.
        overrides: Hydra overrides of it.
        steps: counted steps, after one that is not counted; None for the whole epoch.

    Raises:
        UserError: the file, an override or ``steps`` cannot be used.
    """
    if steps is not None and steps < 1:
        raise UserError(f"--steps={steps}: must be at least 1")
    with tempfile.TemporaryDirectory(prefix="profile-") as folder:
        cfg = _config(Path(path), [*overrides], folder, steps)
        model, cfg, loader, validation = prepare_pretraining(cfg)
        if len(loader) < 2:
            raise UserError(
                f"optimizer.batch_size={cfg.optimizer.batch_size}: the epoch has {len(loader)} "
                "step; at least 2 are needed, since the first is not counted"
            )
        on_gpu = trains_on_gpu(cfg)
        parts = Parts(torch.cuda.synchronize if on_gpu else lambda: None)
        dataset: Any = loader.dataset
        dataset.source.read = parts.timed(dataset.source.read, "decode")
        dataset.transform = time_transforms(dataset.transform, parts)
        loader.collate_fn = parts.timed(loader.collate_fn, "collate")
        watch = _Watch(parts)
        fit(model, cfg, loader, validation, cfg.method, (watch,))
    counted = watch.steps - 1
    return Profile(
        config=str(path),
        overrides=overrides,
        method=cfg.method,
        device=torch.cuda.get_device_name() if on_gpu else platform.machine(),
        threads=torch.get_num_threads(),
        versions={"torch": torch.__version__, "solo-learn": RELEASE},
        steps=counted,
        images=counted * cfg.optimizer.batch_size,
        seconds=watch.seconds,
        calls=parts.calls,
    )


def _config(path: Path, overrides: list[str], folder: str, steps: int | None) -> DictConfig:
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the YAML file of a pretraining run")
    try:
        with initialize_config_dir(str(path.parent.resolve()), version_base="1.2"):
            cfg = compose_pretraining(path.stem, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"{path}: {reason(error)}") from error
    OmegaConf.set_struct(cfg, False)
    settings: dict[str, Any] = {
        "checkpoint.dir": folder,
        "data.num_workers": 0,
        "max_epochs": 1,
        "devices": 1,
        "auto_resume.enabled": False,
        "wandb.enabled": False,
        "resume_from_checkpoint": None,
    }
    if steps is not None:
        settings["limit_train_batches"] = steps + 1
    for key, value in settings.items():
        OmegaConf.update(cfg, key, value, force_add=True)
    return cfg


def table(report: Profile) -> str:
    """Seconds, milliseconds a step and share of each part."""
    seconds = report.seconds
    augmentations = [name for name in seconds if name not in (*FIRST, *LAST)]
    total = sum(seconds.values())
    lines = [f"{'part':<22}{'seconds':>9}{'ms a step':>11}{'share':>8}"]
    for name in (*FIRST, *augmentations, *LAST, "all"):
        value = total if name == "all" else seconds.get(name)
        if value is not None:
            each = 1000 * value / report.steps
            lines.append(f"{name:<22}{value:>9.2f}{each:>11.2f}{value / total:>8.1%}")
    return "\n".join(lines)
