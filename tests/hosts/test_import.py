"""Importing the package changes nothing of solo-learn, torchmetrics and timm but METHODS."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

# every function, class, base, class attribute and value of the three packages, told by where the
# code stands in which file: a wrapper or another default is another text
FINGERPRINTS = """
import importlib, json, pkgutil, sys, types, warnings
warnings.simplefilter("ignore")
if OURS:
    import metamask_solo
    for part in pkgutil.walk_packages(metamask_solo.__path__[:1], "metamask_solo."):
        if not part.name.endswith(("__main__", "timm_stems", ABSENT)):
            importlib.import_module(part.name)
import solo, timm, torchmetrics
for part in pkgutil.walk_packages(solo.__path__, "solo."):
    try:
        importlib.import_module(part.name)
    except ImportError:  # DALI, h5
        pass

def of(value):
    if isinstance(value, (staticmethod, classmethod)):
        return of(value.__func__)
    if isinstance(value, property):
        return [of(f) for f in (value.fget, value.fset) if f]
    if isinstance(value, types.FunctionType):
        code = value.__code__
        return [f"{code.co_filename}:{code.co_firstlineno}", *map(of, value.__defaults__ or ())]
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, (int, float, str, bool, type(None))):
        return value
    if isinstance(value, dict):
        return {str(k): of(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return sorted(str(of(v)) for v in value)
    return type(value).__name__

found = {}
for name, module in sorted(sys.modules.items()):
    if name.partition(".")[0] not in ("solo", "timm", "torchmetrics"):
        continue
    for key, value in vars(module).items():
        if isinstance(value, types.ModuleType) or key.startswith("__"):
            continue
        found[f"{name}:{key}"] = of(value)
        if isinstance(value, type) and value.__module__ == name:
            found[f"{name}:{key}()"] = [of(base) for base in value.__bases__]
            for attribute, member in vars(value).items():
                if attribute not in ("__dict__", "__weakref__", "_abc_impl", "__doc__"):
                    found[f"{name}:{key}.{attribute}"] = of(member)
print(json.dumps(found))
"""


def python(code: str, cwd: Path | None = None) -> str:
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fingerprints(ours: bool) -> dict[str, Any]:
    from metamask_solo.hosts import RELEASE

    absent = "github_main" if RELEASE == "1.0.2" else "1_0_2"
    text = python(FINGERPRINTS.replace("OURS", str(ours)).replace("ABSENT", repr(absent)))
    return json.loads(text.splitlines()[-1])


def test_importing_adds_one_method_and_changes_nothing() -> None:
    without, with_ours = fingerprints(False), fingerprints(True)
    assert len(without) > 5000
    metamask = "metamask_solo.method.metamask.MetaMask"
    for name in ("solo.methods:METHODS", "solo.args.setup:METHODS"):  # the latter of 1.0.2 alone
        assert with_ours.get(name, {}).pop("metamask", metamask) == metamask
    assert {name: with_ours.get(name) for name in without} == without


def test_the_schedule_of_lightning_bolts_stands_behind_lightning_bolts(tmp_path: Path) -> None:
    """solo-learn 1.0.2 imports it; an installed package of the name goes first."""
    line = "from pl_bolts.optimizers.lr_scheduler import LinearWarmupCosineAnnealingLR as schedule"
    ours = Path(__file__).parents[2] / "pl_bolts.py"
    assert python(f"{line}; print(schedule.__module__)", cwd=ours.parent).strip() == "pl_bolts"
    package = tmp_path / "pl_bolts" / "optimizers"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "lr_scheduler.py").write_text("class LinearWarmupCosineAnnealingLR: pass")
    (tmp_path / "pl_bolts.py").write_bytes(ours.read_bytes())
    installed = python(f"{line}; print(schedule.__module__)", cwd=tmp_path).strip()
    assert installed == "pl_bolts.optimizers.lr_scheduler"
