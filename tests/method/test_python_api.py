"""The documented ways to use the parts: docs/python.md, docstrings, Lightning, lightly."""

import doctest
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightly.loss import BarlowTwinsLoss, NTXentLoss
from lightly.models.modules.heads import SimCLRProjectionHead
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import metamask_solo
from metamask_solo import DimensionalMask, mask_hypergradient
from metamask_solo.hosts import pl

PAGE = Path(__file__).parents[2] / "docs" / "python.md"


def test_the_page_runs() -> None:
    """All but the variant of the method, which tests/docs runs."""
    text = PAGE.read_text().partition("## A variant")[0]
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) >= 8
    exec(compile("\n".join(blocks), str(PAGE), "exec"), {"__name__": "page"})


def test_the_page_names_every_public_name() -> None:
    missing = [n for n in metamask_solo.__all__ if n != "MetaMask" and n not in PAGE.read_text()]
    assert missing == []


@pytest.mark.parametrize("name", ["hypergradient", "mask", "losses"])
def test_examples_of_docstrings(name: str) -> None:
    module = importlib.import_module(f"metamask_solo.method.{name}")
    names = {"torch": torch, "nn": nn, "DimensionalMask": DimensionalMask}
    result = doctest.testmod(module, extraglobs=names)
    assert result.failed == 0 and result.attempted > 0


def network() -> tuple[nn.Module, nn.Module, DimensionalMask]:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 8))
    return backbone, SimCLRProjectionHead(8, 16, 4), DimensionalMask(8)


def own_loop(batches: list[Tensor], loss_of: Callable[[Tensor, Tensor], Tensor]) -> DimensionalMask:
    """A loop of one's own, and lightly's losses and heads."""
    backbone, head, mask = network()
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.1, momentum=0.9)
    mask_optimizer = torch.optim.SGD([mask.logits], lr=1.0)
    for x in batches:

        def loss(x: Tensor = x) -> Tensor:
            return loss_of(*(head(mask(backbone(view))) for view in x.unbind(1)))

        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        mask.logits.grad = mask_hypergradient(loss, [backbone, head], mask, optimizer)
        mask_optimizer.step()
    return mask


class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self, manual: bool):
        super().__init__()
        self.backbone, self.head, self.mask = network()
        self.criterion = NTXentLoss(temperature=0.2)
        self.automatic_optimization = not manual

    def loss(self, x: Tensor) -> Tensor:
        z1, z2 = (self.head(self.mask(self.backbone(view))) for view in x.unbind(1))
        return self.criterion(z1, z2)  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        params = [p for p in self.parameters() if p.requires_grad]
        self.mask_optimizer = torch.optim.SGD([self.mask.logits], lr=1.0)
        return torch.optim.SGD(params, lr=0.1, momentum=0.9)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        if self.automatic_optimization:
            return self.loss(batch[0])
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch[0]))
        optimizer.step()
        self.step_mask(batch[0], optimizer)
        return None

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.automatic_optimization:
            self.step_mask(batch[0], self.optimizers())

    def step_mask(self, x: Tensor, optimizer: Any) -> None:
        self.mask.logits.grad = mask_hypergradient(lambda: self.loss(x), self, self.mask, optimizer)
        self.mask_optimizer.step()


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    return list(torch.randn(3, 8, 2, 6, generator=torch.Generator().manual_seed(0)))


def test_own_loop_and_lightning_take_the_same_steps(batches: list[Tensor]) -> None:
    by_hand = own_loop(batches, NTXentLoss(temperature=0.2))
    assert float((by_hand.logits - DimensionalMask(8).logits).abs().max()) > 1e-5
    for manual in (False, True):
        module = Module(manual)
        loader = DataLoader(TensorDataset(torch.cat(batches)), batch_size=8)
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, loader)
        torch.testing.assert_close(module.mask.logits, by_hand.logits, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "loss_of",
    [BarlowTwinsLoss(), NTXentLoss(temperature=0.5, memory_bank_size=(32, 4))],
    ids=["barlow twins", "memory bank"],
)
def test_lightlys_losses(loss_of: Any, batches: list[Tensor]) -> None:
    """Exact is the double backward; a memory bank that is a module stays as it is."""
    backbone, head, mask = (part.double() for part in network())
    x = batches[0].double()
    loss_of = loss_of.double()
    loss_of(*torch.randn(2, 8, 4, dtype=torch.float64))
    before = {name: b.clone() for name, b in loss_of.named_buffers()}

    def loss() -> Tensor:
        z1, z2 = (head(mask(backbone(view))) for view in x.unbind(1))
        return loss_of(z1, z2)  # type: ignore[no-any-return]

    found, expected = (
        mask_hypergradient(
            loss, [backbone, head], mask, lambda p, g: {n: p[n] - 0.1 * g[n] for n in g}, method
        )
        for method in ("exact", "double_backward")
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert all(torch.equal(b, before[name]) for name, b in loss_of.named_buffers())
