"""Which versions of packages there are."""

from importlib.metadata import PackageNotFoundError, version

import metamask_solo


def version_of(package: str) -> str | None:
    """The version of a package by its name for pip; None where it is not installed."""
    if package == "metamask-solo":  # pip knows the version that it installed, not the code of now
        return metamask_solo.__version__
    try:
        return version(package)
    except PackageNotFoundError:
        return None
