"""Help and version of the commands that have Hydra's command line."""

from pathlib import Path

import pytest

import metamask_solo
from metamask_solo.__main__ import main
from metamask_solo.commands import hydra_help
from metamask_solo.method.settings import SETTINGS
from metamask_solo.training.config import Pretraining, Probe
from metamask_solo.validation import allowed, fields

SCRIPTS = Path(__file__).parents[2] / "scripts"
COMMANDS = ("pretrain", "linear", "finetune")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_usage_files_and_every_setting(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: metamask-solo {command} --config-path")
    settings = dict(fields(Pretraining if command == "pretrain" else Probe))
    for key, field in (settings | (SETTINGS if command == "pretrain" else {})).items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"  {key}: ")]
        assert allowed(field)[:20] in line
    kind = "pretrain" if command == "pretrain" else "linear"
    for folder in (SCRIPTS / kind).iterdir():
        if folder.is_dir() and any(folder.glob("*.yaml")):
            assert f"  {kind}/{folder.name}: " in text
    assert max(map(len, text.splitlines())) <= hydra_help.WIDTH + 30  # a path may be long


def test_hydras_own_help_and_the_version(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--hydra-help"]) == 0
    assert "--multirun" in capfd.readouterr().out
    for argv in (["linear", "--version"], ["--version"]):
        assert main(argv) == 0
        line = capfd.readouterr().out
        assert line.startswith(f"metamask-solo {metamask_solo.__version__}, solo-learn ")
