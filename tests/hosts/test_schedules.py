"""The rates that a run logs are those of a plain computation, on both releases."""

import csv
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from runs import pretrain_config, train

from metamask_solo.errors import UserError
from metamask_solo.training.pretraining import check_run

SIMCLR = {"proj_hidden_dim": 16, "proj_output_dim": 8, "temperature": 0.2}
EPOCHS, PER_EPOCH = 3, 2  # 20 images, batches of 10
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.5, "nesterov": True},
    "lars": {"eta": 0.02, "exclude_bias_n_norm": True},
    "adam": {"betas": [0.8, 0.9]},
    "adamw": {},
}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "none": {},
    "cosine": {"min_lr": 0.01},
    "cosine by epochs": {"name": "cosine", "interval": "epoch"},
    "warmup_cosine": {"warmup_epochs": 1, "warmup_start_lr": 0.003},
    "warmup of half an epoch": {"name": "warmup_cosine", "warmup_epochs": 1.25},
    "no warm-up": {"name": "warmup_cosine", "warmup_epochs": 0},
    "step": {"lr_decay_steps": [1, 2]},
}


def expected(scheduler: dict[str, Any], base: float, epochs: int, per_epoch: int) -> list[float]:
    """The rate at each step, written down from the meaning of the keys."""
    by_step = scheduler.get("interval", "step") == "step"
    rates = []
    for step in range(epochs * per_epoch):
        now, end = (step, epochs * per_epoch) if by_step else (step // per_epoch, epochs)
        warm = 0.0
        if scheduler["name"] == "warmup_cosine":
            warm = scheduler["warmup_epochs"] * (per_epoch if by_step else 1)
        if scheduler["name"] == "none":
            rates.append(base)
        elif scheduler["name"] == "step":
            milestones = [m for m in scheduler["lr_decay_steps"] if m <= step // per_epoch]
            rates.append(base / 10 ** len(milestones))
        elif now < warm:
            start = scheduler.get("warmup_start_lr", 3e-5)
            rates.append(start + (base - start) * min(now / max(warm - 1, 1), 1))
        else:
            least = scheduler.get("min_lr", 0.0)
            cosine = math.cos(math.pi * (now - warm) / max(end - warm, 1))
            rates.append(least + (base - least) * (1 + cosine) / 2)
    return rates


def logged(folder: Path, column: str) -> list[float]:
    with (folder / "metrics.csv").open() as file:
        return [float(row[column]) for row in csv.DictReader(file) if row[column]]


def check_rates(
    images: Path,
    out: Path,
    method: str,
    optimizer: str,
    scheduler: str,
    epochs: int = EPOCHS,
    **more: Any,
) -> None:
    """Trains, and compares the logged rates of the backbone and of the classifier."""
    cfg = pretrain_config(images, out, method, max_epochs=EPOCHS, log_every_n_steps=1, **more)
    if method == "simclr":
        cfg.method_kwargs = SIMCLR
    else:
        cfg.method_kwargs.meta = {"trial_lr": 0.1}
    settings = {"name": scheduler, "warmup_start_lr": 3e-5, **SCHEDULERS[scheduler]}
    cfg.optimizer.update({"name": optimizer, "lr": 2.56, "kwargs": OPTIMIZERS[optimizer]})
    cfg.scheduler = settings
    _, fit = train(cfg)
    header = (fit.folder / "metrics.csv").read_text().splitlines()[0].split(",")
    # solo-learn scales the rates of pretraining by the batches of a step
    factor = cfg.get("accumulate_grad_batches", 1)
    for group, lr in {
        ("coder", "backbone"): 2.56 * 10 / 256,
        ("classifier",): 0.1 * 10 / 256,
    }.items():
        (column,) = (c for c in header if c.startswith("lr-") and c.endswith(group))
        scaled = {k: v * factor if k.endswith("_lr") else v for k, v in settings.items()}
        wanted = expected(scaled, lr * factor, epochs, PER_EPOCH // factor)
        assert logged(fit.folder, column) == pytest.approx(wanted, rel=1e-12, abs=1e-15), group


QUICK = [("sgd", name) for name in SCHEDULERS]
QUICK += [(name, "warmup_cosine") for name in OPTIMIZERS if name != "sgd"]
FULL = [(o, s) for o in OPTIMIZERS for s in SCHEDULERS if (o, s) not in QUICK]


@pytest.mark.parametrize(
    "optimizer, scheduler",
    [*QUICK, *(pytest.param(*pair, marks=pytest.mark.soak) for pair in FULL)],
)
def test_the_rates_are_those_of_the_formula(
    optimizer: str, scheduler: str, images: Path, tmp_path: Path
) -> None:
    check_rates(images, tmp_path, "simclr", optimizer, scheduler)


@pytest.mark.parametrize(
    "precision, optimizer, scheduler",
    [
        ("32-true", "adamw", "cosine"),
        ("64-true", "sgd", "warmup_cosine"),
        ("bf16-mixed", "lars", "no warm-up"),
        *(
            pytest.param(*case, marks=pytest.mark.soak)
            for case in itertools.product(("32-true", "bf16-mixed"), OPTIMIZERS, SCHEDULERS)
        ),
    ],
)
def test_the_rates_of_metamask_in_each_precision(
    precision: str, optimizer: str, scheduler: str, images: Path, tmp_path: Path
) -> None:
    check_rates(images, tmp_path, "metamask", optimizer, scheduler, precision=precision)


@pytest.mark.parametrize("scheduler", ["warmup_cosine", "cosine by epochs", "step"])
def test_accumulated_batches_make_fewer_steps(scheduler: str, images: Path, tmp_path: Path) -> None:
    check_rates(images, tmp_path, "simclr", "sgd", scheduler, accumulate_grad_batches=2)


@pytest.mark.parametrize("limit", [{"limit_train_batches": 1}, {"max_steps": 4}])
def test_a_schedule_ends_with_the_run(limit: dict[str, int], images: Path, tmp_path: Path) -> None:
    cfg = pretrain_config(images, tmp_path, "simclr", max_epochs=4, log_every_n_steps=1, **limit)
    cfg.method_kwargs = SIMCLR
    cfg.optimizer.lr = 25.6
    cfg.scheduler = {"name": "cosine"}
    _, fit = train(cfg)
    header = (fit.folder / "metrics.csv").read_text().splitlines()[0].split(",")
    (column,) = (c for c in header if c.startswith("lr-") and c.endswith(("coder", "backbone")))
    wanted = [(1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert logged(fit.folder, column) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    "override, message",
    [
        ({"scheduler.name": "exponential"}, "scheduler.name=exponential: allowed are none"),
        ({"scheduler.name": "linear"}, "scheduler.name=linear: allowed are none"),
        (
            {"scheduler.warmup_epoch": 3},
            "scheduler.warmup_epoch=3: unknown; did you mean warmup_ep",
        ),
        ({"scheduler.interval": "batch"}, "scheduler.interval=batch: must be step or epoch"),
        ({"optimizer.momentum": 0.9}, "optimizer.momentum=0.9: unknown"),
        ({"optimizer.kwargs": {"nestrov": True}}, "nestrov=True: unknown; did you mean nesterov"),
        ({"optimizer.kwargs": {"eta": 0.1}}, "optimizer.kwargs.eta=0.1: unknown"),
        ({"optimizer.layer_decay": 0.5}, "optimizer.layer_decay=0.5: unknown"),
        ({"optimizer.kwargs": {"nesterov": True, "dampening": 0.5}}, "optimizer.kwargs="),
        ({"optimizer.name": "adam", "optimizer.kwargs": {"betas": [2, 0.9]}}, "optimizer.kwargs="),
    ],
)
def test_what_no_release_reads_is_refused(
    override: dict[str, Any], message: str, images: Path, tmp_path: Path
) -> None:
    cfg = pretrain_config(images, tmp_path, "simclr", **override)
    cfg.method_kwargs = SIMCLR
    with pytest.raises(UserError, match=message) as error:
        check_run(cfg)
    assert "\n" not in str(error.value)
