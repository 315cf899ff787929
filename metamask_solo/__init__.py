"""MetaMask for solo-learn: importing this package registers the method ``metamask``.

It imports neither torch nor solo-learn. Public names are imported when they are first used, and
the method registers itself when ``solo.methods`` is imported, before or after this package.
"""

import importlib
from typing import TYPE_CHECKING, Any

from metamask_solo import registration

if TYPE_CHECKING:
    from metamask_solo.checkpoints.folding import fold_mask
    from metamask_solo.checkpoints.reading import load_backbone
    from metamask_solo.method.hypergradient import hypergradient
    from metamask_solo.method.losses import barlow_twins, nt_xent
    from metamask_solo.method.mask import DimensionalMask, mask_statistics
    from metamask_solo.method.meta_update import mask_hypergradient, trial_step
    from metamask_solo.method.metamask import MetaMask
    from metamask_solo.method.trial import TrialStep

__version__ = "0.2.0"

# public name to the module that defines it
_MODULES = {
    "DimensionalMask": "method.mask",
    "MetaMask": "method.metamask",
    "TrialStep": "method.trial",
    "barlow_twins": "method.losses",
    "fold_mask": "checkpoints.folding",
    "hypergradient": "method.hypergradient",
    "load_backbone": "checkpoints.reading",
    "mask_hypergradient": "method.meta_update",
    "mask_statistics": "method.mask",
    "nt_xent": "method.losses",
    "trial_step": "method.meta_update",
}
__all__ = [
    "DimensionalMask",
    "MetaMask",
    "TrialStep",
    "barlow_twins",
    "fold_mask",
    "hypergradient",
    "load_backbone",
    "mask_hypergradient",
    "mask_statistics",
    "nt_xent",
    "trial_step",
]

registration.register_when_imported()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value  # next time without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
