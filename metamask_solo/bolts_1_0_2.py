"""What solo-learn 1.0.2 imports from pl_bolts, for before its bridges can be imported."""

import importlib.abc
import importlib.machinery
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

BOLTS = ("pl_bolts", "pl_bolts.optimizers", "pl_bolts.optimizers.lr_scheduler")


class BoltsFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a stand-in for pl_bolts, which does not import with Lightning 2, where there is none.

    Comes last on ``sys.meta_path``, so an installed one goes first.
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
