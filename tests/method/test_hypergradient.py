"""The hypergradient by its definition, over the real steps of optimisers and on many networks.

The references share nothing with the package: a double backward in float64 through a step that is
written out, and central differences over ``optimizer.step()`` itself.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import timm
import timm.optim
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from metamask_solo import DimensionalMask, hypergradient, mask_hypergradient, optimizer_step
from metamask_solo.errors import UserError
from metamask_solo.method.hypergradient import METHODS, Params, Step

LR = 0.3
X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TOKENS = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def sgd(lr: float, decay: float = 0.0) -> Step:
    return lambda p, g: {n: p[n] - lr * (d + decay * p[n]) for n, d in g.items()}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


class Setting:
    """A network, a mask and a loss on one batch, in float64."""

    def __init__(self, network: nn.Module, x: Tensor = X):
        torch.manual_seed(3)
        self.network, self.x = network.double(), x
        state = copy.deepcopy(network.state_dict())
        with torch.no_grad():
            dims = network(self.x).shape[-1]
        network.load_state_dict(state)
        self.mask = DimensionalMask(dims).double()
        self.mask.logits.data.normal_()
        self.target = torch.randn(dims, dtype=torch.float64)

    def loss(self) -> Tensor:
        u = self.mask(self.network(self.x)).reshape(-1, len(self.target))
        return (u @ self.target).tanh().sum() + (u * u).mean()

    def hypergradient(self, method: Any = "exact", step: Any = None, **kwargs: Any) -> Tensor:
        return mask_hypergradient(
            self.loss, self.network, self.mask, step or sgd(LR), method, **kwargs
        )

    def expected(self) -> Tensor:
        """By definition: a double backward, every evaluation from the state of now."""
        twin, noise = copy.deepcopy(self), torch.get_rng_state()
        buffers = copy.deepcopy(dict(twin.network.named_buffers()))
        logits = twin.mask.logits.detach().requires_grad_()
        moving = {n: p for n, p in twin.network.named_parameters() if p.requires_grad}
        whole = nn.ModuleDict({"network": twin.network, "mask": twin.mask})
        whole.forward = lambda: twin.loss()  # type: ignore[method-assign]

        def loss(params: Mapping[str, Tensor]) -> Tensor:
            torch.set_rng_state(noise)
            named = {f"network.{n}": p for n, p in params.items()} | {"mask.logits": logits}
            named |= {f"network.{n}": b.clone() for n, b in buffers.items()}
            with sdpa_kernel(SDPBackend.MATH):
                return functional_call(whole, named, ())

        gradient = torch.autograd.grad(loss(moving), list(moving.values()), create_graph=True)
        moved = {n: p - LR * g for (n, p), g in zip(moving.items(), gradient, strict=True)}
        result = torch.autograd.grad(loss(moved), logits)[0]
        torch.set_rng_state(noise)
        return result

    def check(self, *methods: str) -> None:
        """The methods give the definition, and leave everything as it was, bit for bit."""
        tensors = [*self.network.parameters(), *self.network.buffers(), self.mask.logits]
        for p in self.network.parameters():
            p.grad = torch.randn_like(p)
        tensors += [p.grad for p in self.network.parameters() if p.grad is not None]
        before, noise = [t.clone() for t in tensors], torch.get_rng_state()
        expected = self.expected()
        for method in methods or ("exact", "double_backward"):
            assert relative(self.hypergradient(method), expected) <= 1e-9, method
        after = [*self.network.parameters(), *self.network.buffers(), self.mask.logits]
        after += [p.grad for p in self.network.parameters() if p.grad is not None]
        assert [id(t) for t in after] == [id(t) for t in tensors]
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        assert torch.equal(torch.get_rng_state(), noise)


def mlp(kind: type[nn.Sequential] = nn.Sequential) -> nn.Sequential:
    torch.manual_seed(0)
    return kind(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8))


# --- any optimiser's own step ----------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "sgd momentum decay": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.05),
    "sgd nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "sgd dampening": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.4),
    "sgd maximize": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, maximize=True),
    "adam decay": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1, eps=1e-3),
    "amsgrad": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True, eps=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, eps=1e-3),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01, eps=1e-3),
    "radam": lambda p: torch.optim.RAdam(p, 0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, eps=1e-3),
    "rmsprop centred": lambda p: torch.optim.RMSprop(
        p, 0.01, centered=True, momentum=0.5, eps=1e-3
    ),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01, eps=1e-3),
    "adamax": lambda p: torch.optim.Adamax(p, 0.01, eps=1e-3),
    "adadelta": lambda p: torch.optim.Adadelta(p, 1.0),
    "asgd": lambda p: torch.optim.ASGD(p, 0.1),
    "rprop": lambda p: torch.optim.Rprop(p, 0.01),
    "timm lion": lambda p: timm.optim.create_optimizer_v2(list(p), "lion", lr=0.01),
    "timm adabelief": lambda p: timm.optim.create_optimizer_v2(list(p), "adabelief", lr=0.01),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_trial_step_is_the_optimisers_own_next_step(name: str, steps: int) -> None:
    """Values and derivatives over the real ``optimizer.step()``, groups with rates of their own."""
    setting = Setting(mlp())
    first, last = setting.network[0], setting.network[2]
    groups = [
        {"params": list(first.parameters())},
        {"params": list(last.parameters()), "lr": 0.05},
    ]
    optimizer = OPTIMIZERS[name](groups if "timm" not in name else setting.network.parameters())

    def real_step(setting: Any, optimizer: Any) -> None:
        optimizer.zero_grad()
        setting.loss().backward()
        optimizer.step()

    for _ in range(steps):
        real_step(setting, optimizer)
    optimizer.zero_grad()
    state = copy.deepcopy(optimizer.state_dict())
    params = dict(setting.network.named_parameters())
    g = torch.autograd.grad(setting.loss(), list(params.values()))
    virtual = optimizer_step(optimizer, params)(
        {n: p.detach() for n, p in params.items()}, dict(zip(params, g, strict=True))
    )
    results = {m: setting.hypergradient(m, optimizer) for m in ("exact", "double_backward")}
    assert str(optimizer.state_dict()) == str(state)

    def after_a_real_step(logits: Tensor) -> Tensor:
        twin, its_optimizer = copy.deepcopy((setting, optimizer))
        twin.mask.logits.data.copy_(logits)
        real_step(twin, its_optimizer)
        return twin.loss().detach()

    h, basis = 1e-5, torch.eye(8, dtype=torch.float64)
    a = setting.mask.logits.detach()
    # two central differences, whose errors of second order cancel
    sides = [
        torch.stack(
            [(after_a_real_step(a + s * e) - after_a_real_step(a - s * e)) / (2 * s) for e in basis]
        )
        for s in (h, 2 * h)
    ]
    expected = (4 * sides[0] - sides[1]) / 3
    assert relative(results["exact"], results["double_backward"]) <= 1e-10
    assert relative(results["exact"], expected) <= 1e-6
    if name.startswith("sgd"):  # the term that it leaves out is there
        assert relative(setting.hypergradient("first_order", optimizer), expected) > 1e-6
    real_step(setting, optimizer)
    for n, p in params.items():
        torch.testing.assert_close(virtual[n], p.detach(), rtol=1e-6, atol=1e-8)


def test_dead_units_have_no_slope_under_adam() -> None:
    """Adam's root has none where a gradient is 0; the term is 0 there, and NaN nowhere."""
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
    network[0].bias.data[:3] = -100.0
    setting = Setting(network)
    optimizer = torch.optim.Adam(setting.network.parameters(), 0.01)
    exact = setting.hypergradient("exact", optimizer)
    assert exact.isfinite().all()
    alive = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 8)).double()
    alive[0].load_state_dict({k: v[3:] for k, v in network[0].state_dict().items()})
    alive[2].load_state_dict(
        {"weight": network[2].weight[:, 3:].clone(), "bias": network[2].bias.clone()}
    )
    setting.network = alive
    optimizer = torch.optim.Adam(alive.parameters(), 0.01)
    torch.testing.assert_close(setting.hypergradient("exact", optimizer), exact)
    x = X.clone()
    x[0, 0] = float("nan")
    setting.x = x
    assert setting.hypergradient("exact", optimizer).isnan().any()


