"""MetaMask for solo-learn: importing this package registers the method ``metamask``.

It imports neither torch nor solo-learn. Public names are imported when they are first used, and
the method registers itself when ``solo.methods`` is imported, before or after this package.
"""

import importlib
from typing import TYPE_CHECKING, Any

from metamask_solo import registration

if TYPE_CHECKING:
    from metamask_solo.checkpoints.folding import fold_mask as fold_mask
    from metamask_solo.checkpoints.reading import load_backbone as load_backbone
    from metamask_solo.method.hypergradient import hypergradient as hypergradient
    from metamask_solo.method.hypergradient import mask_hypergradient as mask_hypergradient
    from metamask_solo.method.hypergradient import mean_over_processes as mean_over_processes
    from metamask_solo.method.hypergradient import optimizer_step as optimizer_step
    from metamask_solo.method.losses import barlow_twins as barlow_twins
    from metamask_solo.method.losses import nt_xent as nt_xent
    from metamask_solo.method.mask import DimensionalMask as DimensionalMask
    from metamask_solo.method.mask import mask_statistics as mask_statistics
    from metamask_solo.method.metamask import MetaMask as MetaMask

__version__ = "0.3.0"

# public name to the module that defines it
_MODULES = {
    "DimensionalMask": "method.mask",
    "MetaMask": "method.metamask",
    "barlow_twins": "method.losses",
    "fold_mask": "checkpoints.folding",
    "hypergradient": "method.hypergradient",
    "load_backbone": "checkpoints.reading",
    "mask_hypergradient": "method.hypergradient",
    "mask_statistics": "method.mask",
    "mean_over_processes": "method.hypergradient",
    "nt_xent": "method.losses",
    "optimizer_step": "method.hypergradient",
}
__all__ = [*_MODULES]

registration.register_when_imported()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value  # next time without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
