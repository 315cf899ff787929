"""The command line as a whole."""

import importlib
from pathlib import Path

import pytest

from metamask_solo.__main__ import main
from metamask_solo.commands import COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_module(name: str) -> None:
    module = importlib.import_module("metamask_solo.commands." + name.replace("-", "_"))
    assert callable(module.main)


def test_an_unknown_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrian"]) == 2
    assert "unknown command pretrian" in capsys.readouterr().err


def test_no_command_shows_the_overview(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in COMMANDS)


@pytest.mark.parametrize("name", ["benchmark", "demo", "profile"])
def test_overrides_may_stand_behind_options(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    option = {"benchmark": "--tables-only", "demo": "--epochs=1", "profile": "--steps=1"}[name]
    config = [] if name == "demo" else ["no-such-file.yaml"]
    monkeypatch.chdir(tmp_path)

    assert main([name, *config, option, "no_such_key=1"]) == 2

    # the arguments were read; what they name is not there
    line = capsys.readouterr().err
    assert "unrecognized arguments" not in line
    assert "no-such-file.yaml" in line or "no_such_key" in line