def test_a_rate_of_its_own_is_a_plain_gradient_step_with_the_groups_decay() -> None:
    setting = Setting(mlp())
    groups = [
        {"params": list(setting.network[0].parameters()), "weight_decay": 0.1},
        {"params": list(setting.network[2].parameters())},
    ]
    adam = torch.optim.Adam(groups, lr=5.0)
    params = dict(setting.network.named_parameters())
    g = {n: torch.randn_like(p) for n, p in params.items()}
    moved = optimizer_step(adam, params, lr=0.3)({n: p.detach() for n, p in params.items()}, g)
    for n, p in params.items():
        decay = 0.1 if n.startswith("0") else 0.0
        torch.testing.assert_close(moved[n], p.detach() - 0.3 * (g[n] + decay * p.detach()))
    logits = setting.mask.logits.detach().requires_grad_()
    named = {f"network.{n}": p for n, p in params.items()} | {"mask.logits": logits}
    whole = nn.ModuleDict({"network": setting.network, "mask": setting.mask})
    whole.forward = lambda: setting.loss()  # type: ignore[method-assign]
    (plain,) = torch.autograd.grad(functional_call(whole, named, ()), logits)
    for method in METHODS:  # a rate of 0 gives the plain gradient
        torch.testing.assert_close(setting.hypergradient(method, adam, lr=0.0), plain)


