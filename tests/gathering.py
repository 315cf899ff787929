"""What a process of a distributed test runs: a loss that gathers, and one that does not."""

from pathlib import Path

import torch
from torch import nn

from metamask_solo import DimensionalMask, mask_hypergradient, mean_over_processes, nt_xent
from metamask_solo.errors import UserError
from metamask_solo.method.hypergradient import METHODS


def gathering_and_not(rank: int, port: int, out: Path) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(rank)
    network, mask, x = nn.Linear(6, 4), DimensionalMask(4), torch.randn(2, 8, 6)
    refused = {}
    for gather in (True, False):

        def loss(gather: bool = gather) -> torch.Tensor:
            return nt_xent(*(mask(network(view)) for view in x), 0.5, gather=gather)

        for method in METHODS:
            try:
                optimizer = torch.optim.SGD(network.parameters(), 0.1)
                gradient = mask_hypergradient(loss, network, mask, optimizer, method)
                refused[gather, method] = ""
            except UserError as error:
                refused[gather, method] = str(error)
    mean = mean_over_processes(gradient)
    torch.save((refused, gradient, mean), out / f"{rank}.pt")
