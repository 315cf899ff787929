"""Makes the virtual environment in which the project runs and is tested. `make setup` calls it.

It installs the project with all its extras, and solo-learn beside it. A solo-learn that is there
already stays, whichever release it is, unless another one is asked for by name. When all is up to
date, nothing is done.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STAMP = "metamask-solo-setup.json"
DEFAULT_HOST = "solo-learn==1.0.2"
EXTRAS = ["dev", "docs", "sweeps", "tensorboard", "umap", "wandb"]

# What a wheel of solo-learn is built from. A working clone also holds data and checkpoints.
HOST_FILES = ["setup.py", "setup.cfg", "pyproject.toml", "requirements.txt", "MANIFEST.in"]

_PROBE_HOST = """
import hashlib, importlib.metadata, importlib.util, json
try:
    host = importlib.metadata.distribution("solo-learn")
    files = hashlib.sha256((host.read_text("RECORD") or "").encode()).hexdigest()
    found = {"version": host.version, "requires": host.requires, "files": files}
except importlib.metadata.PackageNotFoundError:
    outside = importlib.util.find_spec("solo")
    found = {"version": "(not installed by pip)", "requires": None} if outside else None
print(json.dumps(found))
"""

_PROBE_TORCH = """
import importlib.metadata, json
print(json.dumps([importlib.metadata.version(name) for name in ("torch", "torchvision")]))
"""


_BOLTS = """# Written by the set-up. Loads one file, since the package imports solo-learn.
import importlib.util
import sys
from pathlib import Path

