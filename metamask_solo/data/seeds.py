"""Random numbers of an image's augmentation, from the run's seed, the epoch and the image alone."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

# an image's index in the data set, and the seed of its augmentation
Draw = tuple[int, int]
_WORD = 2**64 - 1


class Generator(torch.Generator):
    """A generator for a loader, which goes to another process by its seed alone.

    torch would send a temporary tensor, whose memory is gone before a spawned process asks for it.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return generator_of, (self.initial_seed(),)


def generator_of(seed: int) -> Generator:
    """A generator at the start of a seed's numbers."""
    generator = Generator()
    generator.manual_seed(seed)
    return generator


def image_seed(seed: int, epoch: int, index: int) -> int:
    """A number of 64 bits that looks random, and is another for each seed, epoch and image.

    Neither the process nor the loader's worker enters: processes see different images, so they draw
    different numbers, and an image is augmented alike on one process and on many.
    """
    word = seed
    for part in (epoch, index):
        word = _mixed((word ^ _mixed(part + 0x9E3779B97F4A7C15)) & _WORD)
    return word


def _mixed(word: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & _WORD
    return word ^ (word >> 31)


def start_at(seed: int) -> None:
    """Seeds all that transforms draw from: torch's CPU generator, Python's and NumPy's."""
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed: it would reset GPUs too
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)


@contextmanager
def states_kept() -> Iterator[None]:
    """Puts back what the process draws from, so that its own draws do not know of the images."""
    ours, pythons, numpys = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(ours)
        random.setstate(pythons)
        np.random.set_state(numpys)
