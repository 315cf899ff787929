"""The processes of a distributed run."""

import torch


def count_and_rank() -> tuple[int, int]:
    """The number of processes of this run, and which one this is; (1, 0) without others."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return 1, 0
