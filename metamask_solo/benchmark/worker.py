"""One run of a benchmark, in a process of its own: ``python -m metamask_solo.benchmark.worker``.

Its argument is the run's folder, which holds run.json; the process adds result.json at the end.
"""

import contextlib
import io
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from omegaconf import OmegaConf
from torch import Tensor, nn

import metamask_solo
from metamask_solo.benchmark.results import RESULT, TASK, VERSIONS, read_json, write_json
from metamask_solo.benchmark.schema import LABEL_FREE, NAMES
from metamask_solo.benchmark.step_cost import peak_memory
from metamask_solo.checkpoints.reading import load_backbone
from metamask_solo.data.datasets import say
from metamask_solo.data.loaders import (
    classification_dataset,
    classification_datasets,
    has_labels,
    plain_loader,
)
from metamask_solo.data.split import SPLITS
from metamask_solo.data.transforms import evaluation_transform
from metamask_solo.errors import RunStopped, UserError
from metamask_solo.evaluation.features import (
    extract_features,
    imbalance_note,
    percent,
    rankme,
)
from metamask_solo.evaluation.knn import knn_hits
from metamask_solo.evaluation.linear import linear_probe
from metamask_solo.hosts import build_backbone, pl
from metamask_solo.training.pretrain import pretrain_run
from metamask_solo.training.resume import FitResult, read_metrics
from metamask_solo.training.sampling import device_of
from metamask_solo.training.trainer import quiet
from metamask_solo.versions import version_of

ONLINE_KNN = "val_knn_acc1"
LARGEST_RAW = 64  # pixels a side


def main(argv: list[str]) -> int:
    """Pretrains and evaluates; the exit codes are those of the commands."""
    folder = Path(argv[0])
    task: Any = read_json(folder / TASK)
    try:
        if int(os.environ.get("LOCAL_RANK", 0)) > 0:  # a further process of DDP
            _pretrain(OmegaConf.create(task["config"]))
            return 0
        # waits until no other process works on this run; a killed process holds nothing
        with FileLock(folder / "lock"), quiet():
            if not (folder / RESULT).exists():
                write_json(folder / RESULT, _run(task["config"], task["evaluations"]))
                if not task["keep_checkpoints"]:
                    for path in folder.rglob("*.ckpt"):
                        path.unlink()
    except (UserError, RunStopped) as error:
        print(f"error: {error}", flush=True)
        return error.exit_code if isinstance(error, RunStopped) else 2
    return 0


class Costs(pl.Callback):  # type: ignore[name-defined]
    """Keeps what training costs, in the checkpoints too.

    A step lasts from the start of one batch to the start of the next: reading the data and
    MetaMask's mask update included, validation not. It is the median of the means of the epochs,
    since not every step updates the mask. What an epoch takes beyond its steps, such as validation
    and saving, is that of the last but one.
    """

    def __init__(self) -> None:
        self.starts: list[float] = []  # of this epoch
        self.steps: list[float] = []  # of this epoch, in seconds
        self.means: list[float] = []  # of all epochs
        self.validated = False
        self.costs: dict[str, Any] = {"seconds_per_step": None, "seconds_between_epochs": None}

    def on_train_epoch_start(self, trainer: Any, model: Any) -> None:
        if self.steps:
            whole = time.perf_counter() - self.starts[0]
            between = whole - self.means[-1] * len(self.starts)
            self.costs["seconds_between_epochs"] = max(0.0, between)
        self.starts, self.steps = [], []

    def on_train_batch_start(self, trainer: Any, model: Any, batch: Any, batch_idx: int) -> None:
        if model.device.type == "cuda" and (not self.starts or trainer.is_last_batch):
            torch.cuda.synchronize(model.device)  # steps that wait for the GPU have not ended
        start = time.perf_counter()
        if self.starts and not self.validated:
            self.steps.append(start - self.starts[-1])
        self.starts.append(start)
        self.validated = False

    def on_validation_end(self, trainer: Any, model: Any) -> None:
        self.validated = True

    def on_train_epoch_end(self, trainer: Any, model: Any) -> None:
        if self.steps:  # of an epoch that was resumed, there may be one batch left
            self.means.append(float(np.mean(self.steps)))
            self.costs["seconds_per_step"] = float(np.median(self.means))
        self.costs |= {
            "peak_memory_mib": peak_memory(model.device),
            "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "device": model.device.type,
            "batches": len(trainer.train_dataloader),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"costs": self.costs, "means": self.means}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.costs, self.means = state["costs"], state["means"]


