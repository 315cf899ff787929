"""One hypergradient by this package, by a double backward, and by torchopt: time and peak memory.

    python tools/hypergradient_cost.py --rounds 5

ResNet-18 and two views of images of 32 pixels, on the CPU: with its own stem, where parameters are
most of the memory, and with the 3×3 stem, where activations are. The rounds take turns; each peak
is that of two in a process of its own, less what the process holds before the first.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable

import timm
import torch
import torchopt
from torch import Tensor, nn
from tqdm import tqdm

from metamask_solo import DimensionalMask, mask_hypergradient, nt_xent
from metamask_solo.benchmark.step_cost import peak_memory

LR = 0.05
BATCH_SIZES = {"7×7": 64, "3×3": 32}  # of each stem


def hypergradients(stem: str) -> dict[str, Callable[[], Tensor]]:
    """Each way to compute the hypergradient of one and the same state."""
    torch.manual_seed(0)
    backbone = timm.create_model("resnet18", num_classes=0)
    if stem == "3×3":
        backbone.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        backbone.maxpool = nn.Identity()
    head, mask = nn.Linear(512, 128), DimensionalMask(512)
    network = nn.ModuleList([backbone, head])
    optimizer = torch.optim.SGD(network.parameters(), lr=LR)
    views = torch.randn(2, BATCH_SIZES[stem], 3, 32, 32)

    def loss() -> Tensor:
        z1, z2 = (head(mask(backbone(view))) for view in views)
        return nt_xent(z1, z2, 0.2)

    def by_torchopt() -> Tensor:
        before = torchopt.extract_state_dict(network)
        mask.logits.requires_grad_()
        torchopt.MetaSGD(network, lr=LR).step(loss())
        (gradient,) = torch.autograd.grad(loss(), mask.logits)
        torchopt.recover_state_dict(network, before)
        mask.logits.requires_grad_(False)
        return gradient

    return {
        "exact": lambda: mask_hypergradient(loss, network, mask, optimizer),
        "double_backward": lambda: mask_hypergradient(
            loss, network, mask, optimizer, "double_backward"
        ),
        "torchopt": by_torchopt,
    }


def peak(stem: str, name: str) -> float:
    """MiB that one way, run twice, adds to a fresh process."""
    torch.set_num_threads(1)
    way = hypergradients(stem)[name]
    before = peak_memory(torch.device("cpu"))
    for _ in range(2):
        way()
    return peak_memory(torch.device("cpu")) - before


def main() -> None:
    """Prints one line for each way."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    rounds = parser.parse_args().rounds

    torch.set_num_threads(1)
    print("| stem | way | time | lowest to highest | peak memory | distance from exact |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for stem in BATCH_SIZES:
        ways = hypergradients(stem)
        gradients = {name: way() for name, way in ways.items()}  # and warms up
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in tqdm(range(rounds), desc=stem, leave=False):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - start)
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            memory = {name: pool.apply(peak, (stem, name)) for name in ways}
        for name, each in seconds.items():
            ratios = [one / base for one, base in zip(each, seconds["exact"], strict=True)]
            error = (gradients[name] - gradients["exact"]).norm() / gradients["exact"].norm()
            print(
                f"| {stem} | {name} | {statistics.median(ratios):.2f} "
                f"| {min(ratios):.2f} to {max(ratios):.2f} "
                f"| {memory[name] / memory['exact']:.2f} | {float(error):.0e} |"
            )


if __name__ == "__main__":
    main()
