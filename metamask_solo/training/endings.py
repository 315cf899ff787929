"""What a command prints at its end, and where the YAML files lie that it names."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path


def print_ending(made: str | Path, *commands: Sequence[object]) -> None:
    """Prints ``made`` and one line for each command that may follow, quoted for a shell."""
    print(made)
    for number, words in enumerate(commands):
        command = shlex.join(["metamask-solo", *map(str, words)])
        print(f"{'next: ' if number == 0 else '      '}{command}")


def override(key: str, value: str | Path) -> str:
    """``key=value`` as Hydra reads it, whatever a path is made of."""
    text = str(value)
    if re.fullmatch(r"[A-Za-z0-9_./+-]+", text) is None:
        # in Hydra's quotes, a backslash is one unless it stands before a quote
        text = '"' + re.sub(r'(\\*)"', r'\1\1\\"', re.sub(r"(\\+)$", r"\1\1", text)) + '"'
    return f"{key}={text}"


def scripts_folder() -> Path:
    """Where the YAML files are: in the repository, or installed with the package."""
    package = Path(__file__).resolve().parents[1]
    beside = package.parent / "scripts"
    return (beside if beside.is_dir() else package / "scripts").resolve()


def config_path(folder: str) -> str:
    """A folder of YAML files, such as ``pretrain/custom``, as --config-path takes it from here."""
    path = Path("scripts", folder)
    package = f"pkg://metamask_solo.scripts.{folder.replace('/', '.')}"
    return str(path) if path.is_dir() else package
