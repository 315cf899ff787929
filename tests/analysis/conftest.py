"""The features of a checkpoint with a planted confounder, for the tests of this folder."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from metamask_solo.analysis.measure_checkpoint import Measures
from metamask_solo.analysis.measures import IntArray
from metamask_solo.analysis.subsets import Labelled

DIMS, CLASSES = 24, 4


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def confounded() -> Callable[..., tuple[Measures, dict[str, Labelled], IntArray]]:
    return make_confounded


def make_confounded(
    name: str = "1: metamask", masked: bool = True
) -> tuple[Measures, dict[str, Labelled], IntArray]:
    """What is known of it, features of both splits, and photographs.

    Dimensions 0 to 11 tell the class, 12 to 23 the photograph; the mask damps the latter.
    """
    rng = np.random.default_rng(0)

    def split(count: int) -> tuple[Labelled, IntArray]:
        labels, photograph = np.arange(count) % CLASSES, rng.integers(2, size=count)
        of_class = np.random.default_rng(9).normal(size=(CLASSES, 12))[labels]
        of_photograph = np.random.default_rng(8).normal(size=(2, 12))[photograph] * 3
        features = np.hstack([of_class, of_photograph]) + rng.normal(size=(count, DIMS))
        return Labelled(features.astype(np.float32), labels), photograph

    train, photograph = split(200)
    val, _ = split(80)
    mask = history = None
    if masked:
        mask = np.r_[np.linspace(0.6, 0.9, 12), np.linspace(0.1, 0.3, 12)].astype(np.float32)
        start = np.full(DIMS, 0.5, dtype=np.float32)
        history = pd.DataFrame([start, (start + mask) / 2, mask], index=[0, 10, 20])
    path = f"runs/{name.split(': ')[-1]}/last.ckpt"
    method = "metamask" if masked else "simclr"
    known = Measures(name, path, method, mask=mask, history=history)
    return known, {"train": train, "val": val}, photograph
