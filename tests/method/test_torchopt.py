"""The hypergradient against torchopt, which differentiates through its own optimiser's step."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchopt
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from metamask_solo import DimensionalMask, mask_hypergradient


class LastOfGRU(nn.GRU):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0][-1]


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=32, depth=2, embed_dim=16, num_heads=2
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8)), (12, 6)),
    "cnn": (cnn, (12, 3, 12, 12)),
    "vit": (vit, (4, 3, 32, 32)),
    "gru": (lambda: LastOfGRU(6, 8), (5, 12, 6)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("lr", [1e-3, 0.4])
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9, "weight_decay": 5e-4}, {"momentum": 0.9, "nesterov": True}],
    ids=["plain", "momentum and decay", "nesterov"],
)
def test_it_is_torchopts_derivative(name: str, lr: float, options: dict[str, Any]) -> None:
    """Two regular steps fill the momentum buffers; the third is the trial step."""
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    backbone = make().double()
    x = torch.randn(2, *shape, dtype=torch.float64)
    with torch.no_grad():
        dims = backbone(x[0]).shape[-1]
    mask, head = DimensionalMask(dims).double(), nn.Linear(dims, 4, bias=False).double()
    network = nn.ModuleList([backbone, head])

    def loss() -> Tensor:
        z1, z2 = (head(mask(backbone(view))) for view in x)
        return (z1 @ z2.t()).log_softmax(1).diagonal().neg().mean()

    optimizer = torch.optim.SGD(network.parameters(), lr=lr, **options)
    differentiable = torchopt.MetaSGD(network, lr=lr, **options)
    mask.logits.requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # the others have no double backward
        before = torchopt.extract_state_dict(network)
        for _ in range(2):
            differentiable.step(loss())
        torchopt.stop_gradient(network)
        torchopt.stop_gradient(differentiable)
        moved = torchopt.extract_state_dict(network)
        torchopt.recover_state_dict(network, before)
        for _ in range(2):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        found = mask_hypergradient(loss, network, mask, optimizer)
        torchopt.recover_state_dict(network, moved)
        differentiable.step(loss())
        (expected,) = torch.autograd.grad(loss(), mask.logits)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * float(expected.norm()))
