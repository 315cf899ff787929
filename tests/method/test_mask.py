"""The dimensional mask as a module: shapes, types, state."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from metamask_solo import DimensionalMask, mask_statistics
from metamask_solo.errors import UserError


def test_the_masked_dimension() -> None:
    mask = DimensionalMask(3, dim=1)
    nn.init.normal_(mask.logits)
    x = torch.randn(2, 3, 4, 3)
    expected = x * torch.sigmoid(mask.logits)[None, :, None, None]
    torch.testing.assert_close(mask(x), expected)
    torch.testing.assert_close(DimensionalMask(3, dim=-3)(x), 0.5 * x)
    for shape in ((2, 4), (), (2, 1)):
        with pytest.raises(UserError, match="dimension -1 must have size 3.*dim="):
            DimensionalMask(3)(torch.ones(shape))


def test_kind_device_and_type() -> None:
    with pytest.raises(UserError, match="^kind='relu': allowed are sigmoid, linear"):
        DimensionalMask(2, "relu")  # type: ignore[arg-type]
    assert DimensionalMask(2, device="meta", dtype=torch.float64).logits.device.type == "meta"
    assert DimensionalMask(2, dtype=torch.bfloat16).logits.dtype == torch.float32
    assert DimensionalMask(2).double().logits.dtype == torch.float64
    assert float(DimensionalMask(2)(torch.ones(3, 2, dtype=torch.int64)).sum()) == 3.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_logits_stay_in_single_precision(dtype: torch.dtype) -> None:
    mask = DimensionalMask(2, "linear")
    with torch.no_grad():
        mask.logits.copy_(torch.tensor([1.0 + 2**-20, 1e6]))  # neither is a number of low precision
    model = nn.Sequential(nn.Linear(2, 2), copy.deepcopy(mask)).to(dtype)
    assert model[0].weight.dtype == dtype
    assert torch.equal(model[1].logits, mask.logits) and not model[1].logits.requires_grad
    optimizer = torch.optim.SGD([model[1].logits], lr=1.0)
    model[1].logits.grad = torch.full((2,), 2.0**-20)
    optimizer.step()
    assert float(model[1].logits[0]) == 1.0
    assert model[1](torch.ones(3, 2, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize(("autocast", "error"), [(True, 1e-5), (False, 2e-3)])
def test_a_small_spread_of_the_mask_is_not_rounded_away(autocast: bool, error: float) -> None:
    """In bf16 both entries would be 1; the product knows them apart, even if it is rounded."""
    torch.manual_seed(0)
    mask = DimensionalMask(2, "linear")
    with torch.no_grad():
        mask.logits.copy_(torch.tensor([1.0, 1.003]))
    column = torch.rand(10_000, 1).bfloat16() + 1
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        masked = mask(column.expand(-1, 2))
    assert masked.dtype == (torch.float32 if autocast else torch.bfloat16)
    ratio = float(masked[:, 1].double().mean() / masked[:, 0].double().mean())
    assert ratio == pytest.approx(1.003, abs=error) and ratio > 1.001


def test_the_kind_is_part_of_the_state() -> None:
    state = DimensionalMask(3, "linear").state_dict()
    with pytest.raises(UserError, match="kind=sigmoid: the state is that of a linear mask"):
        DimensionalMask(3, "sigmoid").load_state_dict(state)
    DimensionalMask(3, "linear").load_state_dict(state)


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40))
@settings(deadline=None)
def test_mask_statistics_are_numpys(entries: list[float]) -> None:
    statistics = {k: float(v) for k, v in mask_statistics(torch.tensor(entries)).items()}
    values = np.array(entries)
    scale = max(1e-30, float(np.abs(values).max()))
    for name, value in statistics.items():
        if name != "effective_dims":
            assert value == pytest.approx(getattr(values, name)(), abs=1e-6 * scale)
    nonzero = np.count_nonzero(values)
    assert min(nonzero, 1) - 1e-9 <= statistics["effective_dims"] <= nonzero + 1e-9


@given(st.integers(1, 30), st.integers(0, 30), st.floats(1e-30, 1e30), st.randoms())
@settings(deadline=None)
def test_equal_entries_count_one_each(k: int, zeros: int, size: float, rng: Any) -> None:
    entries = [size * rng.choice([-1, 1]) for _ in range(k)] + [0.0] * zeros
    rng.shuffle(entries)
    effective = mask_statistics(torch.tensor(entries, dtype=torch.float64))["effective_dims"]
    assert float(effective) == pytest.approx(k)
