"""The order of the training images on several processes, and the number of workers."""

import pytest
from omegaconf import OmegaConf

from metamask_solo.errors import UserError
from metamask_solo.training import sampling
from metamask_solo.training.sampling import EpochShuffle, automatic_workers, workers_of


def test_two_processes_share_the_draws_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = dict(EpochShuffle(range(12), seed=3))
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(sampling, "count_and_rank", lambda rank=rank: (2, rank))
        shares.append(dict(EpochShuffle(range(12), seed=3)))
    first, second = shares
    assert len(first) == len(second) == 6 and not {*first.values()} & {*second.values()}
    assert first | second == whole


def test_workers_are_chosen_by_cores_and_device() -> None:
    assert [automatic_workers(cores, 1, False) for cores in (1, 2, 4, 8, 64)] == [0, 0, 0, 2, 12]
    assert [automatic_workers(cores, 1, True) for cores in (1, 2, 8, 64)] == [1, 1, 7, 12]
    assert automatic_workers(16, 4, True) == 3
    assert automatic_workers(16, 4, False) == 0
    cfg = OmegaConf.create({"accelerator": "cpu", "devices": [0], "data": {"num_workers": "auto"}})
    assert isinstance(workers_of(cfg), int)
    for wrong in (-1, "many", True, 1.5):
        cfg.data.num_workers = wrong
        with pytest.raises(UserError, match=f"data.num_workers={wrong}"):
            workers_of(cfg)
