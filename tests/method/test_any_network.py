"""The hypergradient on networks and losses of others: right, or refused in one line.

The reference is a double backward in float64 that shares nothing with the package.
"""

import copy
import random
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from metamask_solo import DimensionalMask, TrialStep, hypergradient, mask_hypergradient
from metamask_solo.errors import UserError

LR = 0.3


class Setting:
    """A network, a mask and a loss on one batch."""

    def __init__(self, network: nn.Module, x: Tensor, mask: DimensionalMask | None = None):
        torch.manual_seed(3)
        self.network = network.double()
        self.x = x.double() if x.is_floating_point() else x
        state = copy.deepcopy(network.state_dict())
        with torch.no_grad():
            dims = network(self.x).shape[-1]
        network.load_state_dict(state)
        self.mask = mask or DimensionalMask(dims).double()
        with torch.no_grad():
            self.mask.logits.copy_(torch.randn(dims))
        self.target = torch.randn(dims, dtype=torch.float64)

    def loss(self) -> Tensor:
        u = self.mask(self.network(self.x)).reshape(-1, len(self.target))
        return (u @ self.target).tanh().sum() + (u * u).mean()

    def hypergradient(self, method: Any = "exact", **kwargs: Any) -> Tensor:
        return mask_hypergradient(
            self.loss, self.network, self.mask, TrialStep(LR), method, **kwargs
        )

    def expected(self) -> Tensor:
        """By definition, every evaluation from the state of now."""
        twin = copy.deepcopy(self)
        noise = torch.get_rng_state(), random.getstate(), np.random.get_state()
        buffers = copy.deepcopy(dict(twin.network.named_buffers()))
        logits = twin.mask.logits.detach().requires_grad_()
        moving = {n: p for n, p in twin.network.named_parameters() if p.requires_grad}

        class Whole(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.network, self.mask = twin.network, twin.mask

            def forward(self) -> Tensor:
                return twin.loss()

        attributes = dict(vars(twin.network))

        def loss(params: Mapping[str, Tensor]) -> Tensor:
            vars(twin.network).update(attributes)
            torch.set_rng_state(noise[0])
            random.setstate(noise[1])
            np.random.set_state(noise[2])
            named = {**{f"network.{n}": p for n, p in params.items()}, "mask.logits": logits}
            state = {f"network.{n}": b.clone() for n, b in buffers.items()}
            with sdpa_kernel(SDPBackend.MATH):
                return functional_call(Whole(), {**named, **state}, ())

        gradient = torch.autograd.grad(loss(moving), list(moving.values()), create_graph=True)
        moved = {n: p - LR * g for (n, p), g in zip(moving.items(), gradient, strict=True)}
        result = torch.autograd.grad(loss(moved), logits)[0]
        torch.set_rng_state(noise[0])
        random.setstate(noise[1])
        np.random.set_state(noise[2])
        return result

    def check(self, *methods: str, rtol: float = 1e-9) -> None:
        before = copy.deepcopy(self.network.state_dict())
        objects = [id(t) for t in [*self.network.parameters(), *self.network.buffers()]]
        expected = self.expected()
        for method in methods or ("exact", "double_backward"):
            found = self.hypergradient(method)
            error = float((found - expected).norm() / expected.norm())
            assert error <= rtol, f"{method}: {error:.1e}"
        after = self.network.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        assert objects == [id(t) for t in [*self.network.parameters(), *self.network.buffers()]]


def encoder_layer(**kwargs: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **kwargs)


class Transposed(nn.Module):
    """Dropout on a tensor in another memory layout."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.drop = nn.Linear(6, 8), nn.Linear(8, 8), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.drop(self.one(x).t()).t()).tanh()


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool):
        super().__init__()
        self.first, self.rest = nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.use_reentrant, self.checkpointing = use_reentrant, True

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if not self.checkpointing:
            return self.rest(h)
        return checkpoint(self.rest, h, use_reentrant=self.use_reentrant)


class OnGrid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 16)

    def forward(self, x: Tensor) -> Tensor:
        image = self.layer(x).view(-1, 1, 4, 4)
        grid = torch.linspace(-1, 1, 18, dtype=x.dtype).view(1, 3, 3, 2).expand(len(x), -1, -1, -1)
        return F.grid_sample(image, grid, align_corners=True).flatten(1)


class Distances(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return torch.cdist(h, h.detach()[:4] + 1)


class Doubled(torch.autograd.Function):
    """Has a backward and no forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


class WithFunction(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return Doubled.apply(super().forward(x))  # type: ignore[no-any-return]


class Last(nn.Module):
    """The last output of a recurrent network."""

    def __init__(self, recurrent: nn.Module):
        super().__init__()
        self.recurrent = recurrent

    def forward(self, x: Tensor) -> Tensor:
        return self.recurrent(x)[0][-1]  # type: ignore[no-any-return]


class NoGradCentre(nn.Sequential):
    """Subtracts a mean that is computed without gradients."""

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        with torch.no_grad():
            centre = h.mean(0)
        return h - 2 * centre + F.normalize(h, dim=0) * centre.detach()


class RunningCentre(nn.Sequential):
    """Keeps a running mean as an attribute that is no buffer."""

    centre: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        mean = h.detach().mean(0)
        self.centre = mean if self.centre is None else 0.9 * self.centre + 0.1 * mean
        return h - self.centre


class Bank(nn.Module):
    """Compares with a memory bank, and replaces a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 8)
        self.register_buffer("bank", torch.randn(10, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        out = h + (h @ self.bank.t().clone()).softmax(1) @ self.bank.clone()
        self.bank[: len(h)] = h.detach()
        return out


class NumpyNoise(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        noise = np.random.randn(*x.shape) + random.random()
        return super().forward(x + torch.from_numpy(noise))


class BothModes(nn.Module):
    """A second pass by the running statistics that the first one has just changed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        first = self.layers.train()(x)
        second = self.layers.eval()(x)
        self.layers.train()
        return first + 2 * second


class Stateful(nn.Sequential):
    """Counts its calls, and keeps what it saw, in what Python has for that."""

    calls = 0

    def __init__(self, *layers: nn.Module):
        super().__init__(*layers)
        self.calls, self.seen, self.sums = 0, deque([torch.zeros(8)]), {"all": torch.zeros(8)}

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        self.calls += 1
        self.seen.append(h.detach().mean(0))
        self.sums["all"] = self.sums["all"] + self.seen[-1]
        return h / self.calls + sum(self.seen) - self.sums["all"] / len(self.seen)


class OwnNoise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(x.shape, generator=self.generator) > 0.3)


def mlp(kind: type[nn.Sequential] = nn.Sequential) -> nn.Sequential:
    return kind(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8))


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))

