"""The command line as a whole."""

import importlib

import pytest

from metamask_solo.__main__ import COMMANDS, main


@pytest.mark.parametrize("name", COMMANDS)
def test_the_overview_says_what_the_command_says(name: str) -> None:
    module = importlib.import_module(f"metamask_solo.commands.{name.replace('-', '_')}")

    assert COMMANDS[name] == module.HELP


def test_an_unknown_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrian"]) == 2
    assert "unknown command pretrian" in capsys.readouterr().err


def test_no_command_shows_the_overview(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in COMMANDS)
