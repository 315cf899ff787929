"""MetaMask for solo-learn: importing this package registers the method ``metamask``."""

from metamask_solo.hosts import METHODS
from metamask_solo.method.hypergradient import SplitLoss, TrialStep, hypergradient
from metamask_solo.method.mask import DimensionalMask
from metamask_solo.method.metamask import MetaMask

METHODS["metamask"] = MetaMask

__all__ = ["DimensionalMask", "MetaMask", "SplitLoss", "TrialStep", "hypergradient"]
__version__ = "0.1.0"