RIGHT: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "transformer with dropout": (lambda: encoder_layer(dropout=0.3), TOKENS),
    "transformer in evaluation": (lambda: encoder_layer().eval(), TOKENS),
    "dropout in another layout": (Transposed, X),
    "alpha dropout": (lambda: nn.Sequential(nn.Linear(6, 8), nn.AlphaDropout(0.3)), X),
    "batch norm with statistics": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh()),
        X,
    ),
    "batch norm in evaluation": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh()).eval(),
        X,
    ),
    "instance norm with statistics": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True), nn.Flatten()
        ),
        IMAGES,
    ),
    "weight norm": (lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 8)), nn.Tanh()), X),
    "spectral norm": (
        lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 8)), nn.Tanh()),
        X,
    ),
    "spectral norm, new form": (
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8)), nn.Tanh()),
        X,
    ),
    "lstm": (lambda: Last(nn.LSTM(8, 8)), TOKENS),
    "gru": (lambda: Last(nn.GRU(8, 8)), TOKENS),
    "no grad inside": (lambda: mlp(NoGradCentre), X),
    "running centre": (lambda: mlp(RunningCentre), X),
    "memory bank": (Bank, X),
    "batch norm in both modes": (BothModes, X),
    "noise from numpy and random": (lambda: mlp(NumpyNoise), X),
    "group norm, channels last": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Dropout(0.5), nn.Flatten()
        ).to(memory_format=torch.channels_last),
        IMAGES,
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RIGHT)
def test_right(name: str) -> None:
    torch.manual_seed(0)
    make, x = RIGHT[name]
    setting = Setting(make(), x)
    if "channels last" in name and torch.__version__ < "2.7":  # no forward mode: it says so
        with pytest.raises(UserError, match="GroupNorm.*'double_backward'"):
            setting.check()
        return
    setting.check()
    if name == "running centre":
        setting.network.centre = None  # it is made at the first call
        setting.check()
        assert setting.network.centre is None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("method", ["exact", "double_backward", "finite_difference", "first_order"])
