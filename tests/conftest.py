"""Fixtures for all tests."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from runs import write_images

import metamask_solo  # noqa: F401  registers the method

torch.set_num_threads(1)
# a shell that starts the tests in the background ignores Ctrl-C for them and all that they start
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Back to one thread after each test: numba, once UMAP ran, leaves the process with more."""
    yield
    torch.set_num_threads(1)


# a shell that starts the tests in the background ignores Ctrl-C for them and all that they start
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of five classes: 20 training and 10 validation images."""
    return write_images(tmp_path_factory.mktemp("images"))