class Detached(torch.optim.SGD):
    """Its rate depends on the gradient in a way that autograd does not see."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    rate = group["lr"] / (1 + p.grad.detach().norm())
                    p.add_(p.grad * rate, alpha=-1.0)


class Wrapper(torch.optim.SGD):
    def __init__(self, params: Any):
        super().__init__(params, 0.1)
        self.inner = torch.optim.SGD(self.param_groups[0]["params"], 0.1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: Detached(p, 0.1), "autograd cannot follow the step of Detached.*1e-3"),
        (lambda p: timm.optim.create_optimizer_v2(list(p), "lars", lr=0.1), "Lars.*1e-3"),
        (
            lambda p: timm.optim.create_optimizer_v2(list(p), "lamb", lr=0.1, weight_decay=0.1),
            "Lamb.*1e-3",
        ),
        (lambda p: torch.optim.LBFGS(p), "LBFGS.*1e-3"),
        (lambda p: torch.optim.Adafactor(p), "differentiated.*1e-3"),
        (Wrapper, "wraps another"),
        (lambda p: torch.optim.SGD(list(p)[:1], lr=0.1), "'0.0.bias' is in no group"),
        (lambda p: 0.1, "a float.*must be an optimiser"),
        (lambda p: lambda now, g: {n: now[n] - d.detach() for n, d in g.items()}, "no derivative"),
        (lambda p: lambda now, g: {}, "a tensor for each parameter"),
    ],
)
def test_steps_without_a_right_derivative_are_refused(make: Any, words: str) -> None:
    setting = Setting(mlp())
    optimizer = make(setting.network.parameters())
    for method in ("exact", "double_backward", "finite_difference"):
        with pytest.raises(UserError, match=words) as caught:
            setting.hypergradient(method, optimizer)
        assert "\n" not in str(caught.value)
    if isinstance(optimizer, torch.optim.Optimizer) and "group" not in words:
        assert "wraps" in words or setting.hypergradient("exact", optimizer, lr=1e-3).all()


def test_a_gradient_of_zero_that_the_mask_moves_has_its_slope_under_adam() -> None:
    """A linear mask at 0: the head's gradient is 0, and its derivative in the logits is not."""
    setting = Setting(mlp())
    setting.mask = DimensionalMask(8, "linear", 0.0).double()
    head = nn.Linear(8, 3).double()
    params = [*setting.network.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(params, lr=0.05, eps=1e-2)

    def loss() -> Tensor:
        return (head(setting.mask(setting.network(X))) - 1).square().mean()

    exact = mask_hypergradient(loss, [setting.network, head], setting.mask, optimizer)

    def after(a: Tensor) -> Tensor:
        twin = copy.deepcopy((setting.network, head, optimizer))
        value = (twin[1](twin[0](X) * a) - 1).square().mean()
        value.backward()
        twin[2].step()
        return (twin[1](twin[0](X) * a) - 1).square().mean().detach()

    steps = 1e-6 * torch.eye(8, dtype=torch.float64)
    expected = torch.stack([(after(e) - after(-e)) / 2e-6 for e in steps])
    assert relative(exact, expected) <= 1e-4


class OfTheGroup(torch.optim.Optimizer):
    """Divides by the norm of a whole group, counts in lists, and has one state for all."""

    def __init__(self, params: Any):
        super().__init__(params, {"lr": 0.3})
        self.calls = [0]
        self.state["all"] = {"norm": torch.ones((), dtype=torch.float64)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.calls[0] += 1
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            norm = torch.stack([p.grad.norm() for p in moving]).norm()
            self.state["all"]["norm"] = 0.5 * self.state["all"]["norm"] + norm
            for p in moving:
                p.sub_(group["lr"] * p.grad / (self.state["all"]["norm"] * self.calls[0]))


def test_an_optimiser_with_state_of_its_own() -> None:
    setting = Setting(mlp())
    optimizer = OfTheGroup(setting.network.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        setting.loss().backward()
        optimizer.step()
    exact = setting.hypergradient("exact", optimizer)
    assert optimizer.calls == [2]

    def after(a: Tensor) -> Tensor:
        twin = copy.deepcopy(setting)
        its_optimizer = OfTheGroup(twin.network.parameters())
        its_optimizer.calls, its_optimizer.state["all"] = [2], dict(optimizer.state["all"])
        twin.mask.logits.data.copy_(a)
        twin.network.zero_grad()
        twin.loss().backward()
        its_optimizer.step()
        return twin.loss().detach()

    a, steps = setting.mask.logits.detach(), 1e-5 * torch.eye(8, dtype=torch.float64)
    expected = torch.stack([(after(a + e) - after(a - e)) / 2e-5 for e in steps])
    assert relative(exact, expected) <= 1e-6


# --- the ways, by their formulas -------------------------------------------------------------


def resnet() -> tuple[nn.Module, Tensor]:
    network = torchvision.models.resnet18()
    network.fc = nn.Identity()
    return network, torch.randn(6, 3, 32, 32, dtype=torch.float64)


def vit() -> tuple[nn.Module, Tensor]:
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, depth=3)
    return network, torch.randn(6, 3, 32, 32, dtype=torch.float64)


@pytest.mark.parametrize("make", [pytest.param(resnet, marks=pytest.mark.slow), vit])
def test_backbones(make: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    torch.manual_seed(0)
    Setting(*make()).check()


def test_first_order_and_finite_difference_are_their_formulas() -> None:
    setting, lr, radius = Setting(mlp()), 0.05, 1e-2
    named = {n: p.detach().clone() for n, p in setting.network.named_parameters()}

    def pure(p: Mapping[str, Tensor], a: Tensor) -> Tensor:
        u = functional_call(setting.network, dict(p), (setting.x,)) * torch.sigmoid(a)
        return (u @ setting.target).tanh().sum() + (u * u).mean()

    def partials(p: Params) -> tuple[list[Tensor], Tensor]:
        leaves = {n: t.clone().requires_grad_() for n, t in p.items()}
        a = setting.mask.logits.detach().clone().requires_grad_()
        *g, direct = torch.autograd.grad(pure(leaves, a), [*leaves.values(), a])
        return g, direct

    g, _ = partials(named)
    moved = {n: p - lr * (d + 5e-4 * p) for (n, p), d in zip(named.items(), g, strict=True)}
    v, direct = partials(moved)
    step, a = sgd(lr, 5e-4), setting.mask.logits
    assert relative(hypergradient(pure, named, a, step, "first_order"), direct) <= 1e-12
    size = radius / torch.cat([d.flatten() for d in v]).norm()
    sides = [
        partials({n: p + s * size * d for (n, p), d in zip(named.items(), v, strict=True)})[1]
        for s in (1, -1)
    ]
    official = direct - lr * (sides[0] - sides[1]) / (2 * size)
    found = hypergradient(pure, named, a, step, "finite_difference", radius=radius)
    assert relative(found, official) <= 1e-9
    exact = hypergradient(pure, named, a, step)
    errors = [
        relative(hypergradient(pure, named, a, step, "finite_difference", radius=r), exact)
        for r in (1e-1, 1e-2)
    ]
    assert errors[1] < errors[0] / 50  # second order: a tenth of the radius, a hundredth


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), lr=st.floats(0.0, 0.5), decay=st.floats(0.0, 0.1))
def test_exact_on_random_quadratics(seed: int, lr: float, decay: float) -> None:
    """L = ½ wᵀ diag(a) w + bᵀ w has its hypergradient in closed form."""
    rng = torch.Generator().manual_seed(seed)
    w, b, a = torch.randn(3, 5, generator=rng, dtype=torch.float64)
    moved = w - lr * (a * w + b + decay * w)
    expected = 0.5 * moved**2 - lr * w * (a * moved + b)
    found = hypergradient(
        lambda p, a: 0.5 * (a * p["w"] ** 2).sum() + (b * p["w"]).sum(),
        {"w": w},
        a,
        sgd(lr, decay),
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_an_outer_loss() -> None:
    """As in DARTS: the trial step on one batch, the loss after it on another."""
    setting, other = Setting(mlp()), torch.randn(5, 6, dtype=torch.float64)
    named = dict(setting.network.named_parameters())

    def on(x: Tensor, p: Mapping[str, Tensor], a: Tensor) -> Tensor:
        return (functional_call(setting.network, dict(p), (x,)) * a.sigmoid()).pow(2).sum()

    a = setting.mask.logits.detach().clone().requires_grad_()
    g = torch.autograd.grad(on(X, named, a), list(named.values()), create_graph=True)
    moved = {n: p - 0.05 * d for (n, p), d in zip(named.items(), g, strict=True)}
    (expected,) = torch.autograd.grad(on(other, moved, a), a)

    def closure(x: Tensor) -> Callable[[], Tensor]:
        return lambda: setting.mask(setting.network(x)).pow(2).sum()

    for method in ("exact", "double_backward"):
        found = mask_hypergradient(
            closure(X),
            setting.network,
            setting.mask,
            sgd(0.05),
            method,  # type: ignore[arg-type]
            outer_loss=closure(other),
        )
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


# --- any network -----------------------------------------------------------------------------


class Transposed(nn.Module):
    """Dropout on a tensor in another memory layout."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.drop = nn.Linear(6, 8), nn.Linear(8, 8), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.drop(self.one(x).t()).t()).tanh()


class Last(nn.Module):
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


class Dino(nn.Module):
    """A centre that forward replaces, as DINO's own loss does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 8)
        self.register_buffer("center", torch.zeros(1, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        target = ((h - self.center) / 0.4).softmax(-1).detach()
        self.center = 0.9 * self.center + 0.1 * h.detach().mean(0, keepdim=True)
        return target * F.log_softmax(h / 0.1, dim=-1) + h


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


def tied() -> nn.Module:
    one, two = nn.Linear(8, 8), nn.Linear(8, 8)
    two.weight = one.weight
    return nn.Sequential(nn.Linear(6, 8), one, nn.Tanh(), two, one)


def frozen() -> nn.Module:
    network = mlp()
    network[0].requires_grad_(False)
    return network


def encoder_layer(**kwargs: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **kwargs)


RIGHT: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "transformer with dropout": (lambda: encoder_layer(dropout=0.3), TOKENS),
    "transformer in evaluation": (lambda: encoder_layer().eval(), TOKENS),
    "dropout in another layout": (Transposed, X),
    "alpha dropout": (lambda: nn.Sequential(nn.Linear(6, 8), nn.AlphaDropout(0.3)), X),
    "batch norm": (lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh()), X),
    "instance norm with statistics": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True), nn.Flatten()
        ),
        IMAGES,
    ),
    "weight norm": (lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 8)), nn.Tanh()), X),
    "spectral norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8)), nn.Tanh()),
        X,
    ),
    "lstm": (lambda: Last(nn.LSTM(8, 8)), TOKENS),
    "gru": (lambda: Last(nn.GRU(8, 8)), TOKENS),
    "no grad inside": (lambda: mlp(NoGradCentre), X),
    "memory bank": (Bank, X),
    "a buffer that forward replaces": (Dino, X),
    "batch norm in both modes": (BothModes, X),
    "group norm, channels last": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Dropout(0.5), nn.Flatten()
        ).to(memory_format=torch.channels_last),
        IMAGES,
    ),
    "tied": (tied, X),
    "frozen": (frozen, X),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RIGHT)