def test_activation_checkpointing(method: str, use_reentrant: bool) -> None:
    torch.manual_seed(0)
    setting = Setting(Checkpointed(use_reentrant), X)
    found = setting.hypergradient(method)
    setting.network.checkpointing = False
    torch.testing.assert_close(found, setting.hypergradient(method), rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore")
def test_timms_checkpointing() -> None:
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=16, depth=2, embed_dim=24, num_heads=2
    )
    setting = Setting(vit, IMAGES)
    plain = setting.hypergradient()
    vit.set_grad_checkpointing()
    torch.testing.assert_close(setting.hypergradient(), plain, rtol=1e-12, atol=1e-14)


def test_other_saved_tensor_hooks_are_refused() -> None:
    setting = Setting(mlp(), X)
    loss = setting.loss

    def offloading() -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return loss()

    setting.loss = offloading  # type: ignore[method-assign]
    for method in ("exact", "first_order"):
        with pytest.raises(UserError, match="activation checkpointing or offloading"):
            setting.hypergradient(method)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (OnGrid, "grid_sampler_2d in OnGrid has no forward mode.*'finite_difference'"),
        (Distances, "_cdist_forward in Distances has no forward mode"),
        (lambda: mlp(WithFunction), "fails in WithFunction.*'double_backward'"),
    ],
)
def test_what_forward_mode_lacks_is_named(make: Callable[[], nn.Module], words: str) -> None:
    setting = Setting(make(), X)
    with pytest.raises(UserError, match=words) as caught:
        setting.hypergradient()
    assert "\n" not in str(caught.value)
    assert setting.hypergradient("finite_difference").isfinite().all()


def test_a_function_without_forward_mode_goes_by_double_backward() -> None:
    Setting(mlp(WithFunction), X).check("double_backward")


def test_double_backward_says_what_it_lacks() -> None:
    backward = torch.autograd.function.once_differentiable(Doubled.backward)
    once = type("Once", (Doubled,), {"backward": staticmethod(backward)})

    class WithOnce(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return once.apply(super().forward(x))  # type: ignore[attr-defined, no-any-return]

    with pytest.raises(UserError, match="double_backward.*use method='finite_difference'"):
        Setting(mlp(WithOnce), X).hypergradient("double_backward")


W, A = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 1.0])


@pytest.mark.parametrize("method", ["exact", "double_backward", "finite_difference", "first_order"])
def test_a_loss_that_reaches_nothing_is_refused(method: Any) -> None:
    module = nn.Linear(2, 1)
    params = dict(module.named_parameters())
    with pytest.raises(UserError, match="reaches none of the parameters"):
        hypergradient(lambda p, a: module(W * a).sum(), params, A, TrialStep(0.1), method)
    with pytest.raises(UserError, match="does not depend on the logits"):
        hypergradient(lambda p, a: (p["w"] ** 2).sum(), {"w": W}, A, TrialStep(0.1), method)


@pytest.mark.parametrize("method", ["exact", "double_backward", "finite_difference", "first_order"])
def test_a_loss_that_changes_from_call_to_call_is_refused(method: Any) -> None:
    generator = torch.Generator().manual_seed(0)

    def noisy(p: Any, a: Tensor) -> Tensor:
        return (a * p["w"] * torch.randn(2, generator=generator)).pow(2).sum()

    with pytest.raises(UserError, match="when it is evaluated again"):
        hypergradient(noisy, {"w": W}, A, TrialStep(0.1), method)


def test_exact_sees_noise_before_the_last_layer() -> None:
    """Its second pass takes the outputs of layers from the first one."""
    layers = nn.Sequential(nn.Linear(6, 8), OwnNoise(), nn.Tanh(), nn.Linear(8, 8))
    with pytest.raises(UserError, match="other inputs when it is evaluated again"):
        Setting(layers, X).hypergradient(check=False)


