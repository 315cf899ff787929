"""The method's two losses on one process; on several, see tests/training/test_processes.py."""

from functools import partial
from typing import Any

import pytest
import torch
from definitions import plain_barlow, plain_nt_xent
from torch import Tensor

from metamask_solo.method.losses import barlow_twins, nt_xent

DOUBLE = torch.float64


def value_and_gradients(loss: Any, *views: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    z1, z2 = (z.clone().requires_grad_() for z in views)
    value = loss(z1, z2)
    with torch.autocast("cpu", enabled=False):  # where a training step's gradient is taken
        gradients = torch.autograd.grad(value, (z1, z2))
    return value.detach(), *gradients


def drawn(n: int, dims: int, dtype: torch.dtype = DOUBLE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    z = torch.randn(2, n, dims, dtype=DOUBLE, generator=generator)
    return z[0].to(dtype), (z[0] + 0.5 * z[1]).to(dtype)


@pytest.mark.parametrize(("n", "dims"), [(6, 5), (5, 6), (4, 4), (2, 3)])
@pytest.mark.parametrize(
    ("loss", "definition"),
    [
        (partial(barlow_twins, lamb=0.02), partial(plain_barlow, lamb=0.02)),
        (partial(nt_xent, temperature=0.3), partial(plain_nt_xent, temperature=0.3)),
    ],
    ids=["barlow_twins", "nt_xent"],
)
def test_a_loss_is_its_definition(loss: Any, definition: Any, n: int, dims: int) -> None:
    views = drawn(n, dims)
    result, expected = value_and_gradients(loss, *views), value_and_gradients(definition, *views)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize(
    "loss", [barlow_twins, partial(nt_xent, temperature=0.07)], ids=["barlow_twins", "nt_xent"]
)
def test_half_precision_is_computed_in_single(loss: Any, autocast: bool, half: torch.dtype) -> None:
    """Of projections in half precision, and of single ones under autocast."""
    dtype = torch.float32 if autocast else half
    views = drawn(16, 8, dtype)
    expected = value_and_gradients(loss, *(z.double() for z in views))
    with torch.autocast("cpu", half, enabled=autocast):
        result = value_and_gradients(loss, *views)
    assert result[0].dtype == torch.float32 and result[1].dtype == dtype
    assert float(result[0]) == pytest.approx(float(expected[0]), rel=1e-5)
    tolerance = 1e-5 if autocast else torch.finfo(half).eps
    for a, b in zip(result[1:], expected[1:], strict=True):
        assert float((a.double() - b).norm() / b.norm()) < tolerance


def test_errors_say_what_is_wrong() -> None:
    for loss in (barlow_twins, nt_xent):
        with pytest.raises(ValueError, match="two views of the same images"):
            loss(torch.ones(4, 3), torch.ones(5, 3), 0.1)
        with pytest.raises(ValueError, match="must be N × D"):
            loss(torch.ones(4), torch.ones(4), 0.1)
        with pytest.raises(ValueError, match="a batch of 1"):
            loss(torch.ones(1, 3), torch.ones(1, 3), 0.1)
