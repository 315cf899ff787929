"""The parts without the method, in a plain loop and in Lightning; tests/docs runs the page."""

import doctest
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from lightly.loss import NTXentLoss
from lightly.models.modules.heads import SimCLRProjectionHead
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import metamask_solo
from metamask_solo import DimensionalMask, mask_hypergradient
from metamask_solo.hosts import pl


def test_the_page_names_every_public_name() -> None:
    page = (Path(__file__).parents[2] / "docs" / "python.md").read_text()
    assert [n for n in metamask_solo.__all__ if n != "MetaMask" and n not in page] == []


@pytest.mark.parametrize("name", ["hypergradient", "mask", "losses"])
def test_examples_of_docstrings(name: str) -> None:
    module = importlib.import_module(f"metamask_solo.method.{name}")
    names = {"torch": torch, "nn": nn, "DimensionalMask": DimensionalMask}
    result = doctest.testmod(module, extraglobs=names)
    assert result.failed == 0 and result.attempted > 0


class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 8)
        self.backbone, self.head = nn.Sequential(*layers), SimCLRProjectionHead(8, 16, 4)
        self.mask, self.criterion = DimensionalMask(8), NTXentLoss(temperature=0.2)
        self.mask_optimizer = torch.optim.SGD([self.mask.logits], lr=1.0)

    def loss(self, x: Tensor) -> Tensor:
        z1, z2 = (self.head(self.mask(self.backbone(view))) for view in x.unbind(1))
        return self.criterion(z1, z2)  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        params = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(params, lr=0.1, momentum=0.9)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch[0])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.step_mask(batch[0], self.optimizers())

    def step_mask(self, x: Tensor, optimizer: Any) -> None:
        self.mask.logits.grad = mask_hypergradient(lambda: self.loss(x), self, self.mask, optimizer)
        self.mask_optimizer.step()


def test_a_plain_loop_and_lightning_take_the_same_steps() -> None:
    x = torch.randn(24, 2, 6, generator=torch.Generator().manual_seed(0))
    plain, module = Module(), Module()
    optimizer = plain.configure_optimizers()
    for batch in x.split(8):
        optimizer.zero_grad()
        plain.loss(batch).backward()
        optimizer.step()
        plain.step_mask(batch, optimizer)
    assert float((plain.mask.logits - DimensionalMask(8).logits).abs().max()) > 1e-5
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", **dict.fromkeys(quiet, False))
    trainer.fit(module, DataLoader(TensorDataset(x), batch_size=8))
    torch.testing.assert_close(module.mask.logits, plain.mask.logits, rtol=1e-5, atol=1e-7)