def test_networks(name: str) -> None:
    torch.manual_seed(0)
    make, x = RIGHT[name]
    Setting(make(), x).check()


# what a loss after the mask may be; each is a function of u, N × D
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "coding rate": lambda u: -torch.logdet(torch.eye(8).double() + 4 * u.t() @ u / len(u)),
    "slogdet": lambda u: torch.linalg.slogdet(torch.eye(8).double() + u.t() @ u)[1],
    "det": lambda u: torch.linalg.det(torch.eye(8).double() + u.t() @ u / 8),
    "ridge head": lambda u: (
        (u @ torch.linalg.solve(u.t() @ u + 0.1 * torch.eye(8).double(), u.t() @ X[:, :2]))
        .pow(2)
        .sum()
    ),
    "solve_ex": lambda u: torch.linalg.solve_ex(u.t() @ u + torch.eye(8).double(), u[0])[0].sum(),
    "tensorsolve": lambda u: torch.linalg.tensorsolve(
        u.t() @ u + torch.eye(8).double(), u[0]
    ).sum(),
    "triangular": lambda u: (
        torch.linalg.solve_triangular(
            (u.t() @ u + torch.eye(8).double()).tril(), u.t(), upper=False
        )
        .pow(2)
        .sum()
    ),
    "cholesky": lambda u: (
        torch.linalg.cholesky(u.t() @ u + torch.eye(8).double()).diagonal().log().sum()
    ),
    "eigenvalues": lambda u: (
        torch.linalg.eigvalsh(u.t() @ u + torch.arange(8.0).double().diag()).pow(1.5).sum()
    ),
    "nuclear norm": lambda u: torch.linalg.svdvals(u).sum(),
    "cumprod": lambda u: (u + 1).cumprod(1).sum(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str) -> None:
    setting = Setting(mlp())
    loss = LOSSES[name]
    setting.loss = lambda: loss(setting.mask(setting.network(setting.x)))  # type: ignore[method-assign]
    named = dict(setting.network.named_parameters())
    a = setting.mask.logits.detach().clone().requires_grad_()

    def pure(p: Mapping[str, Tensor]) -> Tensor:
        return loss(functional_call(setting.network, dict(p), (X,)) * a.sigmoid())

    g = torch.autograd.grad(pure(named), list(named.values()), create_graph=True)
    moved = {n: p - LR * d for (n, p), d in zip(named.items(), g, strict=True)}
    (expected,) = torch.autograd.grad(pure(moved), a)
    for method in ("exact", "double_backward"):
        assert relative(setting.hypergradient(method), expected) <= 1e-8, method


