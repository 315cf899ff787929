"""The order of the training images: shuffled by seed and epoch alone."""

from collections.abc import Iterator
from typing import Any

import torch
from omegaconf import DictConfig
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from metamask_solo.data.images import ReadableImages
from metamask_solo.errors import UserError


class EpochShuffle(DistributedSampler[int]):
    """Shuffles by (seed, epoch) alone, so that a resumed run sees the batches it would have seen.

    The loader must draw its workers' seeds from ``generator`` as well. With several processes,
    each gets its own share of the same order. It is a DistributedSampler so that Lightning does
    not put one around it, which would hide ``skip``.

    Attributes:
        skip: how many images of this epoch this process has seen already.
    """

    def __init__(self, dataset: Any, seed: int):
        # the processes are not there yet: their number is asked for when an epoch starts
        super().__init__(dataset, num_replicas=1, rank=0, seed=seed)
        self.size = len(dataset)
        self.generator = torch.Generator()
        self.start_at(0, 0)

    def start_at(self, epoch: int, skip: int) -> None:
        """Makes the next iteration that of ``epoch``, without its first ``skip`` images."""
        self.epoch, self.skip = epoch, skip
        self.epoch_seed = self.seed * 1_000_003 + epoch
        self.generator.manual_seed(self.epoch_seed)

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.start_at(epoch, self.skip if epoch == self.epoch else 0)

    def __iter__(self) -> Iterator[int]:
        # a generator of its own: how much of the other was drawn must not decide the order
        generator = torch.Generator().manual_seed(self.epoch_seed)
        order = torch.randperm(self.size, generator=generator).tolist()
        processes, rank = _processes()
        return iter(order[: self.size - self.size % processes][rank::processes][self.skip :])

    def __len__(self) -> int:
        return self.size // _processes()[0]


def _processes() -> tuple[int, int]:
    """Number of processes of this run, and which one this is."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return 1, 0


def training_loader(dataset: Dataset[Any], cfg: DictConfig) -> DataLoader[Any]:
    """The shuffled training loader of a config."""
    sampler = EpochShuffle(dataset, cfg.seed)
    processes = len(cfg.devices) * cfg.num_nodes
    if len(sampler) // processes < cfg.optimizer.batch_size:
        share = f", to be shared by {processes} processes" if processes > 1 else ""
        raise UserError(
            f"optimizer.batch_size={cfg.optimizer.batch_size}: the training data have only "
            f"{len(sampler)} images{share}"
        )
    return DataLoader(
        ReadableImages(dataset),
        batch_size=cfg.optimizer.batch_size,
        sampler=sampler,
        generator=sampler.generator,
        num_workers=cfg.data.num_workers,
        pin_memory=torch.cuda.is_available(),
        drop_last=True,
    )
