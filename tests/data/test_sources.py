"""Data sets that go to workers: seeds by image, and every way to start a process."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from runs import pretrain_config, write_images
from torch.utils.data import DataLoader
from torchvision import transforms

from metamask_solo.data.folders import find_images
from metamask_solo.data.reading import ReadingRule
from metamask_solo.data.seeds import image_seed
from metamask_solo.data.sources import FolderSource, Images
from metamask_solo.errors import UserError
from metamask_solo.training.sampling import (
    EpochShuffle,
    automatic_workers,
    training_loader,
    workers_of,
)


class Draws:
    """What a transform would draw from each of the three generators."""

    def __call__(self, image: Any) -> Any:
        import random

        return torch.tensor([torch.rand(1).item(), random.random(), np.random.random()])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_images(tmp_path / "data", classes=3, train=4, val=2)


def images_of(data: Path, transform: Any = None) -> Images:
    source = FolderSource(find_images(data / "train", "data"), ReadingRule())
    return Images(source, transform or Draws(), with_index=True)


def one_epoch(dataset: Any, epoch: int, skip: int = 0, workers: int = 0, **options: Any) -> Any:
    """Image index to what was drawn for it."""
    sampler = EpochShuffle(dataset, seed=3)
    sampler.start_at(epoch, skip)
    loader = DataLoader(dataset, batch_size=2, sampler=sampler, num_workers=workers, **options)
    return {
        int(index): drawn
        for indices, draws, _ in loader
        for index, drawn in zip(indices, draws.tolist(), strict=True)
    }


def test_draws_depend_on_seed_epoch_and_image_alone(data: Path) -> None:
    dataset = images_of(data)
    torch.manual_seed(0)
    first = one_epoch(dataset, 0)
    torch.manual_seed(1)
    assert one_epoch(dataset, 0) == first
    assert one_epoch(dataset, 0, workers=1) == first
    assert one_epoch(dataset, 0, workers=2, persistent_workers=True) == first
    other = one_epoch(dataset, 1)
    assert other.keys() == first.keys()
    drawn = [tuple(values) for values in (*first.values(), *other.values())]
    for generator in range(3):
        assert len({values[generator] for values in drawn}) == 24


def test_an_epoch_goes_on_in_its_middle(data: Path) -> None:
    dataset = images_of(data)
    whole = one_epoch(dataset, 4)
    rest = one_epoch(dataset, 4, skip=6, workers=2)
    assert len(rest) == 6 and all(whole[index] == drawn for index, drawn in rest.items())


def test_persistent_workers_draw_anew_in_each_epoch(data: Path) -> None:
    cfg = pretrain_config(data, data / "runs", data__num_workers=2)
    cfg.optimizer.batch_size, cfg.devices = 4, [0]
    cfg.num_nodes = 1
    loader = training_loader(images_of(data), cfg)
    assert loader.persistent_workers
    epochs = []
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        epochs.append({int(i): d for b in loader for i, d in zip(b[0], b[1].tolist(), strict=True)})
    for epoch, drawn in enumerate(epochs):
        sampler = EpochShuffle(loader.dataset, cfg.seed)
        sampler.start_at(epoch, 0)
        assert drawn == {int(b[0]): b[1].tolist() for b in map(loader.dataset.__getitem__, sampler)}


def test_the_processs_own_random_numbers_stay_as_they_were(data: Path) -> None:
    import random

    dataset = images_of(data)

    def state() -> Any:
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    before = state()
    one_epoch(dataset, 0)
    # a loader without a generator of its own takes one number of torch's
    assert state()[1:] == before[1:]
    dataset[(3, 17)]
    torch_before = torch.get_rng_state()
    dataset.__getitems__([(0, 5), (1, 6)])
    assert torch.equal(torch.get_rng_state(), torch_before)


def test_seeds_of_different_images_differ() -> None:
    seeds = {
        image_seed(seed, epoch, index)
        for seed in (0, 1, 5)
        for epoch in range(20)
        for index in range(500)
    }
    assert len(seeds) == 3 * 20 * 500
    bits = np.unpackbits(np.array(sorted(seeds), np.uint64).view(np.uint8)).reshape(-1, 64)
    assert np.abs(bits.mean(0) - 0.5).max() < 0.02


def test_two_processes_draw_different_numbers(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from metamask_solo.training import sampling

    dataset = images_of(data)
    whole = one_epoch(dataset, 0)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(sampling, "count_and_rank", lambda rank=rank: (2, rank))
        shares.append(one_epoch(dataset, 0))
    first, second = shares
    assert len(first) == len(second) == 6 and not first.keys() & second.keys()
    assert not {v[0] for v in first.values()} & {v[0] for v in second.values()}
    # and an image is augmented as on one process
    assert first | second == whole


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_every_way_to_start_a_worker(start: str, data: Path) -> None:
    transform = transforms.Compose([transforms.RandomResizedCrop(8), transforms.ToTensor()])
    dataset = images_of(data, transform)
    plain = one_epoch(dataset, 2)
    assert one_epoch(dataset, 2, workers=1, multiprocessing_context=start) == plain


def test_the_data_set_of_a_config_can_be_pickled(data: Path) -> None:
    from metamask_solo.training.pretraining import prepare_pretraining

    _, _, loader, validation = prepare_pretraining(pretrain_config(data, data / "runs"))
    for found in (loader.dataset, validation.dataset):
        again = pickle.loads(pickle.dumps(found))
        first, second = found[(1, 7)], again[(1, 7)]
        for one, two in zip(first, second, strict=True):
            pairs = zip(one, two, strict=True) if isinstance(one, list) else [(one, two)]
            assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs)


def test_a_failing_transform_is_no_unreadable_image(data: Path) -> None:
    def fail(image: Any) -> Any:
        raise ValueError("bits must be at least 1")

    with pytest.raises(UserError, match=r"0\.png: was read, but its transform failed \(ValueError"):
        images_of(data, fail)[0]


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


def test_a_reference_of_the_benchmark_takes_auto(data: Path) -> None:
    from metamask_solo.benchmark.worker import _features

    cfg = pretrain_config(data, data / "runs", data__num_workers="auto")
    train, train_labels, _, val_labels = _features(torch.nn.Flatten(), cfg, "cpu")
    assert train.shape == (12, 3 * 32 * 32) and train_labels.tolist() == sorted([0, 1, 2] * 4)
    assert len(val_labels) == 6
