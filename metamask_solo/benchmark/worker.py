"""One run of a benchmark, in a process of its own: ``python -m metamask_solo.benchmark.worker``.

Its argument is the run's folder, which holds run.json; the process adds result.json at the end.
"""

import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from omegaconf import OmegaConf
from torch import Tensor, nn

import metamask_solo
from metamask_solo.benchmark.memory import peak_memory
from metamask_solo.benchmark.records import Cost, Result, Task
from metamask_solo.checkpoints.reading import load_backbone
from metamask_solo.data.datasets import classification_datasets
from metamask_solo.data.images import evaluation_transform, plain_loader, split_loader
from metamask_solo.errors import RunStopped, UserError
from metamask_solo.evaluation.features import (
    effective_rank,
    extract_features,
    pick_device,
    second_moments,
)
from metamask_solo.evaluation.knn import knn_accuracy
from metamask_solo.evaluation.linear import linear_probe
from metamask_solo.hosts import build_backbone, pl
from metamask_solo.training.pretraining import pretrain_run
from metamask_solo.training.resume import FitResult, read_metrics
from metamask_solo.training.sampling import workers_of
from metamask_solo.versions import version_of

ONLINE_KNN = "val_knn_acc1"
LARGEST_RAW = 64  # pixels a side
PACKAGES = ("metamask-solo", "solo-learn", "torch", "lightning")


def main(argv: list[str]) -> int:
    """Pretrains and evaluates; the exit codes are those of the commands."""
    _end_with_parent()
    folder = Path(argv[0])
    try:
        if int(os.environ.get("LOCAL_RANK", 0)) > 0:  # a further process of DDP
            _pretrain(Task.read(folder), folder)
            return 0
        # waits until no other process works on this run; a killed process holds nothing
        with FileLock(folder / "lock"):
            if not Result.is_in(folder):
                _run(folder)
    except (UserError, RunStopped) as error:
        print(f"error: {error}", flush=True)
        return error.exit_code if isinstance(error, RunStopped) else 2
    return 0


