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
  "-m pip --version") ;;
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
  "-c import torch"*)
    ! [ -e $here/unfit ] || {{ rm $here/unfit; exit 1; }} ;;
  *) PYTHONPATH=$here/site exec {python} -S "$@" ;;
esac
"""


class Project:
    """A folder with the Makefile in which `make setup` is called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copy(ROOT / "Makefile", folder)
        (folder / "pyproject.toml").touch()
        self.python = folder / "python"
        self.python.write_text(PYTHON.format(folder=folder, python=sys.executable))
        self.python.chmod(0o755)

    def set_up(self, code: int = 0, **variables: object) -> tuple[list[str], str]:
        """What pip was asked for, and the last line of the command itself."""
        (self.folder / "calls").unlink(missing_ok=True)
        variables = {"PYTHON": self.python, "VENV": "e nv", **variables}
        words = [
            "make",
            "--no-print-directory",
            "setup",
            *(f"{k}={v}" for k, v in variables.items()),
        ]
        # the suite is itself run by make
        env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        done = subprocess.run(words, cwd=self.folder, capture_output=True, text=True, env=env)
        assert bool(done.returncode) == bool(code), done.stdout + done.stderr
        calls = self.folder / "calls"
        said = [
            line for line in (done.stdout + done.stderr).splitlines() if "make: ***" not in line
        ]
        assert not code or len([line for line in said if "error" in line]) == 1
        return calls.read_text().splitlines() if calls.exists() else [], said[-1]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """solo-learn's sources, with data and an old build beside them."""
    folder = tmp_path / "a clone"
    for name in (
        "setup.py",
        "requirements.txt",
        "solo/__init__.py",
        "datasets/1.png",
        "build/x.py",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_without_solo_learn_the_release_is_installed_without_its_pins(project: Project) -> None:
    _, host, package = project.set_up()[0]
    assert "--no-deps --force-reinstall solo-learn==1.0.2" in host and "build.txt" in host
    assert re.search(r"--editable \.\[dev,.*,pypi-release\] \(\)$", package)

    assert project.set_up() == ([], "setup: e nv is up to date")

    os.utime(project.folder / "pyproject.toml", (2e9, 2e9))
    again = project.set_up()[0]  # and what is there stays
    assert len(again) == 2 and "--editable" in again[1]


def test_a_named_clone_is_installed_and_kept(project: Project, clone: Path) -> None:
    project.set_up()
    calls, _ = project.set_up(SOLO_LEARN=clone)
    assert "--force-reinstall" in calls[1] and "pypi-release" not in calls[2]
    built = (project.folder / "clone_files").read_text().split()
    assert built == ["./requirements.txt", "./setup.py", "./solo/__init__.py"]
    assert project.set_up(SOLO_LEARN=clone)[0] == project.set_up()[0] == []

    os.utime(clone / "solo/__init__.py", (2e9, 2e9))
    assert len(project.set_up(SOLO_LEARN=clone)[0]) == 3


def test_a_failed_set_up_is_one_line_and_is_not_taken_for_a_finished_one(project: Project) -> None:
    project.set_up()
    os.utime(project.folder / "Makefile", (1e9, 1e9))
    (project.folder / "pyproject.toml").touch()
    (project.folder / "broken").touch()
    assert project.set_up(code=1)[1] == "setup: error: this failed: pip install pip>=22"
    (project.folder / "broken").unlink()
    assert len(project.set_up()[0]) == 2


def test_torch_and_torchvision_that_do_not_fit_are_replaced(project: Project) -> None:
    for name, version in (("torch", "2.13.0+cpu"), ("torchvision", "0.28.0")):
        metadata = project.folder / f"site/{name}-{version}.dist-info/METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (project.folder / "unfit").touch()
    assert "torch===2.13.0 torchvision===0.28.0 ()" in project.set_up()[0][-1]


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("SOLO_LEARN", "./no-such-folder", "no such file or folder"),
        ("SOLO_LEARN", "/", "holds no setup.py beside a folder solo"),
        ("PYTHON", "no-such-python", " is no Python 3.10 or newer"),
    ],
)
def test_a_wrong_variable_is_one_line(project: Project, key: str, value: str, error: str) -> None:
    calls, said = project.set_up(code=1, **{key: value})
    assert calls == [] and f"{key}={value}" in said and error in said
    assert not (project.folder / "e nv").exists()


@pytest.fixture(scope="module")
def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_solo_learn_is_no_dependency_and_every_extra_is_set_up(pyproject: dict) -> None:
    extras = pyproject["project"]["optional-dependencies"]
    needs = pyproject["project"]["dependencies"] + sum(extras.values(), [])
    assert len(needs) > 20 and not [need for need in needs if need.startswith("solo")]
    installed = re.search(r"^extras=(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert installed is not None and {*installed[1].split(","), "pypi-release"} == set(extras)


def test_the_oldest_versions_are_the_lower_bounds(pyproject: dict) -> None:
    extras = pyproject["project"]["optional-dependencies"]
    needs = pyproject["project"]["dependencies"] + extras["pypi-release"]
    needs += [need for need in extras["dev"] if need.startswith("setuptools")]
    bounds = {need.replace(">=", "==") for need in needs if ">=" in need.partition(";")[0]}
    lines = (ROOT / "tools" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    assert {line for line in lines if not line.startswith("#")} == bounds


def test_help_lists_every_target() -> None:
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert targets is not None
    assert re.findall(r"^  make ([a-z]+)", listed.stdout, re.MULTILINE) == targets[1].split()
