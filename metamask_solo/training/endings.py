"""What a command prints at its end, and where the YAML files lie that it names."""

from pathlib import Path


def print_ending(made: str | Path, *commands: str) -> None:
    """Prints ``made`` and one line for each command that may follow."""
    print(made)
    for number, command in enumerate(commands):
        print(f"{'next: ' if number == 0 else '      '}metamask-solo {command}")


def scripts_folder() -> Path:
    """Where the YAML files are: in the repository, or installed with the package."""
    package = Path(__file__).resolve().parents[1]
    beside = package.parent / "scripts"
    return (beside if beside.is_dir() else package / "scripts").resolve()


def config_path(folder: str) -> str:
    """A folder of YAML files, such as ``pretrain/custom``, as --config-path takes it from here."""
    place = Path("scripts", folder)
    return (
        str(place) if place.is_dir() else f"pkg://metamask_solo.scripts.{folder.replace('/', '.')}"
    )