class Measure(pl.Callback):  # type: ignore[name-defined]
    """Writes what training costs into the run's folder.

    A step lasts from the start of one batch to the start of the next: reading the data and
    MetaMask's mask update included, validation not. The mean of the last epoch is taken. Written
    before each checkpoint: a run killed after its last one has nothing left to train.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.starts: list[float] = []
        self.seconds_per_step: float | None = None

    def on_train_epoch_start(self, trainer: Any, model: Any) -> None:
        self.starts = []

    def on_train_batch_start(self, trainer: Any, model: Any, batch: Any, batch_idx: int) -> None:
        self.starts.append(time.perf_counter())

    def on_train_epoch_end(self, trainer: Any, model: Any) -> None:
        steps = len(self.starts) - 1
        if steps > 0:  # of an epoch that was resumed, there may be one left
            self.seconds_per_step = (self.starts[-1] - self.starts[0]) / steps
        if trainer.is_global_zero:
            Cost(
                seconds_per_step=self.seconds_per_step,
                peak_memory_mib=peak_memory(model.device),
                parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
                device=model.device.type,
            ).write(self.folder)

    def state_dict(self) -> dict[str, Any]:
        return {"seconds_per_step": self.seconds_per_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seconds_per_step = state["seconds_per_step"]


def _run(folder: Path) -> None:
    task = Task.read(folder)
    config = OmegaConf.create(task.config)
    trained = None
    if "reference" in config:
        result = _look_at(config, task.evaluations)
    else:
        trained = _pretrain(task, folder)
        assert trained.checkpoint is not None  # the benchmark turns checkpoints on
        if torch.distributed.is_initialized():  # the other processes have gone: nothing to wait for
            torch.distributed.destroy_process_group()
        metrics, chosen = _evaluate(trained.checkpoint, task.evaluations, config)
        result = Result(
            metrics=metrics,
            chosen=chosen,
            logged=trained.metrics,
            curve=_curve(trained.folder),
            seconds_per_epoch=trained.seconds_per_epoch,
            **dict(Cost.read(folder)),
        )
    versions = {
        **{name: version_of(name) for name in PACKAGES},
        "python": platform.python_version(),
    }
    where = {"epochs": config.max_epochs, "commit": _commit(), "versions": versions}
    result.model_copy(update=where).write(folder)
    if trained is not None and not task.keep_checkpoints:
        for checkpoint in trained.folder.glob("*.ckpt"):
            checkpoint.unlink()


def _pretrain(task: Task, folder: Path) -> FitResult:
    cfg = OmegaConf.create(task.config)
    return pretrain_run(cfg, reuse_finished=True, callbacks=(Measure(folder),))


def _look_at(config: Any, names: list[str]) -> Result:
    """What a reference is worth, without training: an untrained backbone, or the pixels."""
    if config.reference == "random":
        pl.seed_everything(config.seed)
        backbone = build_backbone(config)
    else:
        backbone = Pixels()
    device = _device(config)
    if config.data.get("no_labels", False):
        loader = split_loader("train", config, num_workers=config.data.num_workers, labelled=False)
        features, _ = extract_features(backbone, loader, device)
        metrics, chosen = _label_free(names, features, None), dict[str, float]()
    else:
        metrics, chosen = _accuracies(names, *_features(backbone, config, device))
    parameters = sum(p.numel() for p in backbone.parameters())
    return Result(metrics=metrics, chosen=chosen, parameters=parameters, device=device)


class Pixels(nn.Module):
    """The image itself as its features; of a large one, means of 32 × 32 parts."""

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-1] > LARGEST_RAW:
            images = nn.functional.adaptive_avg_pool2d(images, 32)
        return images.flatten(1)


def _device(config: Any) -> str:
    return "cpu" if config.get("accelerator") == "cpu" else pick_device("auto")


def _features(backbone: nn.Module, config: Any, device: str) -> list[Tensor]:
    """Features and labels of the training images, and of the validation images."""
    transform = evaluation_transform(config)
    found: list[Tensor] = []
    for dataset in classification_datasets(config, transform, transform):
        loader = plain_loader(dataset, 256, workers_of(config))
        found += extract_features(backbone, loader, device)
    return found


def _evaluate(
    checkpoint: Path, names: list[str], config: Any
) -> tuple[dict[str, float], dict[str, float]]:
    """Accuracies in percent; of a method with a mask, also those of the features without it."""
    backbone, read = load_backbone(checkpoint, masked=False)
    assert read.config is not None
    if read.config.data.get("no_labels", False):
        loader = split_loader(
            "train", read.config, num_workers=read.config.data.num_workers, labelled=False
        )
        unlabelled, _ = extract_features(backbone, loader, _device(config))
        return _label_free(names, unlabelled, read.mask), {}
    features = _features(backbone, read.config, _device(config))
    plain, plain_chosen = _accuracies(names, *features)
    if read.mask is None:
        return plain, plain_chosen
    train, train_labels, val, val_labels = features
    masked = train * read.mask, train_labels, val * read.mask, val_labels
    found, chosen = _accuracies(names, *masked)
    found |= {f"{name}_plain": value for name, value in plain.items()}
    return found, chosen | {f"{name}_plain": value for name, value in plain_chosen.items()}


def _accuracies(names: list[str], *features: Tensor) -> tuple[dict[str, float], dict[str, float]]:
    """Accuracies in percent, and what an evaluation chose on the training images for it."""
    train, train_labels, val, val_labels = features
    accuracies, chosen = {}, {}
    if "knn" in names:
        accuracies["knn"], _ = knn_accuracy(train, train_labels, val, val_labels)
    accuracies |= _label_free(names, train, None)
    if "linear" in names:
        probe = linear_probe(train, train_labels, val, val_labels)
        accuracies["linear"], chosen["linear"] = probe.accuracy, probe.c
    return accuracies, chosen


def _label_free(names: list[str], features: Tensor, mask: Tensor | None) -> dict[str, float]:
    """RankMe of the masked features where there is a mask, beside that of the plain ones."""
    if "rankme" not in names:
        return {}
    second = second_moments(features)
    plain = effective_rank(second)
    if mask is None:
        return {"rankme": plain}
    m = mask.double()
    return {"rankme": effective_rank(second * m * m[:, None]), "rankme_plain": plain}


def _curve(folder: Path) -> list[tuple[int, float]]:
    """Epoch (from 1) and accuracy in percent of the kNN that solo-learn evaluates on the way."""
    rows = [row for row in read_metrics(folder) if row.get(ONLINE_KNN)]
    return [(int(row["epoch"]) + 1, float(row[ONLINE_KNN])) for row in rows]


def _commit() -> str | None:
    """The commit of the project, where it is used from a clone."""
    root = Path(metamask_solo.__file__).parents[1]
    if not (root / ".git").exists():  # installed: a repository around it would be another one
        return None
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone, however that ended.

    Standard input is a pipe that nobody writes to: it is at its end when the parent is. The last
    checkpoint of a whole epoch is what a run goes on from: after one in the middle of an epoch,
    the averages that are logged for that epoch would be those of its rest.
    """

    def wait() -> None:
        while os.read(0, 1024):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
