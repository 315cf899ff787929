"""What a command prints at its end: where its results lie, and what can be done next."""

from pathlib import Path


def print_ending(made: str | Path, *commands: str) -> None:
    """Prints ``made`` and one line for each command that may follow."""
    print(made)
    for number, command in enumerate(commands):
        print(f"{'next: ' if number == 0 else '      '}metamask-solo {command}")


def config_path(folder: str) -> str:
    """A folder of YAML files, such as ``pretrain/custom``, as --config-path takes it from here."""
    place = Path("scripts", folder)
    return (
        str(place) if place.is_dir() else f"pkg://metamask_solo.scripts.{folder.replace('/', '.')}"
    )
