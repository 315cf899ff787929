"""Help and version of the commands that have Hydra's command line."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import metamask_solo
from metamask_solo.__main__ import main
from metamask_solo.commands import hydra_help
from metamask_solo.method.settings import SETTINGS, MetaMaskSettings
from metamask_solo.training.config_keys import known_keys, trainer_arguments
from metamask_solo.validation import allowed

SCRIPTS = Path(__file__).parents[2] / "scripts"
COMMANDS = ("pretrain", "linear", "finetune")


def keys(known: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys of a section; of a list of pipelines with N for the number."""
    for name, inner in known.items():
        key = f"{prefix}{name}"
        if name == "augmentations" and not prefix:
            yield key
            yield from keys(inner, f"{key}.N.")
        elif inner and "*" not in inner:
            yield from keys(inner, f"{key}.")
        else:
            yield key


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_has_usage_files_and_every_setting(
    command: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, option]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: metamask-solo {command} --config-path")
    known = {k: v for k, v in known_keys(command).items() if k not in trainer_arguments()}
    listed = [row[0] for row in hydra_help.rows_of(command)]
    assert sorted(listed) == sorted(keys(known))
    kind = "pretrain" if command == "pretrain" else "linear"
    for folder in (SCRIPTS / kind).iterdir():
        if folder.is_dir() and any(folder.glob("*.yaml")):
            assert f"  {kind}/{folder.name}: " in text
    for key, setting in SETTINGS.items() if command == "pretrain" else ():
        (line,) = [row for row in hydra_help.rows_of_model(MetaMaskSettings) if row[0] == key]
        assert line[2:] == (allowed(setting), setting.description)
        assert f"  {key}: " in text
    assert max(map(len, text.splitlines())) <= hydra_help.WIDTH + 30  # a path may be long


@pytest.mark.parametrize("command", COMMANDS)
def test_hydras_own_help_and_the_version(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--hydra-help"]) == 0
    assert "--multirun" in capfd.readouterr().out
    for argv in ([command, "--version"], ["--version"]):
        assert main(argv) == 0
        line = capfd.readouterr().out
        assert line.startswith(f"metamask-solo {metamask_solo.__version__}, solo-learn ")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_does_not_wait_for_solo_learn(command: str) -> None:
    code = (
        "import sys; from metamask_solo.__main__ import main; "
        f"main(['{command}', '--help']); sys.exit('torch' in sys.modules or 'solo' in sys.modules)"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == 0
    assert time.monotonic() - start < 30
