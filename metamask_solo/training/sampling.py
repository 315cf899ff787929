"""The order of the training images, and what is drawn for each: by seed and epoch alone."""

import os
from collections.abc import Iterator
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from metamask_solo.data.datasets import Images
from metamask_solo.data.loaders import ignore_signals
from metamask_solo.data.seeds import Draw, Generator, image_seed
from metamask_solo.errors import UserError
from metamask_solo.hosts.shared import process_count


def count_and_rank() -> tuple[int, int]:
    """The number of processes of this run, and which one this is; (1, 0) without others."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return 1, 0


class EpochShuffle(DistributedSampler[Any]):
    """Shuffles by (seed, epoch) alone, so that a resumed run sees the batches it would have seen.

    Each image comes with the seed of its augmentation, which depends on the run's seed, the epoch
    and the image: not on the worker that reads it, nor on the number of processes. So workers may
    live on from epoch to epoch, and a run may go on in the middle of an epoch. With several
    processes, each gets its own share of the same order. It is a DistributedSampler so that
    Lightning does not put one around it, which would hide ``skip``.

    Attributes:
        skip: how many images of this epoch this process has seen already.
    """

    def __init__(self, dataset: Any, seed: int):
        # the processes are not there yet: their number is asked for when an epoch starts
        super().__init__(dataset, num_replicas=1, rank=0, seed=seed)
        self.size = len(dataset)
        # for what a loader draws itself, so that it takes nothing from the process's numbers
        self.generator = Generator()
        self.start_at(0, 0)

    def start_at(self, epoch: int, skip: int) -> None:
        """Makes the next iteration that of ``epoch``, without its first ``skip`` images."""
        self.epoch, self.skip = epoch, skip
        self.epoch_seed = self.seed * 1_000_003 + epoch
        self.generator.manual_seed(self.epoch_seed)

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.start_at(epoch, self.skip if epoch == self.epoch else 0)

    def __iter__(self) -> Iterator[Draw]:
        # a generator of its own: how much of the other was drawn must not decide the order
        generator = torch.Generator().manual_seed(self.epoch_seed)
        order = torch.randperm(self.size, generator=generator).tolist()
        processes, rank = count_and_rank()
        share = order[: self.size - self.size % processes][rank::processes][self.skip :]
        epoch = self.epoch
        return iter((index, image_seed(self.seed, epoch, index)) for index in share)

    def __len__(self) -> int:
        return self.size // count_and_rank()[0]


def training_loader(dataset: Images, cfg: DictConfig) -> DataLoader[Any]:
    """The shuffled training loader of a config."""
    sampler = EpochShuffle(dataset, cfg.seed)
    processes = process_count(cfg)
    if len(sampler) // processes < cfg.optimizer.batch_size:
        share = f", to be shared by {processes} processes" if processes > 1 else ""
        raise UserError(
            f"optimizer.batch_size={cfg.optimizer.batch_size}: the training data have only "
            f"{len(sampler)} images{share}; give a smaller one"
        )
    workers = cfg.data.num_workers
    persistent = OmegaConf.select(cfg, "data.persistent_workers", default=None)
    return DataLoader(
        dataset,
        batch_size=cfg.optimizer.batch_size,
        sampler=sampler,
        generator=sampler.generator,
        num_workers=workers,
        worker_init_fn=ignore_signals,
        persistent_workers=workers > 0 and persistent is not False,
        pin_memory=torch.cuda.is_available(),
        drop_last=True,
    )


def trains_on_gpu(cfg: DictConfig | dict[str, Any]) -> bool:
    """Whether Lightning takes a GPU for this config, or for these arguments of its Trainer."""
    return torch.cuda.is_available() and cfg.get("accelerator") != "cpu"


def device_of(cfg: DictConfig | dict[str, Any]) -> str:
    """Where a run of this config computes; of several GPUs, the first."""
    devices = cfg.get("devices")
    gpu = f"cuda:{devices[0]}" if isinstance(devices, list | ListConfig) else "cuda"
    return gpu if trains_on_gpu(cfg) else "cpu"


def workers_of(cfg: DictConfig) -> int:
    """``data.num_workers`` as a number; ``auto`` is decided by the device and the cores.

    Where a GPU trains, each process gets its share of the cores but one, 12 at most. Where the CPU
    trains, workers take cores from training: none up to 4 cores, a quarter of them above.
    """
    workers = cfg.data.get("num_workers", 4)
    if workers != "auto":
        return int(workers)
    # in a container, a process may use fewer cores than the machine has
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = (cores or 1) // len(cfg.devices)
    if trains_on_gpu(cfg):
        return max(1, min(12, share - 1))
    return 0 if share <= 4 else min(12, share // 4)