@torch.library.custom_op("metamask_tests::cubed", mutates_args=())
def cubed(x: Tensor) -> Tensor:
    return x**3


cubed.register_autograd(
    lambda ctx, g: 3 * ctx.saved_tensors[0] ** 2 * g,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * x


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


class Calls(nn.Sequential):
    """Puts a function behind the layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(super().forward(x))


def deformed(x: Tensor) -> Tensor:
    image = x.view(-1, 1, 4, 4)
    offsets = (x[:, :8].view(-1, 8, 1, 1) * 0.3).expand(-1, -1, 3, 3)
    kernel = torch.arange(4, dtype=torch.float64).view(1, 1, 2, 2)
    return torchvision.ops.deform_conv2d(image, offsets, kernel).flatten(1)


def aligned(x: Tensor) -> Tensor:
    boxes = [torch.tensor([[0.2, 0.3, 2.5, 3.0]], dtype=torch.float64)] * len(x)
    return torchvision.ops.roi_align(x.view(-1, 1, 4, 4), boxes, 3, 1.0, 2).flatten(1)


def products(x: Tensor) -> Tensor:
    rows = torch.tensor([[0] * 16, [1] * 16, [0] * 16, [1] * 16, [0] * 16])
    return torch.ones(2, 16, dtype=torch.float64).scatter_reduce(0, rows, x, "prod")


def on_grid(x: Tensor) -> Tensor:
    grid = torch.linspace(-1, 1, 18, dtype=x.dtype).view(1, 3, 3, 2).expand(len(x), -1, -1, -1)
    return F.grid_sample(x.view(-1, 1, 4, 4), grid, align_corners=True).flatten(1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("function", "words"),
    [
        (cubed, "another derivative in forward mode"),
        (deformed, "another derivative in forward mode"),
        (aligned, "another derivative in forward mode"),
        (products, "another derivative in forward mode"),
        (on_grid, "grid_sampler_2d in Calls has no forward mode"),
        (Doubled.apply, "fails in Calls"),
        (lambda x: torch.cdist(x, x.detach()[:4] + 1), "_cdist_forward in Calls has no"),
    ],
)
def test_lost_tangents_are_refused(function: Any, words: str) -> None:
    """And a difference goes on, which the message names."""
    setting = Setting(Calls(function))
    with pytest.raises(UserError, match=f"{words}.*'double_backward' or 'finite_diff") as caught:
        setting.hypergradient()
    assert "\n" not in str(caught.value)
    assert setting.hypergradient("finite_difference").isfinite().all()


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_right_or_refused() -> None:
    """Its interpreter changes after two calls."""
    setting = Setting(Calls(scripted))
    difference = setting.hypergradient("finite_difference", radius=1e-5)
    for _ in range(4):
        try:
            torch.testing.assert_close(setting.hypergradient(), difference, rtol=1e-6, atol=1e-9)
        except UserError as error:
            assert "forward mode" in str(error)


def test_cholesky_inverse_is_refused() -> None:
    setting = Setting(mlp())

    def loss() -> Tensor:
        u = setting.mask(setting.network(setting.x))
        factor = torch.linalg.cholesky(u.t() @ u + torch.eye(8).double())
        return (torch.cholesky_inverse(factor) * torch.arange(64.0).view(8, 8)).sum()

    setting.loss = loss  # type: ignore[method-assign]
    with pytest.raises(UserError, match="forward mode"):
        setting.hypergradient()


def test_double_backward_takes_and_says_what_it_can() -> None:
    Setting(mlp(WithFunction)).check("double_backward")
    backward = torch.autograd.function.once_differentiable(Doubled.backward)
    once = type("Once", (Doubled,), {"backward": staticmethod(backward)})
    with pytest.raises(UserError, match="double_backward.*use method='finite_difference'"):
        Setting(Calls(once.apply)).hypergradient("double_backward")  # type: ignore[attr-defined]


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d, nn.Identity])
def test_a_loss_with_gradients_of_its_own(norm: Callable[[int], nn.Module]) -> None:
    """PyTorch's forward mode of a gradient of a normalisation is wrong: right, or refused."""
    torch.manual_seed(0)
    setting = Setting(nn.Sequential(nn.Linear(6, 8), norm(8), nn.Tanh(), nn.Linear(8, 8)))
    plain = setting.loss

    def penalised() -> Tensor:
        x = setting.x = X.clone().requires_grad_()
        value = plain()
        return value + torch.autograd.grad(value, x, create_graph=True)[0].square().sum()

    setting.loss = penalised  # type: ignore[method-assign]
    difference = setting.hypergradient("finite_difference", radius=1e-4)
    try:
        exact = setting.hypergradient()
    except UserError as error:
        assert "double_backward" in str(error) and norm is not nn.Identity
    else:
        torch.testing.assert_close(exact, difference, rtol=1e-4, atol=1e-6)


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool):
        super().__init__()
        self.first, self.rest = nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.rest, self.first(x), use_reentrant=self.use_reentrant)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_activation_checkpointing_is_refused(method: str, use_reentrant: bool) -> None:
    setting = Setting(Checkpointed(use_reentrant))
    with pytest.raises(UserError, match="activation checkpointing"):
        setting.hypergradient(method)


