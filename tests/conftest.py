"""Fixtures for all tests."""

import gc
import signal
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import torch
from runs import write_images
from small_resnet import replace_resnet18

from metamask_solo.hosts import METHODS

torch.set_num_threads(1)
# a shell that starts the tests in the background ignores Ctrl-C for them and all that they start
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Back to one thread after each test: numba, once UMAP ran, leaves the process with more."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def methods_of_a_test_go_with_it() -> Iterator[None]:
    """solo-learn's table of methods is as before after a test that registers one of its own."""
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


_tests = count(1)


@pytest.fixture(autouse=True)
def models_of_before_are_gone() -> Iterator[None]:
    """Trained models are reference cycles; left to Python, they grow to 8 GB over the tests."""
    yield
    if next(_tests) % 10 == 0:
        gc.collect()


@pytest.fixture(scope="module")
def small_backbone() -> Iterator[None]:
    """resnet18 is a backbone of a millisecond, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        replace_resnet18(patch.setattr)
        yield


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of five classes: 20 training and 10 validation images."""
    return write_images(tmp_path_factory.mktemp("images"))
