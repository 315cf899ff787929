"""``metamask-solo doctor``: packages, bridges, devices: what a report of a fault needs."""

import argparse
import importlib
import importlib.util
import json
import multiprocessing
import os
import platform
import shutil
import textwrap
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import metamask_solo
from metamask_solo.versions import version_of

HELP = "say what is installed, what is bridged on solo-learn, and which devices there are"
# what solo-learn and this package cannot do without
NEEDED = (
    "torch",
    "torchvision",
    "lightning",
    "timm",
    "torchmetrics",
    "hydra-core",
    "omegaconf",
    "numpy",
    "scipy",
    "scikit-learn",
    "statsmodels",
    "matplotlib",
    "pandas",
    "pillow",
    "tqdm",
    "mlxtend",
    "threadpoolctl",
    "wrapt",
    "filelock",
    "safetensors",
    "jinja2",
    "pydantic",
)
# the extras, and what solo-learn takes where it is there
OPTIONAL = (
    "einops",
    "pytorch-lightning",
    "setuptools",
    "hydra-joblib-launcher",
    "hydra-submitit-launcher",
    "hydra-optuna-sweeper",
    "tensorboard",
    "umap-learn",
    "seaborn",
    "wandb",
    "optuna",
    "h5py",
    "nvidia-dali-cuda110",
    "nvidia-dali-cuda120",
)
VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_VISIBLE_DEVICES",
    "HYDRA_FULL_ERROR",
    "MKL_NUM_THREADS",
    "NCCL_DEBUG",
    "OMP_NUM_THREADS",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ENABLE_MPS_FALLBACK",
    "SLURM_NTASKS",
    "TORCH_LOGS",
)
SHARED_MEMORY = "/dev/shm"
WIDTH, COLUMN = 100, 25
Line = tuple[str, str]


def main(argv: list[str]) -> int:
    """Prints the report.

    Returns:
        0; 1 where something is missing or does not import without which nothing can be trained.
    """
    argparse.ArgumentParser(
        prog="metamask-solo doctor",
        description=HELP[0].upper() + HELP[1:] + ": what a report of a fault needs. Ends with 1 "
        "where something is missing, or does not import, without which nothing can be trained.",
    ).parse_args(argv)
    troubles: list[str] = []
    _print("metamask-solo " + metamask_solo.__version__, _system())
    _print("packages", _packages(troubles))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _print("solo-learn", _solo_learn(troubles))
        _print("devices", _devices(troubles))
    for trouble in troubles:
        print(f"trouble: {trouble}")
    return 1 if troubles else 0


def _print(title: str, lines: Iterator[Line]) -> None:
    print(title)
    for name, text in lines:
        first, rest = f"  {name}".ljust(COLUMN), " " * COLUMN
        for line in textwrap.wrap(text, WIDTH - COLUMN, break_on_hyphens=False) or [""]:
            print(first + line)
            first = rest


def _system() -> Iterator[Line]:
    yield "Python", f"{platform.python_version()}, {platform.platform()}, {platform.machine()}"
    yield "installed in", _shown(Path(metamask_solo.__file__).parent)


def _packages(troubles: list[str]) -> Iterator[Line]:
    found = {name: version_of(name) for name in (*NEEDED, *OPTIONAL)}
    for name, number in found.items():
        if number:
            yield name, number
    for title, names in (("missing", NEEDED), ("not installed", OPTIONAL)):
        absent = [name for name in names if not found[name]]
        if absent:
            yield title, ", ".join(absent)
        if absent and names is NEEDED:
            troubles.append(f"not installed: {', '.join(absent)}")


def _solo_learn(troubles: list[str]) -> Iterator[Line]:
    said = version_of("solo-learn") or "nothing"
    yield "pip says", said + _commit("solo-learn")
    spec = importlib.util.find_spec("solo")
    if spec is not None:
        yield "imported from", _shown(*(spec.submodule_search_locations or ["nowhere"]))
    try:
        hosts = importlib.import_module("metamask_solo.hosts")
    except Exception as error:  # whatever it is, the report says it and goes on
        why = "is not installed" if spec is None else "does not import"
        yield "release", f"none: {why} ({type(error).__name__})"
        troubles.append(f"solo-learn {why}: {_one_line(error)}")
        return
    release = hosts.RELEASE
    yield "release", "GitHub's main branch" if release == "main" else f"{release} of PyPI"
    yield "methods", ", ".join(sorted(hosts.METHODS))
    for number, what in enumerate(hosts.BRIDGED.values()):
        yield "" if number else "bridged", f"- {what}"


def _devices(troubles: list[str]) -> Iterator[Line]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "CPU cores", f"{cores} of {os.cpu_count()}"
    if os.path.isdir(SHARED_MEMORY):
        # workers hand images over in it: in a container it may be very small
        yield "shared memory", f"{_gib(shutil.disk_usage(SHARED_MEMORY).total)} ({SHARED_MEMORY})"
    methods = multiprocessing.get_all_start_methods()
    started = multiprocessing.get_start_method(allow_none=True) or methods[0]
    yield "processes start by", started
    for name in VARIABLES:
        if name in os.environ:
            yield name, os.environ[name]
    try:
        import torch
        import torchvision  # noqa: F401  one that does not fit torch fails here
    except Exception as error:
        yield "torch", f"does not import ({type(error).__name__})"
        troubles.append(f"torch or torchvision does not import: {_one_line(error)}")
        return
    threads, between = torch.get_num_threads(), torch.get_num_interop_threads()
    yield "threads of torch", f"{threads} in an operation, {between} for operations side by side"
    yield "CUDA of torch", str(torch.version.cuda or torch.version.hip or "none: built for the CPU")
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        capability = f"capability {device.major}.{device.minor}"
        yield f"cuda:{i}", f"{device.name}, {_gib(device.total_memory)}, {capability}"
    if torch.cuda.is_available():
        yield "cuDNN", str(torch.backends.cudnn.version())
    else:
        yield "CUDA devices", "none"
    yield "MPS", "yes" if torch.backends.mps.is_available() else "no"


def _commit(name: str) -> str:
    """The commit of a package that pip took from git; empty for others."""
    try:
        origin = json.loads(distribution(name).read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        return ""
    commit = origin.get("vcs_info", {}).get("commit_id", "")
    return f", commit {commit[:12]}" if commit else ""


def _shown(*places: str | Path) -> str:
    """A path as a report may show it: the home, which has the user's name, as ~."""
    home = str(Path.home())
    return ", ".join(
        "~" + str(place)[len(home) :] if Path(place).is_relative_to(home) else str(place)
        for place in places
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
