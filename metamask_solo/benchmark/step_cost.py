"""Times and memory of single training steps, for ``metamask-solo step-cost``."""

import contextlib
import copy
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from tqdm import tqdm

from metamask_solo.errors import UserError
from metamask_solo.hosts import RELEASE, backbone_names, build_method
from metamask_solo.method.losses import nt_xent

# method_kwargs.meta of each way to update the mask; "fast" is variant=fast of the files
META: dict[str, dict[str, Any]] = {
    "joint": {"enabled": False},
    "exact": {"hypergradient": "exact"},
    "double_backward": {"hypergradient": "double_backward"},
    "finite_difference": {"hypergradient": "finite_difference"},
    "first_order": {"hypergradient": "first_order"},
    "plain": {"hypergradient": "plain"},
    "heads": {"trial_scope": "heads"},
    "fast": {"every_n_steps": 4, "batch_fraction": 0.5},
}
VARIANTS = ("simclr", "barlow_twins", *META, "two_models")
DTYPES = {"bf16": torch.bfloat16, "16": torch.float16}


@dataclass(frozen=True)
class Setting:
    """What is timed: the network, the images, and where and in what precision it runs."""

    backbone: str = "resnet18"
    stem: str = "3x3"
    image_size: int = 32
    batch_size: int = 64
    device: str = "cpu"
    precision: str = "32"


@dataclass(frozen=True)
class Costs:
    """Seconds per step of each variant in each round, and its peak memory."""

    setting: Setting
    machine: str
    versions: dict[str, str]
    seconds: dict[str, list[float]]
    memory_mib: dict[str, float]


