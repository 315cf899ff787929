"""Importing the package changes nothing of solo-learn, torchmetrics and timm but METHODS."""

import json
import subprocess
import sys

from metamask_solo.hosts import RELEASE

# every function, class, base, class attribute and value of the three packages, known by where the
# code stands: a wrapper or another default is another text
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

attributes = {}
for name, module in sorted(sys.modules.items()):
    if name.partition(".")[0] not in ("solo", "timm", "torchmetrics"):
        continue
    for key, value in vars(module).items():
        if isinstance(value, types.ModuleType) or key.startswith("__"):
            continue
        attributes[f"{name}:{key}"] = of(value)
        if isinstance(value, type) and value.__module__ == name:
            attributes[f"{name}:{key}()"] = [of(base) for base in value.__bases__]
            for attribute, member in vars(value).items():
                if attribute not in ("__dict__", "__weakref__", "_abc_impl", "__doc__"):
                    attributes[f"{name}:{key}.{attribute}"] = of(member)
print(json.dumps(attributes))
"""


def started(ours: bool) -> subprocess.Popen[str]:
    absent = "github_main" if RELEASE == "1.0.2" else "1_0_2"
    code = FINGERPRINTS.replace("OURS", str(ours)).replace("ABSENT", repr(absent))
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_importing_adds_one_method_and_changes_nothing() -> None:
    processes = [started(ours) for ours in (False, True)]
    printed = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    without, with_ours = (json.loads(text.splitlines()[-1]) for text in printed)
    assert len(without) > 5000
    metamask = "metamask_solo.method.metamask.MetaMask"
    for name in ("solo.methods:METHODS", "solo.args.setup:METHODS"):  # the latter of 1.0.2 alone
        assert with_ours.get(name, {}).pop("metamask", metamask) == metamask
    assert {name: with_ours.get(name) for name in without} == without