def _run(config: Any, evaluations: list[str]) -> dict[str, Any]:
    config = OmegaConf.create(config)
    result: dict[str, Any] = {"epochs": config.max_epochs, "commit": _commit()}
    result |= {name: version_of(name) for name in VERSIONS if name != "python"}
    result["python"] = platform.python_version()
    if "untrained" in config:
        backbone = _untrained(config)
        result |= _measured(evaluations, backbone, config)
        parameters = sum(p.numel() for p in backbone.parameters())
        device = torch.device(device_of(config)).type
        return {**result, "parameters": parameters, "device": device}
    trained = _pretrain(config)
    assert trained.checkpoint is not None  # the benchmark turns checkpoints on
    if torch.distributed.is_initialized():  # the other processes have gone: nothing to wait for
        torch.distributed.destroy_process_group()
    backbone, checkpoint = load_backbone(trained.checkpoint, masked=False)
    result |= _measured(evaluations, backbone, checkpoint.config, checkpoint.mask)
    result |= {"seconds_per_epoch": trained.seconds_per_epoch, "curve": _curve(trained.folder)}
    result |= checkpoint.raw["callbacks"][Costs.__qualname__]["costs"]
    result |= {f"logged/{name}": value for name, value in trained.metrics.items()}
    return result


def _pretrain(config: Any) -> FitResult:
    return pretrain_run(config, reuse_finished=True, callbacks=(Costs(),))


def _untrained(config: Any) -> nn.Module:
    """An untrained backbone, or the pixels."""
    if config.untrained == "pixels":
        return Pixels()
    pl.seed_everything(config.seed)
    return build_backbone(config)


class Pixels(nn.Module):
    """The image itself as its features; of a large one, means of 32 × 32 parts."""

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-1] > LARGEST_RAW:
            images = nn.functional.adaptive_avg_pool2d(images, 32)
        return images.flatten(1)


def _measured(
    names: list[str], backbone: nn.Module, config: Any, mask: Tensor | None = None
) -> dict[str, Any]:
    """What is measured, and what is said then (``notes``).

    Of a method with a mask, ``…_plain`` is of the features without it.
    """
    if not names:
        return {}
    device, workers = device_of(config), config.data.num_workers
    transform = evaluation_transform(config)
    if has_labels(config):
        datasets = [*classification_datasets(config, transform, transform)]
    else:
        datasets = [classification_dataset(config, "train", transform, labels=False)]
    loaders = [plain_loader(dataset, 256, workers) for dataset in datasets]
    measured: dict[str, Any] = {}
    with contextlib.redirect_stderr(io.StringIO()) as said:
        splits = [extract_features(backbone, loader, device) for loader in loaders]
        if mask is not None:
            plain = _accuracies(names, splits, ", no mask")
            titles = {"linear_C": "linear_plain_C"}
            measured = {titles.get(name, f"{name}_plain"): plain[name] for name in plain}
            splits = [(features * mask, labels) for features, labels in splits]
        measured |= _accuracies(names, splits)
    print(said.getvalue(), end="", file=sys.stderr)
    lines = dict.fromkeys(said.getvalue().splitlines())
    if notes := [line.removeprefix("note: ") for line in lines if line.startswith("note: ")]:
        measured["notes"] = "; ".join(notes)
    images = {f"{side}_images": len(split[0]) for side, split in zip(SPLITS, splits, strict=False)}
    return measured | images


def _accuracies(
    names: list[str], splits: list[tuple[Tensor, Tensor]], kind: str = ""
) -> dict[str, float]:
    """Accuracies in percent, RankMe, and the C that the linear probe chose."""
    tensors: Any = [tensor for split in splits for tensor in split]
    measured = {}
    if "knn" in names:
        measured["knn"] = percent(knn_hits(*tensors)[0])
    if "rankme" in names:
        measured["rankme"] = rankme(tensors[0])
    if "linear" in names:
        correct, c = linear_probe(*tensors)
        measured |= {"linear": percent(correct), "linear_C": c}
    for name in (name for name in names if name not in LABEL_FREE):
        if (note := imbalance_note(measured[name], tensors[1], tensors[3])) is not None:
            say(f"{NAMES[name]}{kind}: {note}")
    return measured


def _curve(folder: Path) -> str:
    """EPOCH:ACCURACY (from 1, in percent) of the kNN that solo-learn evaluates on the way."""
    table = read_metrics(folder)
    if ONLINE_KNN not in table:
        return ""
    rows = table.dropna(subset=ONLINE_KNN).drop_duplicates("epoch", keep="last")
    return " ".join(
        f"{int(e) + 1}:{knn}" for e, knn in zip(rows["epoch"], rows[ONLINE_KNN], strict=True)
    )


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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
