"""The parts without the method; tests/docs runs the page."""

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import metamask_solo
from metamask_solo import DimensionalMask, mask_hypergradient
from metamask_solo.hosts import pl


def test_the_pages_import_every_public_name() -> None:
    pages = [p.read_text() for p in (Path(__file__).parents[2] / "docs").glob("*.md")]
    imported = " ".join(re.findall(r"^from metamask_solo import (.*)", "\n".join(pages), re.M))
    assert {*re.findall(r"\w+", imported)} >= {*metamask_solo.__all__} - {"MetaMask"}


@pytest.mark.parametrize("name", ["hypergradient", "mask", "losses"])
def test_examples_of_docstrings(name: str) -> None:
    module = importlib.import_module(f"metamask_solo.method.{name}")
    names = {"torch": torch, "nn": nn, "DimensionalMask": DimensionalMask}
    result = doctest.testmod(module, extraglobs=names)
    assert result.failed == 0 and result.attempted > 0


def test_a_whole_module_and_lightnings_optimiser() -> None:
    """As in a LightningModule: ``self``, which holds the mask, and ``self.optimizers()``."""
    network, mask = nn.Linear(6, 8), DimensionalMask(8)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)

    def loss() -> Tensor:
        return mask(network(torch.eye(6))).sin().sum()

    expected = mask_hypergradient(loss, network, mask, optimizer)
    wrapped = pl.core.optimizer.LightningOptimizer(optimizer)
    result = mask_hypergradient(loss, nn.ModuleList([network, mask]), mask, wrapped)
    assert torch.equal(result, expected)
