"""The one place that knows which release of solo-learn is installed.

Everyone else takes from here what it needs of solo-learn and of Lightning. Two modules implement
the same interface: ``github_main`` for GitHub's main, ``release_1_0_2`` (with its bridges) for the
package index's 1.0.2. To drop 1.0.2, delete its modules and its branch below.
"""

import importlib
import importlib.util
import sys
import warnings
from pathlib import Path
from typing import Any

from metamask_solo.hosts.bridges import BRIDGED, bridge, bridge_knn, note
from metamask_solo.hosts.first_step import SIZED_BACKBONES, check_sizes
from metamask_solo.hosts.online_metrics import (
    bridge_accuracy,
    bridge_labels,
    bridge_neighbours,
    log_nothing_of_labels,
)
from metamask_solo.hosts.optimization import Length, configure_like
from metamask_solo.hosts.resuming import make_resumable
from metamask_solo.hosts.trainer import (
    forward_context,
    loss_scale,
    step_was_dropped,
    watch_dropped_steps,
)

_solo = importlib.util.find_spec("solo")
if _solo is None:
    raise ImportError(
        "metamask-solo extends solo-learn, which is not installed: run `make setup`, or "
        "`pip install --no-deps solo-learn==1.0.2`"
    )

with warnings.catch_warnings():
    # solo-learn imports timm's and torch's old names, and registers its backbones over timm's
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Overwriting .* in registry")
    # looked up as a folder: asking for the spec of a submodule would already import solo
    if Path((_solo.submodule_search_locations or [""])[0], "backbones").is_dir():
        _release = importlib.import_module("metamask_solo.hosts.github_main")
    else:
        _release = importlib.import_module("metamask_solo.hosts.release_1_0_2")

RELEASE: str = _release.RELEASE
METHODS: Any = _release.METHODS
BACKBONE_PREFIX: str = _release.BACKBONE_PREFIX
# names of optimizer.name to classes, and keys of optimizer that only linear training reads
OPTIMIZERS: dict[str, Any] = _release.OPTIMIZERS
LARGE_CROPS: dict[str, tuple[float, float]] = _release.LARGE_CROPS
SMALL_CROPS: tuple[str, ...] = _release.SMALL_CROPS
LINEAR_OPTIMIZER_KEYS: tuple[str, ...] = _release.LINEAR_OPTIMIZER_KEYS
CLASSES: dict[str, int] = _release.CLASSES
WeightedKNNClassifier = bridge(bridge_knn, _release.WeightedKNNClassifier)
bridge(bridge_neighbours, WeightedKNNClassifier)
bridge(bridge_accuracy, sys.modules[_release.BaseMethod.__module__])
bridge(bridge_labels, _release.BaseMethod, "_base_shared_step")
bridge(bridge_labels, _release.BaseMomentumMethod, "_shared_step_momentum")
# the releases apply these to each model that they build
note(configure_like)
note(make_resumable)
PluginMethod: Any = _release.PluginMethod
pl: Any = _release.pl
backbone_names = _release.backbone_names
build_backbone = _release.build_backbone
build_linear = _release.build_linear
build_method = _release.build_method
complete_linear_config = _release.complete_linear_config
complete_pretrain_config = _release.complete_pretrain_config
dataset_transforms = _release.dataset_transforms
pretrain_transform = _release.pretrain_transform
setting_names = _release.setting_names

__all__ = [
    "BACKBONE_PREFIX",
    "BRIDGED",
    "CLASSES",
    "LARGE_CROPS",
    "LINEAR_OPTIMIZER_KEYS",
    "Length",
    "METHODS",
    "OPTIMIZERS",
    "RELEASE",
    "SIZED_BACKBONES",
    "SMALL_CROPS",
    "PluginMethod",
    "WeightedKNNClassifier",
    "backbone_names",
    "build_backbone",
    "build_linear",
    "build_method",
    "check_sizes",
    "complete_linear_config",
    "complete_pretrain_config",
    "dataset_transforms",
    "forward_context",
    "log_nothing_of_labels",
    "loss_scale",
    "pl",
    "pretrain_transform",
    "setting_names",
    "step_was_dropped",
    "watch_dropped_steps",
]
