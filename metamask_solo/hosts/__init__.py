"""The one place that knows which release of solo-learn is installed.

Everyone else takes from here what it needs of solo-learn and of Lightning. ``github_main`` is for
GitHub's main, ``solo_1_0_2`` for the package index's 1.0.2; both define the same names. Nothing of
solo-learn is changed: a run of ours uses its classes, or subclasses of them.

Attributes:
    RELEASE: name of the release, in notes and results.
    METHODS: name of a method to its class, as solo-learn keeps them.
    OPTIMIZERS: value of ``optimizer.name`` to the class.
    BACKBONE_PREFIX: what the keys of a backbone begin with in a checkpoint.
    CLASSES: number of classes of the built-in data sets.
    SMALL_CROPS: methods that take crops of a second size.
    PluginMethod: the class to derive a method of one's own from.
    pl: the Lightning that this release imports.

Their functions are described in ``github_main``: ``backbone_names``, ``build_backbone``,
``build_method``, ``build_linear``, ``complete_pretrain_config``, ``complete_linear_config``,
``pretrain_transform``, ``dataset_transforms``, ``setting_names``.
"""

import importlib.util
import warnings
from pathlib import Path
from typing import Any

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


def __getattr__(name: str) -> Any:
    """The names of the release."""
    return getattr(host, name)


def trainable_methods() -> list[str]:
    """The values that ``method`` may have."""
    return sorted(host.METHODS.keys() - {"base", "linear"})


# these need the names above
from metamask_solo.hosts.faults import refuse_known_faults  # noqa: E402
from metamask_solo.hosts.state import HostState  # noqa: E402

__all__ = ["HostState", "refuse_known_faults", "trainable_methods"]
