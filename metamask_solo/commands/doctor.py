"""``metamask-solo doctor``: packages, solo-learn, devices: what a bug report needs."""

import importlib
import importlib.util
import json
import os
import platform
import re
import shutil
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path

import metamask_solo
from metamask_solo.commands.options import command_parser
from metamask_solo.versions import version_of

VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF", "SLURM_NTASKS")
SHARED_MEMORY = "/dev/shm"
TROUBLE = "trouble"


def main(argv: list[str]) -> int:
    """Prints the report.

    Returns:
        0; 1 where something is missing or does not import without which nothing can be trained.
    """
    command_parser(
        "doctor",
        ": what a bug report needs. Ends with 1 where something is missing, or does not "
        "import, without which nothing can be trained.",
    ).parse_args(argv)
    troubles = []
    print(f"metamask-solo {metamask_solo.__version__}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for part in (_system, _packages, _solo_learn, _devices):
            for name, text in part():
                if name == TROUBLE:
                    troubles.append(text)
                else:  # the home folder has the user's name
                    print(f"  {name:<22} {text}".replace(f"{Path.home()}{os.sep}", f"~{os.sep}"))
    for trouble in troubles:
        print(f"trouble: {trouble}")
    return 1 if troubles else 0


def _system() -> Iterator[tuple[str, str]]:
    yield "Python", f"{platform.python_version()}, {platform.platform()}, {platform.machine()}"
    yield "installed in", str(Path(metamask_solo.__file__).parent)
    yield from ((name, os.environ[name]) for name in VARIABLES if name in os.environ)


def _packages() -> Iterator[tuple[str, str]]:
    """What the installed package requires; what only developers need is left out."""
    for line in requires("metamask-solo") or []:
        name = re.split(r"[^\w.-]", line, maxsplit=1)[0]
        if re.search(r"extra == ['\"](dev|docs)['\"]", line):
            continue
        version = version_of(name)
        yield name, version or "not installed"
        if version is None and "extra ==" not in line:
            yield TROUBLE, f"not installed: {name}"


def _solo_learn() -> Iterator[tuple[str, str]]:
    try:
        installed = distribution("solo-learn")
        origin = json.loads(installed.read_text("direct_url.json") or "{}")
        commit = origin.get("vcs_info", {}).get("commit_id", "")
        yield "solo-learn", installed.version + (f", commit {commit[:12]}" if commit else "")
    except PackageNotFoundError:
        yield "solo-learn", "not known to pip"
    spec = importlib.util.find_spec("solo")
    if spec is not None:
        yield "imported from", ", ".join(spec.submodule_search_locations or ["nowhere"])
    try:
        hosts = importlib.import_module("metamask_solo.hosts")
    except Exception as error:  # whatever it is, the report says it and goes on
        why = "is not installed" if spec is None else "does not import"
        yield TROUBLE, f"solo-learn {why}: {' '.join(str(error).split())}"
        return
    yield "release", "GitHub's main branch" if hosts.RELEASE == "main" else "1.0.2 of PyPI"
    yield "methods", ", ".join(hosts.trainable_methods())


def _devices() -> Iterator[tuple[str, str]]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "CPU cores", f"{os.cpu_count()}, of which this process may use {usable}"
    if os.path.isdir(SHARED_MEMORY):
        # workers hand images over in it: in a container it may be very small
        yield "shared memory", f"{_gib(shutil.disk_usage(SHARED_MEMORY).total)} ({SHARED_MEMORY})"
    try:
        import torch
        import torchvision  # noqa: F401  one that does not fit torch fails here
    except Exception as error:
        yield TROUBLE, f"torch or torchvision does not import: {' '.join(str(error).split())}"
        return
    yield "threads of torch", str(torch.get_num_threads())
    yield "CUDA of torch", str(torch.version.cuda or torch.version.hip or "none: built for the CPU")
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        capability = f"capability {device.major}.{device.minor}"
        yield f"cuda:{i}", f"{device.name}, {_gib(device.total_memory)}, {capability}"
    if not torch.cuda.is_available():
        yield "CUDA devices", "none"
    yield "MPS", "yes" if torch.backends.mps.is_available() else "no"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
