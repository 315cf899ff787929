"""Writing files so that a reader never meets a half-written one."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from metamask_solo.errors import UserError


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Gives a path beside ``path``, and moves what the block makes there to ``path``.

    The block makes a file, which replaces one that is there, or a folder where there is none. If
    the block raises, ``path`` is left as it was and nothing else stays.

    Raises:
        UserError: the folder cannot be written to, or the disk is full.
    """
    path = Path(path)
    scratch = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        made = Path(scratch, "made")
        yield made
        if made.is_file():
            _sync(made)
        os.replace(made, path)
        _sync(path.parent)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    except RuntimeError as error:
        # torch.save hides the system's reason behind a line of its own source code
        if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        raise UserError(f"{path}: cannot be written (is the disk full?)") from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Removes what a killed process left of files named as ``pattern``."""
    for leftover in folder.glob(f".{pattern}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def _sync(path: Path) -> None:
    """Forces ``path`` to disk, so that the rename never comes before the content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
