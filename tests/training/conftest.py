"""Fixtures of the tests of training."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def no_large_backbone(small_backbone: None) -> None:
    """What trains is tested here, and not the backbone."""
