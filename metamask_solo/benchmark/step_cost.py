"""Times and memory of single training steps, for ``metamask-solo step-cost``."""

import contextlib
import copy
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from metamask_solo.errors import UserError
from metamask_solo.hosts import build_method, complete_pretrain_config
from metamask_solo.method.losses import nt_xent
from metamask_solo.training.config import read_pretraining_config
from metamask_solo.training.endings import scripts_folder
from metamask_solo.training.hydra_app import compose_file
from metamask_solo.training.trainer import quiet

FILE = "pretrain/cifar/metamask.yaml"
# the overrides of that file that each variant is
VARIANTS = {
    "simclr": ["method_kwargs=simclr"],
    "barlow_twins": ["method_kwargs=barlow"],
    "joint": ["method_kwargs.meta.enabled=False"],
    **{
        way: [f"method_kwargs.meta.hypergradient={way}"]
        for way in ("exact", "double_backward", "finite_difference", "first_order", "plain")
    },
    "heads": ["variant=heads"],
    "fast": ["variant=fast"],
    "two_models": [],
}
DTYPES = {"bf16": torch.bfloat16, "16": torch.float16}
LR, MOMENTUM, DECAY = 1e-3, 0.9, 5e-4  # of the network's optimiser, and of the mask's


@dataclass(frozen=True)
class Setting:
    """What is timed: the network, the images, and where and in what precision it runs."""

    backbone: str = "resnet18"
    stem: str = "3x3"
    image_size: int = 32
    batch_size: int = 64
    device: str = "cpu"
    precision: str = "32"