@pytest.mark.parametrize("method", ["exact", "double_backward", "finite_difference", "first_order"])
@pytest.mark.parametrize("seed", range(5))
def test_noise_of_a_few_rows_is_seen(method: Any, seed: int) -> None:
    """The first layers' inputs are the same in most rows, and the tape looks at some alone."""

    class FewRows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator = torch.Generator().manual_seed(seed)

        def forward(self, x: Tensor) -> Tensor:
            return x * (torch.rand(len(x), 1, generator=self.generator) > 0.3)

    network = nn.Sequential(FewRows(), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8))
    with pytest.raises(UserError, match="when it is evaluated again"):
        Setting(network, torch.randn(12, 6)).hypergradient(method)


def test_state_in_numbers_dictionaries_and_queues_is_kept() -> None:
    torch.manual_seed(0)
    setting = Setting(mlp(Stateful), X)
    network = setting.network
    with torch.no_grad():
        constant = network(setting.x) - nn.Sequential.forward(network, setting.x) / network.calls
    network.calls, network.seen, network.sums = 1, deque([torch.ones(8)]), {"all": torch.ones(8)}
    found = [setting.hypergradient(m) for m in ("exact", "double_backward", "first_order")]
    assert constant.isfinite().all()
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)
    assert (network.calls, len(network.seen)) == (1, 1)
    assert torch.equal(network.sums["all"], torch.ones(8))


METHODS = ("exact", "double_backward", "finite_difference", "first_order")


