"""The rates that a run logs are those of a plain computation, on both releases."""

import csv
import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from runs import pretrain_config, train
from torch.utils.data import DataLoader

from metamask_solo import hosts
from metamask_solo.errors import UserError
from metamask_solo.hosts.optimization import configure_like, plan_of
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


def logged(folder: Path, groups: tuple[str, ...]) -> list[float]:
    """The rate of each step of a parameter group, as metrics.csv has it."""
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    (column,) = (c for c in rows[0] if c.startswith("lr-") and c.endswith(groups))
    # accumulated batches are logged one by one
    return list({row["step"]: float(row[column]) for row in rows if row[column]}.values())


BACKBONE, CLASSIFIER = ("/encoder", "/backbone"), ("/classifier",)


def check_rates(
    images: Path,
    out: Path,
    method: str,
    optimizer: str,
    scheduler: str,
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
    # solo-learn scales the rates of pretraining by the batches of a step
    factor = cfg.get("accumulate_grad_batches", 1)
    for group, lr in {BACKBONE: 2.56 * 10 / 256, CLASSIFIER: 0.1 * 10 / 256}.items():
        scaled = {k: v * factor if k.endswith("_lr") else v for k, v in settings.items()}
        wanted = expected(scaled, lr * factor, EPOCHS, PER_EPOCH // factor)
        assert logged(fit.folder, group) == pytest.approx(wanted, rel=1e-12, abs=1e-15), group


class Toy(hosts.pl.LightningModule):  # type: ignore[name-defined]
    """One layer with two groups, that notes the rates of each optimiser step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 3)
        self.rates: list[list[float]] = []

    def groups(self) -> list[dict[str, Any]]:
        weight, bias = self.layer.parameters()
        return [{"params": [weight]}, {"params": [bias], "lr": 0.5, "static_lr": True}]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).square().mean()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.rates.append([group["lr"] for group in optimizer.param_groups])


PRECISIONS = ("32-true", "64-true", "bf16-mixed", "bf16-true")


@pytest.mark.parametrize(
    "optimizer, scheduler, precision", list(product(OPTIMIZERS, SCHEDULERS, PRECISIONS))
)
def test_the_rates_of_all_combinations(optimizer: str, scheduler: str, precision: str) -> None:
    settings = {"name": scheduler, **SCHEDULERS[scheduler]}
    kwargs = OPTIMIZERS[optimizer]
    cfg = OmegaConf.create(
        {
            "optimizer": {"name": optimizer, "lr": 0.3, "weight_decay": 0.01, "kwargs": kwargs},
            "scheduler": settings,
            "max_epochs": EPOCHS,
        }
    )
    model = Toy()
    configure_like(model, plan_of(cfg, hosts.OPTIMIZERS[optimizer]), model.groups)
    trainer = hosts.pl.Trainer(
        accelerator="cpu",
        precision=precision,
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(torch.randn(2 * PER_EPOCH, 3), batch_size=2))
    first, second = zip(*model.rates, strict=True)
    assert first == pytest.approx(expected(settings, 0.3, EPOCHS, PER_EPOCH), rel=1e-12)
    assert set(second) == {0.5}


ALL = [pytest.param(*pair, marks=pytest.mark.soak) for pair in product(OPTIMIZERS, SCHEDULERS)]


@pytest.mark.parametrize("optimizer, scheduler", [("sgd", "no warm-up"), *ALL])
def test_the_logged_rates_of_simclr(
    optimizer: str, scheduler: str, images: Path, tmp_path: Path
) -> None:
    check_rates(images, tmp_path, "simclr", optimizer, scheduler)


@pytest.mark.parametrize(
    "precision, optimizer, scheduler",
    [
        ("bf16-mixed", "lars", "warmup_cosine"),
        *(
            pytest.param(*case, marks=pytest.mark.soak)
            for case in product(("32-true", "bf16-mixed"), OPTIMIZERS, SCHEDULERS)
        ),
    ],
)
def test_the_logged_rates_of_metamask_in_each_precision(
    precision: str, optimizer: str, scheduler: str, images: Path, tmp_path: Path
) -> None:
    check_rates(images, tmp_path, "metamask", optimizer, scheduler, precision=precision)


def test_accumulated_batches_make_fewer_steps(images: Path, tmp_path: Path) -> None:
    check_rates(images, tmp_path, "simclr", "sgd", "warmup_cosine", accumulate_grad_batches=2)


@pytest.mark.parametrize("limit", [{"limit_train_batches": 1}, {"max_steps": 4}])
def test_a_schedule_ends_with_the_run(limit: dict[str, int], images: Path, tmp_path: Path) -> None:
    cfg = pretrain_config(images, tmp_path, "simclr", max_epochs=4, log_every_n_steps=1, **limit)
    cfg.method_kwargs = SIMCLR
    cfg.optimizer.lr = 25.6
    cfg.scheduler = {"name": "cosine"}
    _, fit = train(cfg)
    wanted = [(1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert logged(fit.folder, BACKBONE) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    "override, message",
    [
        ({"scheduler.name": "exponential"}, "scheduler.name=exponential: must be one of none"),
        ({"scheduler.name": "linear"}, "scheduler.name=linear: must be one of none"),
        (
            {"scheduler.warmup_epoch": 3},
            "scheduler.warmup_epoch: unknown setting; did you mean scheduler.warmup_epochs",
        ),
        ({"scheduler.interval": "batch"}, "scheduler.interval=batch: must be one of step, epoch"),
        ({"optimizer.momentum": 0.9}, "optimizer.momentum: unknown"),
        (
            {"optimizer.kwargs": {"nestrov": True}},
            "nestrov: unknown setting; did you mean optimizer.kwargs.nesterov",
        ),
        ({"optimizer.kwargs": {"eta": 0.1}}, "optimizer.kwargs.eta: unknown"),
        ({"optimizer.layer_decay": 0.5}, "optimizer.layer_decay: unknown"),
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
