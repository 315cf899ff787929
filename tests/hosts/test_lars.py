"""LARS: one file, one optimiser, on both releases, in each kind of training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from runs import pretrain_config
from torch import Tensor, nn
from torch.utils.data import DataLoader

from metamask_solo import hosts
from metamask_solo.training.config_checks import check_linear_config, check_pretrain_config

STEPS = 3
SIMCLR = {"proj_hidden_dim": 16, "proj_output_dim": 8, "temperature": 0.2}


class Recorder(hosts.pl.Callback):  # type: ignore[name-defined]
    """Weights and gradients before each optimiser step, and the weights after the last."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, model: Any, optimizer: Any) -> None:
        self.weights.append(copy(model.named_parameters()))
        self.gradients.append(
            copy((n, p.grad) for n, p in model.named_parameters() if p.grad is not None)
        )

    def on_train_end(self, trainer: Any, model: Any) -> None:
        self.weights.append(copy(model.named_parameters()))


def copy(tensors: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors}


def three_steps(
    weight: Tensor, gradients: list[Tensor], rates: list[float], decay: float, lars: Any
) -> Tensor:
    """Equation 6 of the paper and SGD's momentum, written down once more."""
    buffer = torch.zeros_like(weight)
    for gradient, rate in zip(gradients, rates, strict=True):
        w, g = (float((t**2).sum().sqrt()) for t in (weight, gradient))
        direction = gradient
        if w > 0 and g > 0 and not (lars["exclude_bias_n_norm"] and weight.dim() == 1):
            trust = lars["eta"] * w / (g + decay * w + lars.get("eps", 1e-8))
            if lars["clip_lr"]:
                trust = min(trust / rate, 1.0)
            direction = trust * (gradient + decay * weight)
        buffer = lars["momentum"] * buffer + direction
        step = direction + lars["momentum"] * buffer if lars.get("nesterov") else buffer
        weight = weight - rate * step
    return weight


def fit(model: Any, batches: Any, accumulate: int = 1) -> Recorder:
    recorder = Recorder()
    trainer = hosts.pl.Trainer(
        accelerator="cpu",
        precision="64-true",
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        callbacks=[recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(batches, batch_size=None))
    assert trainer.global_step == STEPS
    return recorder


def check(recorder: Recorder, lr: dict[str, float], decay: float, lars: Any) -> None:
    """Compares each trained weight; ``lr`` maps the start of a name to its rate."""
    for name, start in recorder.weights[0].items():
        if name not in recorder.gradients[0]:
            continue
        own = next((part for part in lr if part and name.startswith(part)), "")
        rates = [lr[own]] * STEPS
        gradients = [g[name] for g in recorder.gradients]
        # solo-learn's own classifier has no weight decay
        wanted = three_steps(start, gradients, rates, 0.0 if own == "classifier" else decay, lars)
        torch.testing.assert_close(recorder.weights[-1][name], wanted, rtol=1e-12, atol=1e-12)
        if own == "":
            moved = recorder.weights[-1][name] - start
            sgd = three_steps(start, gradients, rates, 0.0, {**lars, "exclude_bias_n_norm": True})
            if start.dim() > 1:
                assert (sgd - start - moved).abs().max() > 1e-9, f"{name} took a step of SGD"


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"eta": 0.02, "exclude_bias_n_norm": True},
        {"eta": 0.1, "clip_lr": True, "momentum": 0.5, "eps": 1e-3},
        {"nesterov": True},
    ],
)
def test_pretraining_takes_the_steps_of_the_formula(
    kwargs: dict[str, Any], accumulate: int, images: Path, tmp_path: Path
) -> None:
    cfg = pretrain_config(images, tmp_path, "simclr")
    cfg.method_kwargs = SIMCLR
    cfg.optimizer.update({"name": "lars", "lr": 25.6, "weight_decay": 1e-2, "kwargs": kwargs})
    cfg.accumulate_grad_batches = accumulate
    check_pretrain_config(cfg)
    cfg = hosts.complete_pretrain_config(cfg)
    torch.manual_seed(0)
    model = hosts.build_method(cfg)
    views = torch.randn(STEPS * accumulate, 2, 10, 3, 32, 32, dtype=torch.float64)
    batches = [(torch.arange(10), list(pair), torch.arange(10) % 5) for pair in views]
    recorder = fit(model, batches, accumulate)
    # solo-learn scales rates by the batch size (10 of 256), and by the accumulation
    lr = {"": 1.0 * accumulate, "classifier": 0.1 * 10 / 256 * accumulate}
    lars = {"eta": 1e-3, "momentum": 0.9, "clip_lr": False, "exclude_bias_n_norm": False, **kwargs}
    check(recorder, lr, 1e-2, lars)


class Network(nn.Module):
    """A small network in the place of a backbone."""

    num_features = 6

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.BatchNorm1d(6), nn.Tanh())

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


@pytest.mark.parametrize("finetune", [False, True])
def test_linear_training_takes_the_steps_of_the_formula(finetune: bool, images: Path) -> None:
    kwargs = {"eta": 0.02, "exclude_bias_n_norm": True}
    cfg: DictConfig = OmegaConf.create(
        {
            "name": "probe",
            "backbone": {"name": "resnet18"},
            "pretrained_feature_extractor": "some.ckpt",
            "data": {
                "dataset": "custom",
                "train_path": str(images / "train"),
                "val_path": str(images / "val"),
            },
            "optimizer": {"name": "lars", "batch_size": 8, "lr": 32.0, "weight_decay": 1e-2},
            "scheduler": {"name": "none"},
            "finetune": finetune,
            "max_epochs": 1,
            "devices": 1,
        }
    )
    OmegaConf.set_struct(cfg, False)
    cfg.optimizer.kwargs = kwargs
    check_linear_config(cfg)
    cfg = hosts.complete_linear_config(cfg)
    torch.manual_seed(0)
    model = hosts.build_linear(Network().train(finetune), cfg)
    batches = [(x, torch.arange(8) % 5) for x in torch.randn(STEPS, 8, 3, 4, 4).double()]
    recorder = fit(model, batches)
    trained = {name.split(".")[0] for name in recorder.gradients[0]}
    assert trained == ({"backbone", "classifier"} if finetune else {"classifier"})
    lars = {"momentum": 0.9, "clip_lr": False, **kwargs}
    check(recorder, {"": 1.0}, 1e-2, lars)