def measure(setting: Setting, rounds: int, only: list[str] | None = None) -> Costs:
    """Seconds per step of each variant in each round, and its peak memory in a process of its own.

    Raises:
        UserError: an unknown backbone, device or variant, or a number out of range.
    """
    _check(setting, rounds, only)
    names = [v for v in VARIANTS if only is None or v in only or v == "joint"]
    memory = {name: _peak_memory(setting, name) for name in tqdm(names, desc="memory")}
    steps = {name: _step_of(setting, name) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for counted in tqdm([False] + [True] * rounds, desc="rounds"):
        for name, (step, period) in steps.items():
            start = time.perf_counter()
            for _ in range(period):
                step()
            if counted:
                seconds[name].append((time.perf_counter() - start) / period)
    return Costs(
        setting=setting,
        machine=f"{platform.machine()}, {torch.get_num_threads()} threads",
        versions={"torch": torch.__version__, "solo-learn": RELEASE},
        seconds=seconds,
        memory_mib=memory,
    )


def table(report: Costs) -> str:
    """Median ratios to joint of the same round, their extremes, and peak memory."""
    joint, memory = report.seconds["joint"], report.memory_mib
    lines = [
        f"{'step':<18} {'ratio':>6} {'lowest':>7} {'highest':>8} {'ms':>8} {'MiB':>7} {'ratio':>6}"
    ]
    for name, seconds in report.seconds.items():
        ratios = [s / j for s, j in zip(seconds, joint, strict=True)]
        lines.append(
            f"{name:<18} {statistics.median(ratios):>6.2f} {min(ratios):>7.2f} {max(ratios):>8.2f} "
            f"{1000 * statistics.median(seconds):>8.0f} {memory[name]:>7.0f} "
            f"{memory[name] / memory['joint']:>6.2f}"
        )
    return "\n".join(lines)


def _check(setting: Setting, rounds: int, only: list[str] | None) -> None:
    if setting.backbone not in backbone_names():
        raise UserError(f"--backbone={setting.backbone}: allowed are {', '.join(backbone_names())}")
    for key in ("image_size", "batch_size"):
        if getattr(setting, key) < 2:
            raise UserError(f"--{key.replace('_', '-')}={getattr(setting, key)}: at least 2")
    if rounds < 1:
        raise UserError(f"--rounds={rounds}: at least 1")
    for name in only or []:
        if name not in VARIANTS:
            raise UserError(f"--only {name}: allowed are {', '.join(VARIANTS)}")
    try:
        torch.empty(1, device=setting.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device={setting.device}: not on this machine") from error


def _config(setting: Setting, variant: str) -> Any:
    joint_settings = {"temperature": 0.2, "mask": {"lr": 1e-3}, "meta": META.get(variant, {})}
    kwargs: dict[str, Any] = {
        "simclr": {"proj_hidden_dim": 2048, "proj_output_dim": 256, "temperature": 0.2},
        "barlow_twins": {
            "proj_hidden_dim": 2048,
            "proj_output_dim": 2048,
            "lamb": 0.005,
            "scale_loss": 0.1,
        },
    }.get(variant, joint_settings)
    backbone_kwargs = (
        {}
        if setting.backbone.startswith(("resnet", "wide", "convnext", "pool"))
        else {"img_size": setting.image_size}
    )
    return OmegaConf.create(
        {
            "name": variant,
            "method": variant if variant in ("simclr", "barlow_twins") else "metamask",
            "backbone": {"name": setting.backbone, "kwargs": backbone_kwargs},
            "method_kwargs": kwargs,
            "data": {
                # solo-learn gives its ResNets the 3×3 stem for these data only
                "dataset": "cifar10" if setting.stem == "3x3" else "custom",
                "num_classes": 10,
                "num_large_crops": 2,
                "num_small_crops": 0,
            },
            "max_epochs": 1,
            "optimizer": {
                "name": "sgd",
                "batch_size": setting.batch_size,
                "lr": 1e-3,
                "weight_decay": 5e-4,
                "classifier_lr": 1e-3,
                "kwargs": {"momentum": 0.9},
            },
            "scheduler": {"name": "none"},
            "performance": {"disable_channel_last": setting.device == "cpu"},
        }
    )


def _step_of(setting: Setting, variant: str) -> tuple[Callable[[], None], int]:
    """One training step as Lightning runs it, without its bookkeeping, and the variant's period."""
    torch.manual_seed(0)
    device = torch.device(setting.device)
    model: Any = build_method(_config(setting, variant)).to(device).train()
    optimizer = torch.optim.SGD(
        [{"params": list(group["params"])} for group in model.learnable_params],
        lr=1e-3,
        momentum=0.9,
        weight_decay=5e-4,
    )

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

    return step, META.get(variant, {}).get("every_n_steps", 1)


def _two_models_update(model: Any, optimizer: torch.optim.SGD) -> Callable[[list[Tensor]], None]:
    """The finite-difference algorithm as it is usually implemented: a second model, whole graphs.

    The yardstick for what the shared and graph-free passes of the package save.
    """
    twin = copy.deepcopy(torch.nn.ModuleDict({"f": model.backbone, "p": model.projector}))
    own = torch.nn.ModuleDict({"f": model.backbone, "p": model.projector})
    logits = torch.nn.Parameter(model.mask.logits.detach().clone())
    mask_optimizer = torch.optim.SGD([logits], lr=1e-3, momentum=0.9, weight_decay=5e-4)

    def loss_of(network: Any, views: list[Tensor]) -> Tensor:
        z = [network["p"](network["f"](x) * torch.sigmoid(logits)) for x in views]
        return nt_xent(z[0], z[1], model.settings.temperature)

    def update(views: list[Tensor]) -> None:
        params = list(own.parameters())
        lr, momentum, decay = 1e-3, 0.9, 5e-4
        gradients = torch.autograd.grad(loss_of(own, views), params)
        with torch.no_grad():
            for p, q, g in zip(params, twin.parameters(), gradients, strict=True):
                buffer = optimizer.state[p]["momentum_buffer"]
                q.copy_(p - lr * (g + decay * p + momentum * buffer))
        *v, direct = torch.autograd.grad(loss_of(twin, views), [*twin.parameters(), logits])
        radius = 1e-2 / torch.cat([g.flatten() for g in v]).norm()
        sides = []
        for factor in (1, -2):
            with torch.no_grad():
                for p, g in zip(params, v, strict=True):
                    p.add_(g, alpha=float(factor * radius))
            sides.append(torch.autograd.grad(loss_of(own, views), logits)[0])
        with torch.no_grad():
            for p, g in zip(params, v, strict=True):
                p.add_(g, alpha=float(radius))
        logits.grad = direct - lr * (sides[0] - sides[1]) / (2 * radius)
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
