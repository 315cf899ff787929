"""Who reads the images, and with which random numbers."""

import os
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from runs import image_loader

from metamask_solo.training.sampling import workers_of


@pytest.mark.parametrize(
    "cores, processes, on_gpu, workers",
    [(4, 1, False, 0), (8, 1, False, 2), (64, 1, False, 12), (16, 4, False, 0)]
    + [(1, 1, True, 1), (64, 1, True, 12), (16, 4, True, 3)],
)
def test_workers_are_chosen_by_cores_and_device(
    cores: int, processes: int, on_gpu: bool, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(cores), raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    cfg = OmegaConf.create({"devices": [*range(processes)], "data": {"num_workers": "auto"}})
    assert workers_of(cfg) == workers
    cfg.data.num_workers = 3
    assert workers_of(cfg) == 3


def test_an_evaluation_leaves_the_random_numbers_alone(images: Path) -> None:
    before = torch.get_rng_state()
    list(image_loader(images / "val"))
    assert torch.equal(torch.get_rng_state(), before)
