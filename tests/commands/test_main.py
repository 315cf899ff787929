"""The command line as a whole."""

from pathlib import Path

import pytest

from metamask_solo import commands
from metamask_solo.__main__ import main
from metamask_solo.commands import COMMANDS


def test_every_command_is_in_the_overview(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    shared = {"__init__", "options", "hydra_help"}
    modules = {path.stem for path in Path(commands.__file__).parent.glob("*.py")} - shared
    assert {name.replace("-", "_") for name in COMMANDS} == modules
    assert all(f"  {name} " in printed for name in COMMANDS)


def test_an_unknown_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrian"]) == 2
    assert "unknown command pretrian" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["benchmark no-such-file.yaml --tables-only", "demo --epochs=1"]
)
def test_overrides_may_stand_behind_options(
    command: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)

    assert main([*command.split(), "no_such_key=1"]) == 2

    # the arguments were read; what they name is not there
    line = capsys.readouterr().err
    assert "unrecognized arguments" not in line
    assert "no-such-file.yaml" in line or "no_such_key" in line
