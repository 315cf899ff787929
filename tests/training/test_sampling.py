"""The order of the training images on several processes, and the number of workers."""

import os

import pytest
import torch
from omegaconf import OmegaConf

from metamask_solo.training import sampling
from metamask_solo.training.sampling import EpochShuffle, workers_of


def test_two_processes_share_the_draws_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = dict(EpochShuffle(range(12), seed=3))
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(sampling, "count_and_rank", lambda rank=rank: (2, rank))
        shares.append(dict(EpochShuffle(range(12), seed=3)))
    first, second = shares
    assert len(first) == len(second) == 6 and not {*first.values()} & {*second.values()}
    assert first | second == whole


@pytest.mark.parametrize(
    "cores, processes, on_gpu, workers",
    [(1, 1, False, 0), (4, 1, False, 0), (8, 1, False, 2), (64, 1, False, 12), (16, 4, False, 0)]
    + [(1, 1, True, 1), (8, 1, True, 7), (64, 1, True, 12), (16, 4, True, 3)],
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