@pytest.mark.parametrize("method", METHODS)
def test_parameters_from_outside_of_the_loss_are_refused(method: Any) -> None:
    torch.manual_seed(0)
    setting = Setting(mlp(), X)
    plain, parameters = setting.loss, list(setting.network.parameters())

    def decayed() -> Tensor:
        return plain() + sum(p.square().sum() for p in parameters)

    def inside() -> Tensor:
        return plain() + sum(p.square().sum() for p in setting.network.parameters())

    outer = "exact" if method == "first_order" else method
    with pytest.raises(UserError, match="'0.0.weight' that was there before"):
        setting.hypergradient(outer, outer_loss=decayed)
    setting.loss = decayed  # type: ignore[method-assign]
    with pytest.raises(UserError, match="'0.0.weight' that was there before"):
        setting.hypergradient(method)
    kept = setting.network(setting.x).square().mean()
    setting.loss = lambda: plain() + kept  # type: ignore[method-assign]
    for words in ("that was there before", "what is computed outside|there before"):
        with pytest.raises(UserError, match=words):
            setting.hypergradient(method)
    setting.loss = inside  # type: ignore[method-assign]
    assert setting.hypergradient(method).isfinite().all()


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d, nn.Identity])
def test_a_loss_with_gradients_of_its_own(norm: Callable[[int], nn.Module]) -> None:
    """PyTorch's forward mode of a gradient of a normalisation takes its statistics as fixed."""
    torch.manual_seed(0)
    setting = Setting(nn.Sequential(nn.Linear(6, 8), norm(8), nn.Tanh(), nn.Linear(8, 8)), X)
    plain = setting.loss

    def penalised() -> Tensor:
        x = setting.x = X.double().requires_grad_()
        value = plain()
        return value + torch.autograd.grad(value, x, create_graph=True)[0].square().sum()

    setting.loss = penalised  # type: ignore[method-assign]
    found = setting.hypergradient("finite_difference", radius=1e-4)
    assert setting.hypergradient("first_order").isfinite().all()
    if norm is nn.Identity:
        torch.testing.assert_close(setting.hypergradient(), found, rtol=1e-4, atol=1e-6)
    else:
        with pytest.raises(UserError, match="_norm.*use method='double_backward' or 'finite"):
            setting.hypergradient()
    if norm is not nn.BatchNorm1d:
        other = setting.hypergradient("double_backward")
        torch.testing.assert_close(other, found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_hook_that_changes_a_gradient_is_refused(method: Any) -> None:
    torch.manual_seed(0)
    setting = Setting(mlp(), X)
    expected, seen = setting.hypergradient(method), []
    setting.network[0].weight.register_hook(lambda g: seen.append(g.norm()))
    assert torch.equal(setting.hypergradient(method), expected)
    setting.network[2].bias.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
    with pytest.raises(UserError, match=r"a hook on '0\.2\.bias' changes its gradient"):
        setting.hypergradient(method)
    assert seen


@pytest.mark.parametrize("method", METHODS)
def test_what_asks_for_a_graph_in_the_network(method: Any) -> None:
    class Retaining(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            h = super().forward(x)
            h.retain_grad()
            return h

    torch.manual_seed(0)
    expected = Setting(mlp(), X).hypergradient(method)
    torch.manual_seed(0)
    setting = Setting(mlp(), X)
    setting.network = mlp(Retaining).double()
    setting.network.load_state_dict(Setting(mlp(), X).network.state_dict())
    if method == "exact":
        with pytest.raises(UserError, match="Retaining.*'double_backward' or 'finite_diff"):
            setting.hypergradient(method)
    else:
        assert setting.hypergradient(method).shape == expected.shape


@pytest.mark.filterwarnings("ignore")
def test_torchscript() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)).double()
    scripted = torch.jit.script(layers)
    before = copy.deepcopy(layers.state_dict())
    with pytest.raises(UserError, match=r"modules: 0 is a TorchScript module"):
        Setting(scripted, X).hypergradient()
    assert all(torch.equal(value, before[name]) for name, value in layers.state_dict().items())
    # one that the loss calls beside the modules
    setting = Setting(mlp(), X)
    plain, target = setting.loss, torch.jit.script(layers.eval())
    distance = setting.network

    def distilled() -> Tensor:
        return plain() + (distance(setting.x) - target(setting.x)).square().mean()

    setting.loss = distilled  # type: ignore[method-assign]
    found = setting.hypergradient()
    torch.testing.assert_close(found, setting.hypergradient("double_backward"))
    target.train()
    with pytest.raises(UserError, match="TorchScript module in training mode"):
        setting.hypergradient()
    assert all(torch.equal(value, before[name]) for name, value in layers.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_in_the_inference_mode(method: Any) -> None:
    torch.manual_seed(0)
    setting = Setting(mlp(), X)
    expected = setting.hypergradient(method)
    with torch.inference_mode():
        found = setting.hypergradient(method)
        setting.network.register_buffer("made_there", torch.ones(3))
    torch.testing.assert_close(found, expected)
    assert torch.equal(setting.hypergradient(method), expected)


def test_frozen_parameters_stay() -> None:
    torch.manual_seed(0)
    setting = Setting(mlp(), X)
    setting.network[0].requires_grad_(False)
    setting.check()
    named = dict(setting.network.named_parameters())

    def pure(p: Mapping[str, Tensor], a: Tensor) -> Tensor:
        u = functional_call(setting.network, dict(p), (setting.x,)) * torch.sigmoid(a)
        return (u @ setting.target).tanh().sum() + (u * u).mean()

    for method in ("exact", "double_backward"):
        found = hypergradient(pure, named, setting.mask.logits, TrialStep(LR), method)
        torch.testing.assert_close(found, setting.expected(), rtol=1e-9, atol=1e-12)


def test_one_tensor_under_two_names_takes_one_step() -> None:
    w = torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a = torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tied = hypergradient(
        lambda p, a: (a * p["u"] * p["v"] * p["u"]).sum(), {"u": w, "v": w}, a, TrialStep(0.1)
    )
    one = hypergradient(lambda p, a: (a * p["w"] ** 3).sum(), {"w": w}, a, TrialStep(0.1))
    torch.testing.assert_close(tied, one, rtol=1e-12, atol=1e-14)
    with pytest.raises(UserError, match="one tensor"):
        hypergradient(
            lambda p, a: (a * p["u"] * p["v"]).sum(),
            {"u": w, "v": w},
            a,
            TrialStep({"u": 0.1, "v": 0.2}),
        )


def test_tied_modules() -> None:
    torch.manual_seed(0)
    one, two = nn.Linear(8, 8), nn.Linear(8, 8)
    two.weight = one.weight
    Setting(nn.Sequential(nn.Linear(6, 8), one, nn.Tanh(), two), X).check()
    again = nn.Linear(8, 8)
    Setting(nn.Sequential(nn.Linear(6, 8), again, nn.Tanh(), again), X).check()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "dampening": 0.4},
        {"momentum": 0.9, "weight_decay": 0.05, "nesterov": True},
    ],
    ids=lambda o: "-".join(o) or "plain",
)
@pytest.mark.parametrize("steps", [0, 2])
def test_the_trial_step_of_sgd(options: dict[str, Any], steps: int) -> None:
    """By a double backward through torch's own formula; the second group differs in everything."""
    torch.manual_seed(0)
    setting = Setting(mlp(), X)
    groups = [
        {"params": list(setting.network[0].parameters()), **options},
        {"params": list(setting.network[2].parameters()), "momentum": 0.5, "lr": 0.1},
    ]
    optimizer = torch.optim.SGD(groups, lr=LR)
    for _ in range(steps):
        optimizer.zero_grad()
        setting.loss().backward()
        optimizer.step()
    logits = setting.mask.logits.clone().requires_grad_()
    named = dict(setting.network.named_parameters())

    def loss(p: dict[str, Tensor]) -> Tensor:
        u = functional_call(setting.network, p, (setting.x,)) * torch.sigmoid(logits)
        return (u @ setting.target).tanh().sum() + (u * u).mean()

    gradient = torch.autograd.grad(loss(named), list(named.values()), create_graph=True)
    moved = {}
    for (name, p), g in zip(named.items(), gradient, strict=True):
        (group,) = [x for x in optimizer.param_groups if any(p is q for q in x["params"])]
        g = g + group["weight_decay"] * p
        if group["momentum"]:
            buffer = optimizer.state[p].get("momentum_buffer")
            if buffer is None:
                buffer = g
            else:
                buffer = group["momentum"] * buffer + (1 - group["dampening"]) * g
            g = g + group["momentum"] * buffer if group["nesterov"] else buffer
        moved[name] = p - group["lr"] * g
    (expected,) = torch.autograd.grad(loss(moved), logits)
    for method in ("exact", "double_backward"):
        found = mask_hypergradient(setting.loss, setting.network, setting.mask, optimizer, method)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_an_outer_loss_and_several_masks() -> None:
    """As in DARTS: the trial step on one batch, the loss after it on another."""
    torch.manual_seed(0)
    one, two = nn.Linear(6, 8).double(), nn.Linear(8, 3).double()
    masks = {"one": DimensionalMask(8).double(), "two": DimensionalMask(3, "linear").double()}
    x, y = torch.randn(2, 5, 6, dtype=torch.float64)

    def loss_on(batch: Tensor) -> Tensor:
        return masks["two"](two(masks["one"](one(batch)).tanh())).pow(2).sum()

    a, b = (m.logits.detach().clone().requires_grad_() for m in masks.values())
    params = [p.detach().clone().requires_grad_() for m in (one, two) for p in m.parameters()]

    def plain(batch: Tensor, w: list[Tensor]) -> Tensor:
        h = (batch @ w[0].t() + w[1]) * torch.sigmoid(a)
        return ((h.tanh() @ w[2].t() + w[3]) * b).pow(2).sum()

    g = torch.autograd.grad(plain(x, params), params, create_graph=True)
    moved = [p - 0.05 * d for p, d in zip(params, g, strict=True)]
    expected = torch.autograd.grad(plain(y, moved), (a, b))
    for method in ("exact", "double_backward"):
        found = mask_hypergradient(
            lambda: loss_on(x),
            [one, two],
            masks,
            TrialStep(0.05),
            method,
            outer_loss=lambda: loss_on(y),
        )
        assert list(found) == ["one", "two"]
        torch.testing.assert_close(tuple(found.values()), expected, rtol=1e-9, atol=1e-12)


