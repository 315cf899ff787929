"""Puts MetaMask among solo-learn's methods once solo-learn is imported, and not before.

Importing solo-learn takes seconds, so importing this package must not do it.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from wrapt import when_imported

METHOD = "metamask_solo.method.metamask"
STEMS = "metamask_solo.checkpoints.timm_stems"
HOSTS = "metamask_solo.hosts"
BOLTS = ("pl_bolts", "pl_bolts.optimizers", "pl_bolts.optimizers.lr_scheduler")


def register_when_imported() -> None:
    """Arranges that :mod:`metamask_solo.method.metamask` follows ``solo``, whoever imports that.

    And that solo-learn 1.0.2 finds the schedule that it imports from pl_bolts.
    """
    if not any(isinstance(finder, _BoltsFinder) for finder in sys.meta_path):
        sys.meta_path.append(_BoltsFinder())
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


class _BoltsFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a stand-in for pl_bolts, which does not import with Lightning 2, where there is none.

    Comes last on ``sys.meta_path``, so an installed one goes first. Only solo-learn 1.0.2 asks.
    """

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in BOLTS:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=name != BOLTS[-1])

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ != BOLTS[-1]:
            return
        # by its path: the package of this file imports solo-learn, which is asking
        file = Path(__file__).parent / "hosts" / "bridges_1_0_2.py"
        spec = importlib.util.spec_from_file_location("metamask_solo_bridges_1_0_2", file)
        assert spec is not None and spec.loader is not None
        bridges = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(bridges)
        vars(module)["LinearWarmupCosineAnnealingLR"] = bridges.LinearWarmupCosineAnnealingLR
