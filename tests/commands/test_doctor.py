"""What a report of a fault needs, also where solo-learn is missing or damaged."""

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from metamask_solo import __version__, hosts
from metamask_solo.__main__ import main
from metamask_solo.commands import doctor
from metamask_solo.hosts import bridges, online_metrics

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
DEVELOPERS = ("dev", "docs")


def report(capsys: pytest.CaptureFixture[str], code: int = 0) -> list[str]:
    """The lines of the report, each with single blanks."""
    assert main(["doctor"]) == code
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_the_report_says_what_is_installed_and_bridged(capsys: pytest.CaptureFixture[str]) -> None:
    lines = report(capsys)
    assert lines[0] == f"metamask-solo {__version__}"
    for name in ("torch", "torchvision", "lightning", "timm", "hydra-core", "omegaconf"):
        assert f"{name} {version(name)}" in lines
    release = "GitHub's main branch" if hosts.RELEASE == "main" else "1.0.2 of PyPI"
    assert f"release {release}" in lines
    text = " ".join(lines)
    assert all(method in text for method in hosts.METHODS)
    assert len(hosts.BRIDGED) >= 7 and all(what in text for what in hosts.BRIDGED.values())
    assert "threads of torch 1 in an operation" in text
    assert not any(line.startswith("trouble") for line in lines)


def test_every_bridge_is_listed_with_a_line_of_its_own() -> None:
    modules = [bridges, online_metrics]
    if hosts.RELEASE == "1.0.2":
        from metamask_solo.hosts import bridges_1_0_2

        modules.append(bridges_1_0_2)
    names = {name for m in modules for name in vars(m) if name.startswith("bridge_")}
    assert len(names) >= 4 and names <= set(hosts.BRIDGED)
    assert not any(text in (name, "") for name, text in hosts.BRIDGED.items())
    assert len(set(hosts.BRIDGED.values())) == len(hosts.BRIDGED)


def test_the_packages_are_those_that_are_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def names(lines: list[str]) -> set[str]:
        return {line.split(">")[0].split(";")[0].strip() for line in lines}

    assert set(doctor.NEEDED) == names(project["dependencies"])
    extras = project["optional-dependencies"]
    used = set().union(*(names(lines) for key, lines in extras.items() if key not in DEVELOPERS))
    assert used <= set(doctor.OPTIONAL)


def test_a_missing_package_is_trouble(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "NEEDED", (*doctor.NEEDED, "no-such-package"))
    monkeypatch.setattr(doctor, "OPTIONAL", ("another-one",))
    lines = report(capsys, code=1)
    assert "missing no-such-package" in lines and "not installed another-one" in lines
    assert lines[-1] == "trouble: not installed: no-such-package"


def test_without_solo_learn_the_rest_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "solo" else find(n))
    monkeypatch.delitem(sys.modules, "metamask_solo.hosts")
    lines = report(capsys, code=1)
    assert "release none: is not installed (ImportError)" in lines
    assert lines[-1].startswith("trouble: solo-learn is not installed: ")
    assert "make setup" in lines[-1]
    assert f"torch {version('torch')}" in lines and "MPS no" in " ".join(lines)


def test_a_damaged_solo_learn_is_said_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "solo" / "backbones").mkdir(parents=True)
    (tmp_path / "solo" / "__init__.py").write_text("raise AttributeError('half\\na package')\n")
    done = subprocess.run(
        [sys.executable, "-m", "metamask_solo", "doctor"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and not done.stderr, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "release none: does not import (AttributeError)" in lines
    assert lines[-1] == "trouble: solo-learn does not import: half a package"


def test_a_report_does_not_show_the_users_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/someone"))
    assert doctor._shown("/home/someone/solo", "/home/someonelse") == "~/solo, /home/someonelse"