def test_a_module_that_replaces_its_parameters_is_refused() -> None:
    class Replacing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            self.register_buffer("last", out.detach())
            return out

    setting = Setting(mlp(), X)
    setting.network[2] = Replacing(8, 8).double()
    with pytest.raises(UserError, match="last"):
        setting.hypergradient()


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, maximize=True), "maximize"),
        (lambda p: torch.optim.AdamW(p), "lr=None: the rate of AdamW"),
        (lambda p: torch.optim.LBFGS(p), "lr=None: the rate of LBFGS"),
        (lambda p: torch.optim.SGD(list(p)[:1], lr=0.1), "'0.0.bias' is in no group"),
        (lambda p: 0.1, "optimizer=0.1: must be an optimiser"),
        (lambda p: None, "optimizer=None: must be an optimiser"),
    ],
)
def test_optimisers_that_have_no_trial_step(optimizer: Any, words: str) -> None:
    setting = Setting(mlp(), X)
    with pytest.raises(UserError, match=words):
        mask_hypergradient(
            setting.loss, setting.network, setting.mask, optimizer(setting.network.parameters())
        )


def test_other_wrong_arguments() -> None:
    setting = Setting(mlp(), X)
    optimizer = torch.optim.SGD(setting.network.parameters(), lr=0.1)
    with pytest.raises(UserError, match="is no module with logits"):
        mask_hypergradient(setting.loss, setting.network, nn.Identity(), optimizer)
    with pytest.raises(UserError, match="is no module with logits"):
        mask_hypergradient(setting.loss, setting.network, nn.Parameter(A), optimizer)
    with pytest.raises(UserError, match="its .module"):
        parallel = nn.DataParallel(setting.network)
        mask_hypergradient(setting.loss, parallel, setting.mask, optimizer)
    for modules in (list(setting.network.parameters()), {"network": setting.network}):
        with pytest.raises(UserError, match="must hold modules alone"):
            mask_hypergradient(setting.loss, modules, setting.mask, optimizer)
    with pytest.raises(UserError, match=r"complex128: must be a real number"):
        mask_hypergradient(lambda: setting.loss() + 0j, setting.network, setting.mask, optimizer)
    sparse = torch.eye(2).to_sparse().requires_grad_()
    with pytest.raises(UserError, match="'w' is sparse"):
        hypergradient(lambda p, a: (p["w"] @ a).sum(), {"w": sparse}, A, TrialStep(0.1))
    square = torch.rand(2, 2)
    with pytest.raises(UserError, match="'u' and 'v' share memory"):
        hypergradient(
            lambda p, a: (p["u"] @ p["v"] @ a).sum(),
            {"u": square, "v": square.t()},
            A,
            TrialStep(0.1),
        )
    parts = torch.rand(4).split(2)  # one storage, but no common memory
    hypergradient(
        lambda p, a: (p["u"] * p["v"] * a).sum(),
        dict(zip("uv", parts, strict=True)),
        A,
        TrialStep(1),
    )
    assert TrialStep(np.float32(0.5)).of("any")[0] == 0.5
    none = TrialStep(0.1, 0.9, momentum_buffers={"0.0.weight": None})
    mask_hypergradient(setting.loss, setting.network, setting.mask, none)


def test_a_compiled_module_runs_as_it_was_written() -> None:
    if not hasattr(torch.compiler, "set_stance"):
        pytest.skip("torch has no set_stance")
    setting = Setting(mlp(), X)
    expected = setting.hypergradient()
    plain = setting.network
    compiled = torch.compile(plain, backend="aot_eager")
    setting.network = compiled  # type: ignore[assignment]
    found = mask_hypergradient(setting.loss, plain, setting.mask, TrialStep(LR))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mixed", [True, False])
def test_attention_in_low_precision(mixed: bool) -> None:
    """Its kernels round otherwise in forward mode: no reason to refuse it."""
    torch.manual_seed(0)
    setting = Setting(encoder_layer(dropout=0.0), TOKENS)
    expected = setting.hypergradient()
    setting.mask.float()
    if mixed:
        setting.network.float()
        setting.x, setting.target = setting.x.float(), setting.target.float()
    else:
        setting.network.bfloat16()
        setting.x, setting.target = setting.x.bfloat16(), setting.target.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        found = setting.hypergradient()
    assert found.dtype == torch.float32
    assert float(F.cosine_similarity(found.double(), expected, dim=0)) > 0.98
