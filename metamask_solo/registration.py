"""Puts MetaMask among solo-learn's methods once solo-learn is imported, and not before.

Importing solo-learn takes seconds, so importing this package must not do it.
"""

import importlib
import sys
from types import ModuleType

from wrapt import when_imported

from metamask_solo.bolts_1_0_2 import BoltsFinder

METHOD = "metamask_solo.method.metamask"
STEMS = "metamask_solo.checkpoints.timm_stems"
HOSTS = "metamask_solo.hosts"


def register_when_imported() -> None:
    """Arranges that :mod:`metamask_solo.method.metamask` follows ``solo``, whoever imports that.

    And that solo-learn 1.0.2 finds the schedule that it imports from pl_bolts.
    """
    if not any(isinstance(finder, BoltsFinder) for finder in sys.meta_path):
        sys.meta_path.append(BoltsFinder())
        when_imported(HOSTS)(_import_method)
        # not of solo.methods: the package imports it before other parts that the method needs
        when_imported("solo")(_unless_hosts_follow)
        when_imported("timm")(_import_stems)


def _unless_hosts_follow(module: ModuleType) -> None:
    # imported by our own hosts, which are not complete yet: their hook follows
    if HOSTS not in sys.modules:
        _import_method(module)


def _import_method(module: ModuleType) -> None:
    importlib.import_module(METHOD)


def _import_stems(module: ModuleType) -> None:
    importlib.import_module(STEMS)
