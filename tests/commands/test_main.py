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


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("benchmark no-such-file.yaml --tables-only", "no-such-file"),
        ("demo --epochs=0", "epochs=0"),
    ],
)
def test_overrides_may_stand_behind_options(
    command: str, line: str, refused, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    # the arguments were read; what they name is not there
    assert line in refused([*command.split(), "no_such_key=1"])