def measure(
    setting: Setting, rounds: int, only: list[str] | None = None
) -> tuple[pd.DataFrame, "pd.Series[float]"]:
    """Times single steps.

    Args:
        only: these of ``VARIANTS``, and ``joint``.

    Returns:
        Seconds per step, with a row for each round and a column for each variant; and the peak
        memory of each in a process of its own, in MiB.

    Raises:
        UserError: the network cannot be built, or there is no such device.
    """
    try:
        torch.empty(1, device=setting.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device={setting.device}: not on this machine") from error
    names = [v for v in VARIANTS if only is None or v in only or v == "joint"]
    steps = {name: _step_of(setting, name) for name in names}
    memory = {name: _peak_memory(setting, name) for name in tqdm(names, desc="memory")}
    seconds = pd.DataFrame(columns=names, dtype=float)
    for number in tqdm(range(rounds + 1), desc="rounds"):
        for name, (step, period) in steps.items():
            start = time.perf_counter()
            for _ in range(period):
                step()
            seconds.loc[number, name] = (time.perf_counter() - start) / period
    return seconds[1:], pd.Series(memory)  # the first round warms up


def table(seconds: pd.DataFrame, memory: "pd.Series[float]") -> pd.DataFrame:
    """Median ratios to joint of the same round, their extremes, and peak memory."""
    ratios = seconds.div(seconds.joint, axis=0)
    columns = {"ratio": ratios.median(), "lowest": ratios.min(), "highest": ratios.max()}
    columns |= {"ms": (1000 * seconds.median()).round().astype(int)}
    columns |= {"MiB": memory.round().astype(int), "MiB ratio": memory / memory.joint}
    return pd.DataFrame(columns)


def _config(setting: Setting, variant: str) -> DictConfig:
    overrides = [
        *VARIANTS[variant],
        f"backbone.name={setting.backbone}",
        f"augmentations.0.crop_size={setting.image_size}",
        f"optimizer.batch_size={setting.batch_size}",
        "accelerator=cpu",
        "precision=32",
    ]
    if setting.backbone.startswith("resnet"):
        stem = "3x3" if setting.stem == "3x3" else "standard"
        overrides.append(f"backbone.stem={stem}")
    if variant not in ("simclr", "barlow_twins"):  # the optimiser of the plain algorithm
        settings = {"optimizer": "sgd", "lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY}
        overrides += [f"method_kwargs.mask.{key}={value}" for key, value in settings.items()]
        overrides.append("method_kwargs.scale_loss=0.1")
    cfg = read_pretraining_config(compose_file(scripts_folder() / FILE, overrides))
    return complete_pretrain_config(cfg)


def _step_of(setting: Setting, variant: str) -> tuple[Callable[[], None], int]:
    """One training step as Lightning runs it, without its bookkeeping, and the variant's period."""
    torch.manual_seed(0)
    device = torch.device(setting.device)
    with quiet():
        model: Any = build_method(_config(setting, variant)).to(device).train()
    groups = [{"params": list(group["params"])} for group in model.learnable_params]
    optimizer = torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM, weight_decay=DECAY)

    def precision() -> Any:
        if setting.precision == "32":
            return contextlib.nullcontext()
        return torch.autocast(device.type, DTYPES[setting.precision], cache_enabled=False)

    model.trainer = SimpleNamespace(
        optimizers=[optimizer],
        global_step=0,
        max_epochs=1,
        is_global_zero=False,  # what a run says of its settings is said of runs alone
        sanity_checking=False,
        estimated_stepping_batches=1000,
        precision_plugin=SimpleNamespace(precision=setting.precision, forward_context=precision),
    )
    model.log = model.log_dict = lambda *args, **kwargs: None
    shape = (setting.batch_size, 3, setting.image_size, setting.image_size)
    views = [torch.randn(shape, device=device) for _ in range(2)]
    labels = torch.arange(setting.batch_size, device=device)
    batch = (labels, views, labels % 10)
    model.on_train_start()
    update = _two_models_update(model, optimizer) if variant == "two_models" else None

    def closure() -> Tensor:
        with precision():
            loss: Tensor = model.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        return loss

    def step() -> None:
        if update is None:
            model.optimizer_step(0, 0, optimizer, closure)
        else:
            optimizer.step(closure)
            update(views)
        model.trainer.global_step += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return step, model.settings.meta.every_n_steps if hasattr(model, "mask") else 1


def _two_models_update(model: Any, optimizer: torch.optim.SGD) -> Callable[[list[Tensor]], None]:
    """The finite-difference algorithm as it is usually implemented: a second model, whole graphs.

    The yardstick for what the shared and graph-free passes of the package save.
    """
    twin = copy.deepcopy(torch.nn.ModuleDict({"f": model.backbone, "p": model.projector}))
    network = torch.nn.ModuleDict({"f": model.backbone, "p": model.projector})
    logits = torch.nn.Parameter(model.mask.logits.detach().clone())
    mask_optimizer = torch.optim.SGD([logits], lr=LR, momentum=MOMENTUM, weight_decay=DECAY)

    temperature = model.settings.temperature

    def loss_of(model: Any, views: list[Tensor]) -> Tensor:
        z = [model["p"](model["f"](x) * torch.sigmoid(logits)) for x in views]
        return nt_xent(z[0], z[1], temperature)

    def update(views: list[Tensor]) -> None:
        params = list(network.parameters())
        gradients = torch.autograd.grad(loss_of(network, views), params)
        with torch.no_grad():
            for p, q, g in zip(params, twin.parameters(), gradients, strict=True):
                buffer = optimizer.state[p]["momentum_buffer"]
                q.copy_(p - LR * (g + DECAY * p + MOMENTUM * buffer))
        *v, direct = torch.autograd.grad(loss_of(twin, views), [*twin.parameters(), logits])
        radius = 1e-2 / torch.cat([g.flatten() for g in v]).norm()
        sides = []
        for factor in (1, -2):
            with torch.no_grad():
                for p, g in zip(params, v, strict=True):
                    p.add_(g, alpha=float(factor * radius))
            sides.append(torch.autograd.grad(loss_of(network, views), logits)[0])
        with torch.no_grad():
            for p, g in zip(params, v, strict=True):
                p.add_(g, alpha=float(radius))
        logits.grad = direct - LR * (sides[0] - sides[1]) / (2 * radius)
        mask_optimizer.step()

    return update


def peak_memory(device: torch.device) -> float:
    """MiB: of the GPU what was allocated, else what this process had in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:  # getrusage would count what the parent had, too
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 2**10
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _peak_memory(setting: Setting, variant: str) -> float:
    """Peak memory of two steps (or one period) in a fresh process, in MiB."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak_memory_here, (setting, variant, torch.get_num_threads()))


def _peak_memory_here(setting: Setting, variant: str, threads: int) -> float:
    torch.set_num_threads(threads)
    step, period = _step_of(setting, variant)
    for _ in range(max(2, period)):
        step()
    return peak_memory(torch.device(setting.device))