_folder = importlib.util.find_spec("metamask_solo").submodule_search_locations[0]
_spec = importlib.util.spec_from_file_location(
    "metamask_solo_bridges_1_0_2", Path(_folder) / "hosts" / "bridges_1_0_2.py"
)
_bridges = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_bridges)
LinearWarmupCosineAnnealingLR = _bridges.LinearWarmupCosineAnnealingLR
"""


class SetupError(Exception):
    """The environment cannot be made; the message is one line for the user."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where it goes")
    parser.add_argument("--solo-learn", default="", help="path, URL or requirement to install")
    args = parser.parse_args(argv)
    try:
        set_up(args.venv.expanduser().absolute(), args.solo_learn)
    except SetupError as error:
        print(f"setup: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("setup: interrupted; the next `make setup` goes on", file=sys.stderr)
        return 130
    return 0


def set_up(venv: Path, wanted_host: str = "") -> None:
    """Brings the environment in ``venv`` up to date.

    Args:
        venv: folder of the environment; made if it does not exist.
        wanted_host: the solo-learn to install, as pip takes it, or the path of a bare git
            repository. Empty: any that is there, else PyPI's 1.0.2.

    Raises:
        SetupError: the wish cannot be met, or a command failed.
    """
    wanted = fingerprint(wanted_host) if wanted_host else None
    python = venv / "bin" / "python"
    stamp, host = read_stamp(venv), find_host(python)
    if is_up_to_date(stamp, host, wanted):
        print(f"setup: {venv} is up to date")
        return

    # Without a stamp, an interrupted set-up is not taken for a finished one.
    (venv / STAMP).unlink(missing_ok=True)
    make_environment(venv)
    if wanted is None or not holds_wanted_host(stamp, host, wanted):
        install_host(python, wanted_host, host)
    host = find_host(python)
    install_project(python, host)
    stand_in_for_bolts(python, host)
    check_torch(python)
    if wanted is None and stamp.get("host") == host:
        wanted = stamp.get("wanted")
    write_stamp(venv, {"environment": environment_key(), "wanted": wanted, "host": host})
    say(f"{venv} is ready")


def is_up_to_date(stamp: dict[str, Any], host: dict[str, Any] | None, wanted: str | None) -> bool:
    """Whether the stamp is of this checkout, and the host there is one that will do."""
    if stamp.get("environment") != environment_key() or host is None:
        return False
    return wanted is None or holds_wanted_host(stamp, host, wanted)


def holds_wanted_host(stamp: dict[str, Any], host: dict[str, Any] | None, wanted: str) -> bool:
    """Whether the host there is, unchanged, the one that an earlier set-up installed as wanted."""
    return host is not None and stamp.get("host") == host and stamp.get("wanted") == wanted


def environment_key() -> str:
    """Changes with everything that decides what is installed, solo-learn aside."""
    digest = hashlib.sha256(f"{ROOT} {sys.version_info[:2]}".encode())
    for path in (ROOT / "pyproject.toml", Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def fingerprint(source: str) -> str:
    """Changes when what ``source`` names is another one, or its content is another.

    Raises:
        SetupError: ``source`` looks like a path, and there is nothing that pip could install.
    """
    path = Path(source).expanduser().resolve()
    if path.is_dir():
        if is_bare_repository(path):
            return f"{path} {output(['git', '-C', str(path), 'rev-parse', 'HEAD'])}"
        digest = hashlib.sha256(str(path).encode())
        for file in host_files(path):
            digest.update(str(file.relative_to(path)).encode())
            digest.update(file.read_bytes())
        return digest.hexdigest()
    if path.is_file():
        return f"{path} {hashlib.sha256(path.read_bytes()).hexdigest()}"
    if "/" in source and "://" not in source:
        raise SetupError(f"SOLO_LEARN={source}: no such file or folder")
    return source


def host_files(folder: Path) -> list[Path]:
    """The files of a solo-learn source folder that its wheel is built from, sorted.

    Raises:
        SetupError: the folder holds no solo-learn.
    """
    if not (folder / "setup.py").is_file() or not (folder / "solo" / "__init__.py").is_file():
        raise SetupError(f"SOLO_LEARN={folder}: holds no solo-learn (a setup.py beside solo/)")
    modules = [path for path in (folder / "solo").rglob("*") if "__pycache__" not in path.parts]
    files = [folder / name for name in HOST_FILES] + modules
    return sorted(path for path in files if path.is_file())


def is_bare_repository(folder: Path) -> bool:
    return (folder / "HEAD").is_file() and (folder / "objects").is_dir()


def find_host(python: Path) -> dict[str, Any] | None:
    """The solo-learn of the environment: version, needs, digest of its files; None without one."""
    if not python.exists():
        return None
    found: dict[str, Any] | None = json.loads(output([str(python), "-c", _PROBE_HOST]))
    return found


def make_environment(venv: Path) -> None:
    """Makes the environment, unless it is there, with a pip that knows editable installs."""
    python = venv / "bin" / "python"
    if not python.exists():
        say(f"making {venv} with Python {sys.version_info[0]}.{sys.version_info[1]}")
        run([sys.executable, "-m", "venv", "--without-pip", str(venv)])
    version = output([str(python), "-c", "import sys; print(*sys.version_info[:2], sep='.')"])
    if version != f"{sys.version_info[0]}.{sys.version_info[1]}":
        raise SetupError(
            f"{venv} is of Python {version}: say PYTHON=python{version}, or VENV=<another folder>"
        )
    if not succeeds([str(python), "-m", "pip", "--version"]) and not succeeds(
        [str(python), "-m", "ensurepip"]
    ):  # some distributions cut ensurepip out of Python
        run([sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "pip"])
    pip_install(python, "pip>=22")


def install_host(python: Path, wanted_host: str, present: dict[str, Any] | None) -> None:
    """Installs the wanted solo-learn; without a wish, keeps the one there, or takes PyPI's."""
    if wanted_host:
        say(f"installing solo-learn from {wanted_host}")
        with tempfile.TemporaryDirectory() as folder:
            source = pip_source(wanted_host, Path(folder))
            build = build_environment(Path(folder))
            pip_install(python, "--no-deps", "--force-reinstall", source, env=build)
    elif present is None:
        say(f"installing {DEFAULT_HOST}")
        pip_install(python, "--no-deps", DEFAULT_HOST)
    else:
        say(f"keeping the solo-learn {present['version']} that is there")


def pip_source(source: str, scratch: Path) -> str:
    """What to tell pip for ``source``."""
    path = Path(source).expanduser().resolve()
    if not path.exists():
        return source
    if is_bare_repository(path):
        return f"git+{path.as_uri()}"
    if path.is_file():
        return str(path)
    # A build writes into its source folder, and takes what an older build left there.
    copy = scratch / "solo-learn"
    for file in host_files(path):
        target = copy / file.relative_to(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    return str(copy)


def build_environment(scratch: Path) -> dict[str, str]:
    """The variables under which pip can build solo-learn: its setup.py needs pkg_resources."""
    constraints = scratch / "build-constraints.txt"
    constraints.write_text("setuptools<81\n", encoding="utf-8")
    # pip up to 26.1 reads the first for builds, newer ones the second.
    names = ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT")
    return {**os.environ, **{name: str(constraints) for name in names}}


def install_project(python: Path, host: dict[str, Any] | None) -> None:
    """Installs the project, editable, with all extras that the host does not make needless."""
    requires = (host or {}).get("requires") or []
    extras = EXTRAS + (
        ["pypi-release"] if any("pytorch-lightning" in line for line in requires) else []
    )
    say("installing the project and its dependencies; the first time, these are several gigabytes")
    # The pins of solo-learn 1.0.2 cannot be met, so that pip would warn of them each time.
    pip_install(python, "--no-warn-conflicts", "--editable", f"{ROOT}[{','.join(extras)}]")


def stand_in_for_bolts(python: Path, host: dict[str, Any] | None) -> None:
    """Lets `import solo` work before `import metamask_solo` with solo-learn 1.0.2.

    That release imports a learning-rate schedule from lightning-bolts, which does not import with
    Lightning 2. The stand-in loads the schedule from the project's file of bridges.
    """
    if (host or {}).get("version") != "1.0.2" or succeeds([str(python), "-c", "import pl_bolts"]):
        return
    site = Path(
        output(
            [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        ).strip()
    )
    package = site / "pl_bolts" / "optimizers"
    package.mkdir(parents=True, exist_ok=True)
    (site / "pl_bolts" / "__init__.py").write_text("", encoding="utf-8")
    (package / "__init__.py").write_text("", encoding="utf-8")
    (package / "lr_scheduler.py").write_text(_BOLTS, encoding="utf-8")


def check_torch(python: Path) -> None:
    """Makes sure that torch and torchvision are of one build, and can be imported.

    An index and a folder of wheels together can give, say, torch 2.13.0+cpu and torchvision
    0.28.0, which fail at import. Both are then taken without the label.
    """
    versions = json.loads(output([str(python), "-c", _PROBE_TORCH]))
    labels = [version.partition("+")[2] for version in versions]
    if labels[0] != labels[1]:
        torch, torchvision = (version.partition("+")[0] for version in versions)
        say(f"torch {versions[0]} and torchvision {versions[1]} are of two builds; replacing them")
        pip_install(python, f"torch==={torch}", f"torchvision==={torchvision}")
    if not succeeds([str(python), "-c", "import torch, torchvision"]):
        raise SetupError(
            f"torch {versions[0]} and torchvision {versions[1]} cannot be imported: "
            f"see {python} -c 'import torch, torchvision'"
        )


def read_stamp(venv: Path) -> dict[str, Any]:
    """What the last finished set-up noted; empty without one."""
    try:
        stamp: dict[str, Any] = json.loads((venv / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp


def write_stamp(venv: Path, stamp: dict[str, Any]) -> None:
    temporary = venv / f"{STAMP}.tmp"
    temporary.write_text(json.dumps(stamp), encoding="utf-8")
    temporary.replace(venv / STAMP)


def pip_install(python: Path, *arguments: str, env: dict[str, str] | None = None) -> None:
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    run([str(python), "-m", "pip", "install", *quiet, *arguments], env)


def say(line: str) -> None:
    print(f"setup: {line}", flush=True)


def run(command: list[str], env: dict[str, str] | None = None) -> None:
    code = subprocess.run(command, env=env, cwd=ROOT).returncode
    if code:
        raise SetupError(f"this command failed with exit code {code}: {' '.join(command)}")


def succeeds(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, cwd=ROOT).returncode == 0


def output(command: list[str]) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except FileNotFoundError as error:
        raise SetupError(f"{command[0]} is needed, and is not installed") from error
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise SetupError(f"this command failed ({reason}): {' '.join(command)}")
    return result.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
