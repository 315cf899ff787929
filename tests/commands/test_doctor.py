"""What a bug report needs, also where solo-learn is missing or damaged."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from metamask_solo import __version__, hosts
from metamask_solo.__main__ import main
from metamask_solo.commands import doctor

ROOT = Path(__file__).resolve().parents[2]


def words(text: str) -> list[str]:
    """The lines, each with single blanks."""
    return [" ".join(line.split()) for line in text.splitlines()]


def test_the_report_says_what_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = words(capsys.readouterr().out)
    assert lines[0] == f"metamask-solo {__version__}"
    for name in ("torch", "lightning", "timm", "hydra-core"):
        assert f"{name} {version(name)}" in lines
    release = "GitHub's main branch" if hosts.RELEASE == "main" else "1.0.2 of PyPI"
    assert f"release {release}" in lines
    assert f"methods {', '.join(hosts.trainable_methods())}" in lines
    assert "threads of torch 1" in lines
    assert not any(line.startswith("trouble") or str(Path.home()) in line for line in lines)


def test_a_missing_package_is_trouble(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = ["torch>=2", "none-such>=1", "another; extra == 'x'", "third; extra == 'dev'"]
    monkeypatch.setattr(doctor, "requires", lambda name: needs)
    assert main(["doctor"]) == 1
    lines = words(capsys.readouterr().out)
    assert "another not installed" in lines and not any("third" in line for line in lines)
    assert lines[-1] == "trouble: not installed: none-such"


@pytest.mark.parametrize(
    ("first", "trouble"),
    [
        ("sys.modules['solo'] = None", "solo-learn is not installed: "),
        ("pass", "solo-learn does not import: half a package"),
    ],
)
def test_without_a_solo_learn_that_imports_the_rest_is_said(
    first: str, trouble: str, tmp_path: Path
) -> None:
    (tmp_path / "solo").mkdir()
    (tmp_path / "solo/__init__.py").write_text("raise AttributeError('half\\na package')")
    code = (
        f"import sys; {first}; from metamask_solo.__main__ import main; sys.exit(main(['doctor']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,  # its solo comes first
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and not done.stderr, done.stderr
    lines = words(done.stdout)
    assert f"torch {version('torch')}" in lines and "MPS no" in lines
    assert lines[-1].startswith(f"trouble: {trouble}")