@pytest.mark.parametrize("method", METHODS)
def test_the_cache_of_parametrisations_is_of_the_parameters_that_are_held(method: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), nn.Tanh())
    setting = Setting(network)
    expected = setting.hypergradient(method)
    with parametrize.cached():
        setting.network(setting.x)
        assert torch.equal(setting.hypergradient(method), expected)


class WithAQueue(nn.Module):
    """Its loss is a method, and no forward, as in a LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.head = nn.Linear(6, 8).double(), nn.Linear(8, 8).double()
        self.mask = DimensionalMask(8).double()
        self.register_buffer("queue", F.normalize(torch.randn(5, 8, dtype=torch.float64)))
        self.write = False

    def loss(self) -> Tensor:
        z = F.normalize(self.head(self.mask(self.backbone(X))))
        value = F.cross_entropy(z @ self.queue.t().clone() / 0.5, torch.arange(5))
        with torch.no_grad():
            self.queue.copy_(z)
            if self.write:
                self.head.weight.copy_(F.normalize(self.head.weight))
        return value


def test_a_queue_of_the_module_whose_method_is_the_loss() -> None:
    module = WithAQueue()
    queue, weight = module.queue.clone(), module.head.weight.clone()
    exact, twice = (
        mask_hypergradient(module.loss, module, module.mask, sgd(0.5), method)
        for method in ("exact", "double_backward")  # type: ignore[arg-type]
    )
    torch.testing.assert_close(exact, twice, rtol=1e-9, atol=1e-12)
    assert torch.equal(module.queue, queue)
    module.write = True
    for method in METHODS:
        with pytest.raises(UserError, match="writes to the parameter"):
            mask_hypergradient(module.loss, module, module.mask, sgd(0.5), method)
    assert torch.equal(module.head.weight, weight) and torch.equal(module.queue, queue)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e15])
def test_losses_of_any_size(scale: float) -> None:
    """In proportion: the loss by a factor, the rate by its inverse."""
    setting = Setting(mlp())
    expected, plain = setting.hypergradient(), setting.loss
    setting.loss = lambda: scale * plain()  # type: ignore[method-assign]
    for method in ("exact", "double_backward"):
        found = setting.hypergradient(method, sgd(LR / scale)) / scale
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_noise_of_its_own_is_seen() -> None:
    generator = torch.Generator().manual_seed(0)

    def noisy(x: Tensor) -> Tensor:
        return x * (torch.rand(x.shape, generator=generator) > 0.3)

    with pytest.raises(UserError, match="not repeated"):
        Setting(Calls(noisy)).hypergradient()


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_reaches_nothing_is_refused(method: Any) -> None:
    w, a, module = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 1.0]), nn.Linear(2, 1)
    params = dict(module.named_parameters())
    for moving in (params, {n: p.detach() for n, p in params.items()}):
        with pytest.raises(UserError, match="none of the parameters|was there before"):
            hypergradient(lambda p, a: module(w * a).sum(), moving, a, sgd(0.1), method)
    with pytest.raises(UserError, match="does not depend on the logits"):
        hypergradient(lambda p, a: (p["w"] ** 2).sum(), {"w": w}, a, sgd(0.1), method)


@pytest.mark.parametrize("method", METHODS)
def test_parameters_from_outside_of_the_loss_are_refused(method: Any) -> None:
    setting = Setting(mlp())
    plain, parameters = setting.loss, list(setting.network.parameters())

    def decayed() -> Tensor:
        return plain() + sum(p.square().sum() for p in parameters)

    with pytest.raises(UserError, match="'0.0.weight' that was there before"):
        setting.hypergradient(method, outer_loss=decayed)
    setting.loss = decayed  # type: ignore[method-assign]
    with pytest.raises(UserError, match="'0.0.weight' that was there before"):
        setting.hypergradient(method)


def test_parameters_of_the_functional_form() -> None:
    """One tensor under two names takes one step; what the loss does not reach may be there."""
    w, a = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    twice = hypergradient(
        lambda p, a: (a * p["u"] * p["v"] * p["u"]).sum(), {"u": w, "v": w}, a, sgd(0.1)
    )
    unused = {"w": w, "unused": torch.ones(2)}
    for method in METHODS:
        one = hypergradient(lambda p, a: (a * p["w"] ** 3).sum(), unused, a, sgd(0.1), method)
        assert one.shape == a.shape
    exact = hypergradient(lambda p, a: (a * p["w"] ** 3).sum(), unused, a, sgd(0.1))
    torch.testing.assert_close(twice, exact, rtol=1e-12, atol=1e-14)


def test_a_compiled_module_runs_as_it_was_written() -> None:
    setting = Setting(mlp())
    expected, plain = setting.hypergradient(), setting.network
    setting.network = torch.compile(plain, backend="aot_eager")  # type: ignore[assignment]
    found = mask_hypergradient(setting.loss, plain, setting.mask, sgd(LR))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mixed", [True, False])
def test_attention_in_low_precision(mixed: bool) -> None:
    """Its kernels round otherwise in forward mode: no reason to refuse it."""
    torch.manual_seed(0)
    setting = Setting(encoder_layer(dropout=0.0), TOKENS)
    expected = setting.hypergradient()
    dtype = torch.float32 if mixed else torch.bfloat16
    setting.mask.float()
    setting.network.to(dtype)
    setting.x, setting.target = setting.x.to(dtype), setting.target.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        found = setting.hypergradient()
    assert found.dtype == torch.float32
    assert float(F.cosine_similarity(found.double(), expected, dim=0)) > 0.98


def test_an_update_rarely_waits_for_the_device() -> None:
    """Reading a value off a tensor would stop a GPU: six times at most, however many layers."""
    network = torchvision.models.resnet50()
    network.fc = nn.Identity()
    setting = Setting(network, torch.randn(2, 3, 32, 32, dtype=torch.float64))
    reads: list[str] = []

    class Count(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if getattr(func, "__name__", "") in (
                "__bool__",
                "__float__",
                "__int__",
                "item",
                "tolist",
            ):
                reads.append(func.__name__)
            return func(*args, **(kwargs or {}))

    optimizer = torch.optim.SGD(setting.network.parameters(), 0.1, momentum=0.9)
    with Count():
        setting.hypergradient("exact", optimizer)
    assert len(reads) <= 6, reads


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(loss_fn=lambda p, a: p["w"] * a), "scalar"),
        (dict(loss_fn=lambda p, a: 1.0), "is a float"),
        (dict(loss_fn=lambda p, a: (p["w"] * a).sum() + 0j), "real scalar"),
        (dict(method="second_order"), "allowed are exact"),
        (dict(step=0.1), "step=0.1"),
        (dict(radius=0.0), "radius=0"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], words: str) -> None:
    good: dict[str, Any] = dict(
        loss_fn=lambda p, a: (p["w"] * a).sum(),
        params={"w": torch.ones(2)},
        logits=torch.ones(2),
        step=sgd(0.1),
    )
    with pytest.raises(UserError, match=words):
        hypergradient(**{**good, **arguments})


def test_wrong_modules() -> None:
    setting = Setting(mlp())
    with pytest.raises(UserError, match="mask: must be a module with logits"):
        mask_hypergradient(setting.loss, setting.network, nn.Identity(), sgd(0.1))
    with pytest.raises(UserError, match="its .module"):
        mask_hypergradient(setting.loss, nn.DataParallel(setting.network), setting.mask, sgd(0.1))
    with pytest.raises(UserError, match="must hold modules alone"):
        mask_hypergradient(setting.loss, list(setting.network.parameters()), setting.mask, sgd(0.1))
