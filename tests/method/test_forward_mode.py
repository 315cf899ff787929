"""Forward mode with a tape, against PyTorch's own forward mode."""

from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.func import functional_call

from metamask_solo.method.forward_mode import Tape


def network(*, bias: bool = True, inplace: bool = False) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=bias),
        nn.ReLU(inplace=inplace),
        nn.Conv2d(6, 6, 3, stride=2, groups=2, bias=bias),
        nn.BatchNorm2d(6, track_running_stats=False),
        nn.Flatten(),
        nn.Linear(6 * 9, 5, bias=bias),
        nn.BatchNorm1d(5, track_running_stats=False, affine=bias),
    ).double()


def derivatives(
    module: nn.Module, x: Tensor, moving: Callable[[str], bool], tape: Tape | None
) -> tuple[Tensor, Tensor]:
    """Output and its derivative along a direction in the parameters that ``moving`` names."""
    params = {n: p.detach() for n, p in module.named_parameters()}
    generator = torch.Generator().manual_seed(7)
    along = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in params.items()}
    if tape is not None:
        with tape.record():
            functional_call(module, params, (x,))
    with torch.no_grad(), forward_ad.dual_level():
        for name in filter(moving, along):
            params[name] = forward_ad.make_dual(params[name], along[name])
        if tape is None:
            output = functional_call(module, params, (x,))
        else:
            with tape.replay():
                output = functional_call(module, params, (x,))
        return forward_ad.unpack_dual(output)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("moving", "reused"),
    [
        (lambda name: True, 3),
        (lambda name: name.endswith("weight"), 3),
        (lambda name: name.startswith("2."), 2),
        (lambda name: name == "5.weight", 1),
        (lambda name: name.endswith("bias") or name == "5.weight", None),
    ],
)
def test_it_gives_what_pytorch_gives(
    moving: Callable[[str], bool], reused: int | None, bias: bool
) -> None:
    torch.manual_seed(0)
    module, x = network(bias=bias), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    tape = Tape()

    expected = derivatives(module, x, moving, None)
    found = derivatives(module, x, moving, tape)

    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    if reused is not None:
        assert tape.reused == reused


def test_an_output_that_was_written_to_is_computed_again() -> None:
    torch.manual_seed(0)
    module, x = network(inplace=True), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    tape = Tape()

    found = derivatives(module, x, lambda name: True, tape)

    assert tape.reused == 2
    expected = derivatives(module, x, lambda name: True, None)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_another_order_of_layers_is_noticed() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    tape = Tape()
    with tape.record():
        second(first(x))

    params = dict(first.named_parameters())
    with torch.no_grad(), forward_ad.dual_level(), tape.replay():
        dual = forward_ad.make_dual(params["weight"].detach(), torch.ones(4, 4).double())
        between = second(x)
        output = functional_call(first, {"weight": dual}, (between,))
        primal, tangent = forward_ad.unpack_dual(output)

    assert tape.reused == 0
    torch.testing.assert_close(primal, first(second(x)))
    torch.testing.assert_close(tangent, second(x) @ torch.ones(4, 4).double().T)
