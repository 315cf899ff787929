"""The one place that knows which release of solo-learn is installed.

Everyone else takes from here what it needs of solo-learn and of Lightning. Two modules are a
:class:`metamask_solo.hosts.protocol.Host`: ``github_main`` for GitHub's main, ``release_1_0_2``
(with its bridges) for the package index's 1.0.2. To drop 1.0.2, delete its modules and its branch
below.
"""

import importlib.util
import sys
import warnings
from pathlib import Path

from metamask_solo.hosts.bridges import BRIDGED, bridge, bridge_knn, note
from metamask_solo.hosts.first_step import SIZED_BACKBONES, check_sizes
from metamask_solo.hosts.online_metrics import (
    bridge_accuracy,
    bridge_labels,
    bridge_neighbours,
    log_nothing_of_labels,
)
from metamask_solo.hosts.optimization import Length, configure_like
from metamask_solo.hosts.protocol import Host
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
        from metamask_solo.hosts import github_main

        host: Host = github_main
    else:
        from metamask_solo.hosts import release_1_0_2

        host = release_1_0_2

RELEASE = host.RELEASE
METHODS = host.METHODS
BACKBONE_PREFIX = host.BACKBONE_PREFIX
OPTIMIZERS = host.OPTIMIZERS
DINO_WARMUP = host.DINO_WARMUP
LARGE_CROPS = host.LARGE_CROPS
SMALL_CROPS = host.SMALL_CROPS
LINEAR_OPTIMIZER_KEYS = host.LINEAR_OPTIMIZER_KEYS
CLASSES = host.CLASSES
WeightedKNNClassifier = bridge(bridge_knn, host.WeightedKNNClassifier)
bridge(bridge_neighbours, WeightedKNNClassifier)
for _name in ("base", "linear"):
    bridge(bridge_accuracy, sys.modules[f"solo.methods.{_name}"])
bridge(bridge_labels, host.BaseMethod, "_base_shared_step")
bridge(bridge_labels, host.BaseMomentumMethod, "_shared_step_momentum")
# the releases apply these to each model that they build
note(configure_like)
note(make_resumable)
PluginMethod = host.PluginMethod
pl = host.pl
backbone_names = host.backbone_names
build_backbone = host.build_backbone
build_linear = host.build_linear
build_method = host.build_method
complete_linear_config = host.complete_linear_config
complete_pretrain_config = host.complete_pretrain_config
dataset_transforms = host.dataset_transforms
pretrain_transform = host.pretrain_transform
setting_names = host.setting_names

__all__ = [
    "BACKBONE_PREFIX",
    "BRIDGED",
    "CLASSES",
    "DINO_WARMUP",
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
