"""Fixtures for all tests."""

from pathlib import Path

import pytest
import torch
from runs import write_images

import metamask_solo  # noqa: F401  registers the method

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of five classes: 20 training and 10 validation images."""
    return write_images(tmp_path_factory.mktemp("images"))
