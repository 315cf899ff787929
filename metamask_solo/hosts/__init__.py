"""The one place that knows which release of solo-learn is installed.

Everyone else takes from here what it needs of solo-learn and of Lightning. ``github_main`` is for
GitHub's main, ``solo_1_0_2`` for the package index's 1.0.2; both define the same names. Nothing of
solo-learn is changed: a run of ours uses its classes, or subclasses of them.

Attributes:
    RELEASE: name of the release, in notes and results.
    METHODS: name of a method to its class, as solo-learn keeps them.
    OPTIMIZERS: value of ``optimizer.name`` to the class.
    LINEAR_OPTIMIZER_KEYS: keys of ``optimizer`` that only linear training reads.
    BACKBONE_PREFIX: what the keys of a backbone begin with in a checkpoint.
    CLASSES: number of classes of the built-in data sets.
    KNOWN_FAULTS: what the releases are known to do wrong, with what a run is refused for.
    PluginMethod: the class to derive a method of one's own from.
    HostState: the callback that keeps what no checkpoint of solo-learn holds.
    pl: the Lightning that this release imports.
"""

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor, nn

from metamask_solo.hosts import faults
from metamask_solo.hosts.faults import KNOWN_FAULTS, refuse_changed_plan
from metamask_solo.hosts.state import host_state
from metamask_solo.hosts.stem import KEY as STEM_KEY
from metamask_solo.hosts.stem import SIZED_BACKBONES, SMALL, STANDARD, stem_of

_solo = importlib.util.find_spec("solo")
if _solo is None:
    raise ImportError(
        "metamask-solo extends solo-learn, which is not installed: run `make setup`, or "
        "`pip install --no-deps solo-learn==1.0.2`"
    )

host: Any
with warnings.catch_warnings():
    # solo-learn imports timm's and torch's old names, and registers its backbones over timm's
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*distutils")
    warnings.filterwarnings("ignore", message="Overwriting .* in registry")
    # looked up as a folder: asking for the spec of a submodule would already import solo
    if Path((_solo.submodule_search_locations or [""])[0], "backbones").is_dir():
        from metamask_solo.hosts import github_main as host
    else:
        from metamask_solo.hosts import solo_1_0_2 as host

RELEASE: str = host.RELEASE
METHODS: dict[str, Any] = host.METHODS
OPTIMIZERS: dict[str, Any] = host.OPTIMIZERS
LINEAR_OPTIMIZER_KEYS: tuple[str, ...] = host.LINEAR_OPTIMIZER_KEYS
BACKBONE_PREFIX: str = host.BACKBONE_PREFIX
CLASSES: dict[str, int] = host.CLASSES
PluginMethod = host.PluginMethod
pl = host.pl
HostState: Any = host_state(pl)


def trainable_methods() -> list[str]:
    """The values that ``method`` may have."""
    return sorted(METHODS.keys() - {"base", "linear"})


def setting_names(method: str) -> set[str] | None:
    """The keys of ``method_kwargs`` that a method reads; None where it checks them itself."""
    return host.setting_names(method)


def backbone_names() -> list[str]:
    """The values that ``backbone.name`` may have."""
    return host.backbone_names()


def build_backbone(cfg: DictConfig) -> nn.Module:
    """The backbone as solo-learn's methods build it: images to N × D features."""
    return host.build_backbone(cfg)


def build_method(cfg: DictConfig, labels: bool = True) -> Any:
    """The method that ``cfg.method`` names.

    Args:
        cfg: a completed config.
        labels: False where an image has no label; the method logs nothing of labels then, and the
            data set is to give each image the label 0.
    """
    return host.build_method(cfg, labels)


def build_linear(
    backbone: nn.Module,
    cfg: DictConfig,
    loss_func: Callable[..., Tensor] | None = None,
    mixup_func: Callable[..., Any] | None = None,
) -> Any:
    """solo-learn's linear (or fine-tuning) model on a backbone, from a completed config."""
    return host.build_linear(backbone, cfg, loss_func, mixup_func)


def complete_pretrain_config(cfg: DictConfig) -> DictConfig:
    """Defaults and derived values, as GitHub main's main_pretrain.py computes them."""
    return host.complete_pretrain_config(cfg)


def complete_linear_config(cfg: DictConfig) -> DictConfig:
    """Defaults and derived values, as GitHub main's main_linear.py computes them."""
    return host.complete_linear_config(cfg)


def pretrain_transform(cfg: DictConfig) -> Callable[..., list[Tensor]]:
    """From an image to the views that a pretraining config asks for."""
    return host.pretrain_transform(cfg)


def dataset_transforms(dataset: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """solo-learn's training and evaluation transforms of one of its built-in data sets."""
    return host.dataset_transforms(dataset)


def refuse_known_faults(
    cfg: DictConfig, kind: str = "pretrain", batches: int | None = None, model: Any = None
) -> None:
    """Refuses a run that the release is known to do wrong.

    Args:
        cfg: a completed config.
        kind: ``pretrain`` or ``linear``.
        batches: batches of an epoch of one process, after ``limit_train_batches``; without it, the
            length of a warm-up and the number of clusters are not looked at.
        model: the model, which knows the defaults of the settings that the config leaves out.

    Raises:
        UserError: a line of ``KNOWN_FAULTS`` concerns the run.
    """
    method = METHODS.get(cfg.get("method"))
    own_method = method is not None and not method.__module__.startswith("solo.")
    faults.refuse_known_faults(
        faults.Setup(cfg, kind, RELEASE, host.SMALL_CROPS, own_method, batches, model)
    )


__all__ = [
    "BACKBONE_PREFIX",
    "CLASSES",
    "KNOWN_FAULTS",
    "LINEAR_OPTIMIZER_KEYS",
    "METHODS",
    "OPTIMIZERS",
    "RELEASE",
    "SIZED_BACKBONES",
    "SMALL",
    "STANDARD",
    "STEM_KEY",
    "HostState",
    "PluginMethod",
    "backbone_names",
    "build_backbone",
    "build_linear",
    "build_method",
    "complete_linear_config",
    "complete_pretrain_config",
    "dataset_transforms",
    "pl",
    "pretrain_transform",
    "refuse_changed_plan",
    "refuse_known_faults",
    "setting_names",
    "stem_of",
    "trainable_methods",
]
