"""Marks the tests of this folder as ``faults``, but for those that are ``soak``."""

from pathlib import Path

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # `make faults` selects by this mark alone, and must leave the long ones to `make soak`
    for item in items:
        if Path(__file__).parent in item.path.parents and not item.get_closest_marker("soak"):
            item.add_marker("faults")
