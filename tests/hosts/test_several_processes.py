"""Which of solo-learn's losses several processes change, as the table of known faults says."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from solo.losses.barlow import barlow_loss_func
from solo.losses.simclr import simclr_loss_func
from solo.losses.vicreg import vicreg_loss_func
from torch import Tensor

from metamask_solo.hosts import RELEASE

pytestmark = pytest.mark.ddp
PROCESSES, IMAGES, DIMS = 2, 6, 4
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def simclr(z1: Tensor, z2: Tensor, indexes: Tensor) -> Tensor:
    if RELEASE == "1.0.2":
        return simclr_loss_func(z1, z2, temperature=0.2)
    return simclr_loss_func(torch.cat((z1, z2)), indexes.repeat(2), 0.2)


def vicreg(z1: Tensor, z2: Tensor, indexes: Tensor) -> Tensor:
    return vicreg_loss_func(z1, z2)


def barlow(z1: Tensor, z2: Tensor, indexes: Tensor) -> Tensor:
    return barlow_loss_func(z1.float(), z2.float())


def gradient(loss: Loss, weight: Tensor, views: Tensor, indexes: Tensor) -> Tensor:
    leaf = weight.clone().requires_grad_()
    z1, z2 = (torch.tanh(view @ leaf) for view in views)
    return torch.autograd.grad(loss(z1, z2, indexes), leaf)[0]


def on_processes(loss: Loss, weight: Tensor, shards: list[Tensor]) -> Tensor:
    """The gradient as DDP takes it: the mean of those of the processes, each with a shard."""
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank, shard in enumerate(shards):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    dist.init_process_group(
                        "gloo", f"file://{folder}/meet", rank=rank, world_size=len(shards)
                    )
                    indexes = torch.arange(IMAGES) + rank * IMAGES
                    torch.save(gradient(loss, weight, shard, indexes), f"{folder}/{rank}.pt")
                    dist.barrier()
                    code = 0
                finally:
                    os._exit(code)
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * len(shards)
        parts = [torch.load(Path(folder, f"{rank}.pt")) for rank in range(len(shards))]
    return torch.stack(parts).mean(0)


@pytest.fixture(scope="module")
def shards() -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, IMAGES, DIMS, generator=draw, dtype=torch.float64) for _ in range(PROCESSES)
    ]


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return torch.randn(DIMS, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("loss", [simclr, vicreg])
def test_the_batch_of_all_or_of_each(loss: Loss, weight: Tensor, shards: list[Tensor]) -> None:
    indexes = torch.arange(IMAGES)
    of_all = gradient(loss, weight, torch.cat(shards, 1), torch.arange(2 * IMAGES))
    of_each = torch.stack([gradient(loss, weight, shard, indexes) for shard in shards]).mean(0)
    assert not torch.allclose(of_all, of_each, rtol=1e-2)

    shared = on_processes(loss, weight, shards)

    expected = of_each if RELEASE == "1.0.2" else of_all
    assert torch.allclose(shared, expected, rtol=1e-6)


def test_barlow_twins_gradient_is_divided(weight: Tensor, shards: list[Tensor]) -> None:
    same = [shards[0]] * PROCESSES  # so that each process has the statistics of all

    shared = on_processes(barlow, weight, same)

    whole = gradient(barlow, weight, shards[0], torch.arange(IMAGES))
    assert torch.allclose(shared * PROCESSES, whole, rtol=1e-4)
