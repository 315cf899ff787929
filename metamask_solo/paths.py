"""Paths as people write them, and as they are shown to people."""

from pathlib import Path
from typing import Any


def user_path(text: str | Path) -> Path:
    """A path in which a leading ``~`` is the home folder, whichever way it came in.

    A shell expands ``--out ~/x``, but not ``--out=~/x``, ``data.train_path=~/x`` or YAML.
    """
    return Path(text).expanduser()


def as_text(name: Any) -> str:
    """A name for people: bytes of a file's name that are no text become question marks."""
    return str(name).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
