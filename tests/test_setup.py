"""`make setup`: what it installs, what it keeps, when it has nothing to do, and what it refuses.

A script plays the Python: it notes what pip is asked for, and makes solo-learn's metadata.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PYTHON = """#!/bin/sh
here={folder} host={folder}/site/solo_learn-1.dist-info
case "$1 $2 $3" in
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip --version" | "-c import torch"*) ;;
  "-m pip install")
    echo "$* ($PIP_CONSTRAINT)" >>$here/calls
    ! [ -e $here/broken ] || exit 1
    case "$*" in *--no-deps*) ;; *) exit ;; esac
    for last; do :; done
    [ -d "$last" ] && needs=lightning || needs=pytorch-lightning
    mkdir -p $host
    echo "Metadata-Version: 2.1,Name: solo-learn,Version: 1,Requires-Dist: $needs" |
      tr , '\\n' >$host/METADATA
    ! [ -d "$last" ] || (cd "$last" && find . -type f | sort) >$here/clone_files ;;
  *) PYTHONPATH=$here/site exec {python} -S "$@" ;;
esac
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the Makefile in which `make setup` is called."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "python").write_text(PYTHON.format(folder=tmp_path, python=sys.executable))
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def set_up(project: Path, code: int = 0, **variables: object) -> tuple[list[str], str]:
    """What pip was asked for, and the last line of the command itself."""
    calls = project / "calls"
    calls.write_text("")
    variables = {"PYTHON": project / "python", "VENV": "e nv", **variables}
    command = ["make", "--no-print-directory", "setup", *(f"{k}={v}" for k, v in variables.items())]
    # the suite is itself run by make
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, env=env)
    assert bool(done.returncode) == bool(code), done.stdout + done.stderr
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "make: ***" not in line]
    assert len([line for line in lines if "error" in line]) == code
    return calls.read_text().splitlines(), lines[-1]


def test_without_solo_learn_the_release_is_installed_without_its_pins(project: Path) -> None:
    _, host, package = set_up(project)[0]
    assert "--no-deps --force-reinstall solo-learn==1.0.2" in host and "build.txt" in host
    assert re.search(r"--editable \.\[dev,.*,pypi-release\] \(\)$", package)
    assert set_up(project) == ([], "setup: e nv is up to date")
    os.utime(project / "pyproject.toml", (2e9, 2e9))
    again = set_up(project)[0]  # and what is there stays
    assert len(again) == 2 and "--editable" in again[1]


def test_a_named_clone_is_installed_and_kept(project: Path) -> None:
    """Without the data and the old build beside its sources."""
    clone, names = project / "a clone", ("./requirements.txt", "./setup.py", "./solo/__init__.py")
    for name in (*names, "datasets/1.png", "build/x.py"):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).touch()
    set_up(project)
    calls, _ = set_up(project, SOLO_LEARN=clone)
    assert "--force-reinstall" in calls[1] and "pypi-release" not in calls[2]
    assert (project / "clone_files").read_text().split() == [*names]
    assert set_up(project, SOLO_LEARN=clone)[0] == set_up(project)[0] == []
    os.utime(clone / "solo/__init__.py", (2e9, 2e9))
    assert len(set_up(project, SOLO_LEARN=clone)[0]) == 3


def test_a_failed_set_up_is_one_line_and_is_not_taken_for_a_finished_one(project: Path) -> None:
    (project / "broken").touch()
    assert set_up(project, 1)[1] == "setup: error: this failed: pip install pip>=22"
    (project / "broken").unlink()
    assert len(set_up(project)[0]) == 3


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("SOLO_LEARN", "./no-such-folder", "no such file or folder"),
        ("SOLO_LEARN", "/", "holds no setup.py beside a folder solo"),
        ("PYTHON", "no-such-python", " is no Python 3.10 or newer"),
    ],
)
def test_a_wrong_variable_is_one_line(project: Path, key: str, value: str, error: str) -> None:
    calls, line = set_up(project, 1, **{key: value})
    assert calls == [] and f"{key}={value}" in line and error in line


def test_makefile_and_constraints_follow_pyproject() -> None:
    """solo-learn is no dependency: installing a plug-in must not replace its host."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    makefile, extras = (ROOT / "Makefile").read_text(), project["optional-dependencies"]
    (installed,) = re.findall(r"^extras=(.*)$", makefile, re.MULTILINE)
    assert {*installed.split(","), "pypi-release"} == set(extras)
    needs = project["dependencies"] + extras["pypi-release"]
    assert len(needs) > 20 and not [n for n in needs if n.startswith("solo")]
    needs += [need for need in extras["dev"] if need.startswith("setuptools")]
    bounds = {need.replace(">=", "==") for need in needs if ">=" in need.partition(";")[0]}
    lines = (ROOT / "tools" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    assert {line for line in lines if not line.startswith("#")} == bounds
