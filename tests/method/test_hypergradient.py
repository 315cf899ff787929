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
from lightly.loss import BarlowTwinsLoss, NTXentLoss
from torch import Tensor, nn, optim
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import metamask_solo.method.hypergradient
from metamask_solo import DimensionalMask, hypergradient, mask_hypergradient, optimizer_step
from metamask_solo.errors import UserError
from metamask_solo.method.hypergradient import METHODS, Step

LR = 0.3
X, TOKENS, IMAGES = (
    torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for shape in ((5, 6), (3, 4, 8), (4, 3, 16, 16))
)
EYE = torch.eye(8, dtype=torch.float64)
every_method = pytest.mark.parametrize("method", METHODS)


def sgd(lr: float, decay: float = 0.0) -> Step:
    return lambda p, g: {n: p[n] - lr * (d + decay * p[n]) for n, d in g.items()}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


class Setting:
    """A network, a mask and a loss on one batch, in float64."""

    def __init__(self, network: nn.Module, x: Tensor = X, loss_of: Any = None):
        torch.manual_seed(3)
        self.network, self.x = network.double(), x
        state = copy.deepcopy(network.state_dict())
        with torch.no_grad():
            dims = network(x).shape[-1]
        network.load_state_dict(state)
        self.mask = DimensionalMask(dims).double()
        self.mask.logits.data.normal_()
        self.target = torch.randn(dims, dtype=torch.float64)
        self.loss_of = loss_of or self.usual_loss
        self.run: Callable[[nn.Module, Tensor], Tensor] = nn.Module.__call__

    def usual_loss(self, u: Tensor) -> Tensor:
        u = u.reshape(-1, len(self.target))
        return (u @ self.target).tanh().sum() + (u * u).mean()

    def loss(self) -> Tensor:
        return self.loss_of(self.mask(self.run(self.network, self.x)))  # type: ignore[no-any-return]

    def hypergradient(self, method: Any = "exact", step: Any = None, **kwargs: Any) -> Tensor:
        step = step or (lambda p, g: {n: p[n].sub_(LR * d) for n, d in g.items()})  # in place
        return mask_hypergradient(self.loss, self.network, self.mask, step, method, **kwargs)

    def expected(self, outer_x: Tensor | None = None) -> Tensor:
        """By definition: a double backward, every evaluation from the state of now."""
        logits, noise = self.mask.logits.detach().requires_grad_(), torch.get_rng_state()

        def loss(params: Mapping[str, Tensor], x: Tensor) -> Tensor:
            torch.set_rng_state(noise)
            twin = copy.deepcopy(self)
            twin.x = x
            whole = nn.ModuleDict({"network": twin.network, "mask": twin.mask})
            whole.forward = twin.loss  # type: ignore[method-assign]
            named = {f"network.{n}": p for n, p in params.items()} | {"mask.logits": logits}
            with sdpa_kernel(SDPBackend.MATH):
                return functional_call(whole, named, ())

        params = {n: p for n, p in self.network.named_parameters() if p.requires_grad}
        gradient = torch.autograd.grad(
            loss(params, self.x), list(params.values()), create_graph=True
        )
        moved = sgd(LR)(params, dict(zip(params, gradient, strict=True)))
        value = loss(moved, self.x if outer_x is None else outer_x)
        torch.set_rng_state(noise)
        return torch.autograd.grad(value, logits)[0]

    def over_real_steps(self, optimizer: optim.Optimizer, h: float = 1e-5) -> Tensor:
        """Central differences of the loss after ``optimizer.step()`` itself."""

        def after(logits: Tensor) -> Tensor:
            twin, its_optimizer = copy.deepcopy((self, optimizer))
            twin.mask.logits.data.copy_(logits)
            real_step(twin, its_optimizer)
            return twin.loss().detach()

        a = self.mask.logits.detach()
        # two differences, whose errors of second order cancel
        near, far = (
            torch.stack([(after(a + s * e) - after(a - s * e)) / (2 * s) for e in EYE])
            for s in (h, 2 * h)
        )
        return (4 * near - far) / 3

    def tensors(self) -> list[Tensor]:
        params = list(self.network.parameters())
        gradients = [p.grad for p in params if p.grad is not None]
        return [*params, *self.network.buffers(), self.mask.logits, *gradients]

    def check(self, *methods: str) -> None:
        """The methods give the definition, and leave everything as it was, bit for bit."""
        for p in self.network.parameters():
            p.grad = torch.randn_like(p)
        before, noise = [(id(t), t.clone()) for t in self.tensors()], torch.get_rng_state()
        expected = self.expected()
        for method in methods or ("exact", "double_backward"):
            assert relative(self.hypergradient(method), expected) <= 1e-8, method
        for t, (identity, value) in zip(self.tensors(), before, strict=True):
            assert id(t) == identity and torch.equal(t, value)
        assert torch.equal(torch.get_rng_state(), noise)


def real_step(setting: Setting, optimizer: optim.Optimizer) -> None:
    optimizer.zero_grad()
    setting.loss().backward()
    optimizer.step()


def mlp(dims: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, dims), nn.Tanh(), nn.Linear(dims, dims))


# --- any optimiser's own step ----------------------------------------------------------------

OPTIMIZERS: dict[str, tuple[type[optim.Optimizer], dict[str, Any]]] = {
    "sgd": (optim.SGD, {"lr": 0.1}),
    "sgd momentum decay": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}),
    "sgd nesterov": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "sgd dampening": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.4}),
    "subclass": (type("Plain", (optim.SGD,), {}), {"lr": 0.1}),
    "sgd maximize": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "maximize": True}),
    "adam decay": (optim.Adam, {"weight_decay": 0.1, "eps": 1e-3}),
    "amsgrad": (optim.Adam, {"amsgrad": True, "eps": 1e-3}),
    "adamw": (optim.AdamW, {"eps": 1e-3}),
    "nadam": (optim.NAdam, {"eps": 1e-3}),
    "radam": (optim.RAdam, {}),
    "rmsprop": (optim.RMSprop, {"eps": 1e-3}),
    "rmsprop centred": (optim.RMSprop, {"centered": True, "momentum": 0.5, "eps": 1e-3}),
    "adagrad": (optim.Adagrad, {"eps": 1e-3}),
    "adamax": (optim.Adamax, {"eps": 1e-3}),
    "adadelta": (optim.Adadelta, {"lr": 1.0}),
    "asgd": (optim.ASGD, {"lr": 0.1}),
    "rprop": (optim.Rprop, {}),
}


@pytest.mark.parametrize(("steps", "still"), [(0, 0), (3, 0), (0, 1), (3, 2)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_trial_step_is_the_optimisers_own_next_step(name: str, steps: int, still: int) -> None:
    """Values and derivatives over the real ``optimizer.step()``, groups with rates of their own.

    So many of the groups have a rate of 0, as when a warm-up begins.
    """
    setting, (kind, options) = Setting(mlp()), OPTIMIZERS[name]
    groups = [{"params": list(setting.network[0].parameters())}]
    groups.append({"params": list(setting.network[2].parameters()), "lr": 0.05})  # type: ignore
    optimizer = kind(groups, **{"lr": 0.01, **options})
    for _ in range(steps):
        real_step(setting, optimizer)
    for group in optimizer.param_groups[:still]:
        group["lr"] = torch.tensor(0.0) if kind in (optim.SGD, optim.Adam) else 0.0
    state = copy.deepcopy(optimizer.state_dict())
    params = dict(setting.network.named_parameters())
    g = dict(zip(params, torch.autograd.grad(setting.loss(), list(params.values())), strict=True))
    virtual = optimizer_step(optimizer, params)({n: p.detach() for n, p in params.items()}, g)
    exact = setting.hypergradient("exact", optimizer)
    assert relative(exact, setting.hypergradient("double_backward", optimizer)) <= 1e-10
    assert str(optimizer.state_dict()) == str(state)
    expected = setting.over_real_steps(optimizer)
    assert relative(exact, expected) <= 1e-6
    if kind is optim.SGD and still < 2:  # the term that it leaves out is there
        assert relative(setting.hypergradient("first_order", optimizer), expected) > 1e-6
    real_step(setting, optimizer)
    for n, p in params.items():
        torch.testing.assert_close(virtual[n], p.detach(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ["dead units", "tiny", "linear"])
def test_gradients_of_zero_have_their_slope_under_adam(kind: str) -> None:
    """Its root has none at 0. Behind a linear mask at 0 the mask moves such gradients."""
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
    setting = Setting(network)
    if kind == "dead units":
        network[0].bias.data[:3] = -100.0
    elif kind == "tiny":  # not 0, but their squares are
        setting.x = torch.where(torch.arange(6) == 2, 1e-200, X)
    else:
        setting.mask = DimensionalMask(8, "linear", 0.0).double()
    optimizer = optim.AdamW(network.parameters(), lr=0.05, eps=1e-2)
    exact = setting.hypergradient("exact", optimizer)
    assert relative(exact, setting.over_real_steps(optimizer)) <= 1e-4
    setting.x = torch.where(torch.arange(6) == 2, float("nan"), X)
    assert setting.hypergradient("exact", optimizer).isnan().any()  # NaN of the loss is seen


def test_a_rate_of_its_own_is_a_plain_gradient_step_with_the_groups_decay() -> None:
    setting = Setting(mlp())
    groups = [{"params": list(layer.parameters())} for layer in (setting.network[0::2])]
    groups[0]["weight_decay"] = 0.1  # type: ignore[assignment]
    adam = optim.Adam(groups, lr=5.0)
    params = {n: p.detach() for n, p in setting.network.named_parameters()}
    g = {n: torch.randn_like(p) for n, p in params.items()}
    moved = optimizer_step(adam, dict(setting.network.named_parameters()), lr=0.3)(params, g)
    for n, p in params.items():
        decay = 0.1 if n.startswith("0") else 0.0
        torch.testing.assert_close(moved[n], p - 0.3 * (g[n] + decay * p))
    logits = setting.mask.logits.requires_grad_()
    (plain,) = torch.autograd.grad(setting.loss(), logits)
    for method in METHODS:  # a rate of 0 gives the plain gradient
        torch.testing.assert_close(setting.hypergradient(method, adam, lr=0.0), plain)


class Detached(optim.SGD):
    """Its rate depends on the gradient in a way that autograd does not see."""

    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            p.add_(p.grad / (1 + p.grad.detach().norm()), alpha=-1.0)


def with_a_hook(params: Any) -> optim.Optimizer:
    optimizer = optim.SGD(params, lr=0.1)
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: Detached(p, 0.1), "the step of Detached.*1e-3"),
        (with_a_hook, "the step of SGD with hooks.*1e-3"),
        (lambda p: timm.optim.create_optimizer_v2(list(p), "lars", lr=0.1), "Lars.*1e-3"),
        (lambda p: optim.LBFGS(p), "LBFGS.*1e-3"),
        (lambda p: optim.SGD(list(p)[:1], lr=0.1), "'0.0.bias' is in no group"),
        (lambda p: lambda now, g: {n: now[n] - d.detach() for n, d in g.items()}, "no derivative"),
    ],
)
def test_steps_without_a_right_derivative_are_refused(make: Any, words: str) -> None:
    setting = Setting(mlp())
    optimizer = make(setting.network.parameters())
    for method in ("exact", "double_backward", "finite_difference"):
        with pytest.raises(UserError, match=words) as caught:
            setting.hypergradient(method, optimizer)
        assert "\n" not in str(caught.value)
    if "1e-3" in words:
        assert setting.hypergradient("exact", optimizer, lr=1e-3).all()


# --- the ways, by their formulas -------------------------------------------------------------


def test_first_order_and_finite_difference_are_their_formulas() -> None:
    setting, lr, radius = Setting(mlp()), 0.05, 1e-2
    named = {n: p.detach().clone() for n, p in setting.network.named_parameters()}
    a, step = setting.mask.logits, sgd(lr, 5e-4)

    def pure(p: Mapping[str, Tensor], a: Tensor) -> Tensor:
        return setting.usual_loss(functional_call(setting.network, dict(p), (X,)) * a.sigmoid())

    def partials(p: Mapping[str, Tensor]) -> tuple[list[Tensor], Tensor]:
        leaves = {n: t.clone().requires_grad_() for n, t in p.items()}
        logits = a.detach().clone().requires_grad_()
        *g, direct = torch.autograd.grad(pure(leaves, logits), [*leaves.values(), logits])
        return g, direct

    g, _ = partials(named)
    v, direct = partials(step(named, dict(zip(named, g, strict=True))))
    assert relative(hypergradient(pure, named, a, step, "first_order"), direct) <= 1e-12
    size = radius / torch.cat([d.flatten() for d in v]).norm()
    near, far = (
        partials({n: p + r * d for (n, p), d in zip(named.items(), v, strict=True)})[1]
        for r in (size, -size)
    )
    official = direct - lr * (near - far) / (2 * size)
    rough, fine = (
        hypergradient(pure, named, a, step, "finite_difference", radius=r) for r in (0.1, radius)
    )
    assert relative(fine, official) <= 1e-9
    exact = hypergradient(pure, named, a, step)
    # second order: a tenth of the radius, a hundredth
    assert relative(fine, exact) < relative(rough, exact) / 50


def test_a_difference_that_would_be_rounding_is_refused() -> None:
    """Of an input that only the second batch has, Adam's step is steep."""
    setting = Setting(mlp())
    setting.network.float(), setting.mask.float()
    setting.x, setting.target = X.float(), setting.target.float()
    second = copy.copy(setting)
    setting.x = torch.where(torch.arange(6) == 2, 0.0, second.x)
    with pytest.raises(UserError, match="rounding.*'exact' or 'double_backward'"):
        step = optim.Adam(setting.network.parameters())
        setting.hypergradient("finite_difference", step, outer_loss=second.loss)
    usual = setting.usual_loss

    def in_bf16(u: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return usual(u)

    setting.loss_of = in_bf16
    with pytest.raises(UserError, match="rounding"):
        setting.hypergradient("finite_difference", sgd(1.0))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.floats(0, 0.5), st.floats(0, 0.1), st.sampled_from([1e-30, 1, 1e15]))
def test_exact_on_random_quadratics(seed: int, lr: float, decay: float, scale: float) -> None:
    """L = ½ wᵀ diag(a) w + bᵀ w has its hypergradient in closed form, at any size."""
    rng = torch.Generator().manual_seed(seed)
    w, b, a = torch.randn(3, 5, generator=rng, dtype=torch.float64)

    def loss(p: Mapping[str, Tensor], a: Tensor) -> Tensor:
        return scale * (0.5 * (a * p["w"] ** 2).sum() + (b * p["w"]).sum())

    moved = w - lr * (a * w + b + decay * w)
    expected = scale * (0.5 * moved**2 - lr * w * (a * moved + b))
    params = {"w": w, "unused": torch.ones(2)}
    result = hypergradient(loss, params, a, sgd(lr / scale, decay * scale))
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-12 * scale)


def test_an_outer_loss() -> None:
    """As in DARTS: the trial step on one batch, the loss after it on another."""
    setting = Setting(mlp())
    second = copy.copy(setting)
    second.x = X.flip(1)
    for method in ("exact", "double_backward"):
        result = setting.hypergradient(method, outer_loss=second.loss)
        assert relative(result, setting.expected(second.x)) <= 1e-10


# --- any network, any loss -------------------------------------------------------------------


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Any], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Any) -> Tensor:
        return self.function(x)


def centred_without_gradients(h: Tensor) -> Tensor:
    with torch.no_grad():
        centre = h.mean(0)
    return h - 2 * centre + F.normalize(h, dim=0) * centre.detach()


def in_another_layout() -> nn.Module:
    layers = Apply(Tensor.t), nn.Dropout(), Apply(Tensor.t)
    return nn.Sequential(nn.Linear(6, 8), *layers, nn.Linear(8, 8), nn.Tanh())


class MemoryBank(nn.Sequential):
    """With a loss of lightly's, whose bank is a buffer."""

    def forward(self, x: Tensor) -> Tensor:
        h = self[0](x)
        return h * self[1](h, h.tanh())  # type: ignore[no-any-return]


class Stateful(nn.Module):
    """Replaces a centre, as DINO's own loss does; writes to a frozen twin, a queue and a count."""

    def __init__(self, writes: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 8)
        self.average = copy.deepcopy(self.layer).requires_grad_(False)
        self.register_buffer("center", torch.zeros(1, 8))
        self.register_buffer("queue", F.normalize(torch.randn(5, 8)))
        self.writes, self.calls = writes, 0

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.layer.weight, self.layer.bias)
        target = ((h - self.center) / 0.4).softmax(-1).detach()
        self.center = 0.9 * self.center + 0.1 * h.detach().mean(0, keepdim=True)
        self.calls += 1
        with torch.no_grad():
            self.average.weight.lerp_(2 * self.layer.weight, 0.5)
            if self.writes:
                self.layer.weight.copy_(F.normalize(self.layer.weight))
        value = F.cross_entropy(h @ self.queue.t().clone(), torch.arange(5))
        self.queue.copy_(F.normalize(h.detach()))
        return self.calls * value * h + target * h + F.linear(x, self.average.weight)


def tied() -> nn.Module:
    one, two = nn.Linear(8, 8), nn.Linear(8, 8)
    two.weight = one.weight
    return nn.Sequential(nn.Linear(6, 8), one, nn.Tanh(), two, one)


def gru() -> nn.Module:
    return nn.Sequential(nn.GRU(8, 8), Apply(lambda result: result[0][-1]))


def channels_last() -> nn.Module:
    layers = nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Dropout(), nn.Flatten()
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)  # type: ignore


def resnet(make: Callable[[], Any] = torchvision.models.resnet18) -> nn.Module:
    network = make()
    network.fc = nn.Identity()
    return network  # type: ignore[no-any-return]


def vit() -> nn.Module:
    sizes = {"img_size": 16, "patch_size": 8, "depth": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes)  # type: ignore


def encoder_layer(**kwargs: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **kwargs)


def after(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), layer, nn.Tanh(), nn.Linear(8, 8))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "resnet": (resnet, IMAGES),
    "vit": (vit, IMAGES),
    "transformer with dropout": (lambda: encoder_layer(dropout=0.3), TOKENS),
    "transformer in evaluation": (lambda: encoder_layer().eval(), TOKENS),
    "dropout in another layout": (in_another_layout, X),
    "batch norm": (lambda: after(nn.BatchNorm1d(8)), X),
    "weight norm": (lambda: after(nn.utils.weight_norm(nn.Linear(8, 8))), X),
    "weight norm of all": (lambda: after(nn.utils.weight_norm(nn.Linear(8, 8), dim=None)), X),
    "spectral norm": (lambda: after(parametrizations.spectral_norm(nn.Linear(8, 8))), X),
    "gru": (gru, TOKENS),
    "no grad inside": (lambda: mlp().append(Apply(centred_without_gradients)), X),
    "memory bank": (lambda: MemoryBank(nn.Linear(6, 8), NTXentLoss(memory_bank_size=(8, 8))), X),
    "channels last": (channels_last, IMAGES),
    "tied": (tied, X),
    "frozen": (lambda: nn.Sequential(nn.Linear(6, 8).requires_grad_(False), *mlp()[1:]), X),
}


# what a loss after the mask may be, with linear algebra above all; each of u, N × 8
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "coding rate": lambda u: -torch.logdet(EYE + 4 * u.t() @ u / len(u)),
    "slogdet": lambda u: torch.linalg.slogdet(EYE + u.t() @ u)[1],
    "det": lambda u: torch.linalg.det(EYE + u.t() @ u / 8),
    "ridge head": lambda u: (
        (u @ torch.linalg.solve(u.t() @ u + 0.1 * EYE, u.t() @ X[:, :2])).pow(2).sum()
    ),
    "solve_ex": lambda u: torch.linalg.solve_ex(u.t() @ u + EYE, u[0])[0].sum(),
    "tensorsolve": lambda u: torch.linalg.tensorsolve(u.t() @ u + EYE, u[0]).sum(),
    "triangular": lambda u: (
        torch.linalg.solve_triangular((u.t() @ u + EYE).tril(), u.t(), upper=False).pow(2).sum()
    ),
    "cholesky": lambda u: torch.linalg.cholesky(u.t() @ u + EYE).diagonal().log().sum(),
    "cumprod": lambda u: (u + 1).cumprod(1).sum(),
    "mean squared error": lambda u: F.mse_loss(u, EYE[:5]) + nn.MSELoss()(u, u.detach() + 1),
    "lightly's Barlow Twins": lambda u: BarlowTwinsLoss()(u, u.detach().tanh() + u**2),
    "vmap": lambda u: torch.vmap(lambda row: (row.tanh() * row.detach()).sum())(u).sum(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*NETWORKS, *LOSSES])
def test_networks_and_losses(name: str) -> None:
    torch.manual_seed(0)
    make, x = NETWORKS.get(name, (mlp, X))
    Setting(make(), x, LOSSES.get(name)).check()


@torch.library.custom_op("metamask_tests::cubed", mutates_args=())
def cubed(x: Tensor) -> Tensor:
    return x**3


cubed.register_autograd(
    lambda ctx, g: 3 * ctx.saved_tensors[0] ** 2 * g,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class Doubled(torch.autograd.Function):
    """Has a backward and no forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


def followed_by(function: Any, dims: int = 16) -> nn.Module:
    return mlp(dims).append(Apply(function))


def deformed(x: Tensor) -> Tensor:
    offsets = (x[:, :8].view(-1, 8, 1, 1) * 0.3).expand(-1, -1, 3, 3)
    kernel = torch.arange(4, dtype=torch.float64).view(1, 1, 2, 2)
    return torchvision.ops.deform_conv2d(x.view(-1, 1, 4, 4), offsets, kernel).flatten(1)


def aligned(x: Tensor) -> Tensor:
    boxes = [torch.tensor([[0.2, 0.3, 2.5, 3.0]], dtype=torch.float64)] * len(x)
    return torchvision.ops.roi_align(x.view(-1, 1, 4, 4), boxes, 3, 1.0, 2).flatten(1)


def products(x: Tensor) -> Tensor:
    rows = torch.tensor([0, 1, 0, 1, 0])[:, None].expand(5, 16)
    return torch.ones(2, 16, dtype=torch.float64).scatter_reduce(0, rows, x, "prod")


def inverse(x: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(x.t() @ x + 16 * torch.eye(16).double()))


GENERATOR = torch.Generator().manual_seed(0)
DROPPED, WRONG = "has no forward mode|jvp is not implemented", "give different derivatives"


def rotated(p: Any, g: Any) -> Any:
    """A step across the gradient, along which the loss itself does not change."""
    return {n: p[n] - 1e-9 * torch.cat([d[len(d) // 2 :], -d[: len(d) // 2]]) for n, d in g.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("function", "words"),
    [
        (cubed, DROPPED),
        (deformed, DROPPED),
        (aligned, DROPPED),
        (products, DROPPED),
        (inverse, WRONG),
        (lambda x: x * (torch.rand(x.shape, generator=GENERATOR) > 0.3), WRONG),
        (Doubled.apply, "jvp"),
    ],
)
def test_lost_tangents_are_refused(function: Any, words: str) -> None:
    """And a difference goes on, which the message names."""
    setting = Setting(followed_by(function))
    step = rotated if words == DROPPED else None
    with pytest.raises(UserError, match=f"({words}).*'double_backward' or 'finite_diff") as caught:
        setting.hypergradient(step=step)
    assert "\n" not in str(caught.value)
    assert setting.hypergradient("finite_difference").isfinite().all()


def slope_of(u: Tensor, create_graph: bool = True) -> Tensor:
    u = u * 1.0
    value = (F.layer_norm(u, [8]) @ EYE[::2].t().cumsum(0)).tanh().pow(2).sum()
    return torch.autograd.grad(value, u, create_graph=create_graph)[0]


def test_a_loss_with_a_gradient_of_its_own() -> None:
    """Its further derivatives in PyTorch are wrong for a normalisation; a difference goes on."""
    setting = Setting(mlp(), loss_of=lambda u: u.pow(2).mean() + slope_of(u).pow(2).mean())
    for method in ("exact", "double_backward"):
        with pytest.raises(UserError, match=f"{method}.*own; use.*'finite_difference'"):
            setting.hypergradient(method)
    expected = setting.over_real_steps(optim.SGD(setting.network.parameters(), LR))
    assert relative(setting.hypergradient("finite_difference", radius=1e-4), expected) <= 1e-5
    setting.loss_of = lambda u: (u * slope_of(u, create_graph=False)).sum()
    setting.check("double_backward")  # which has it as a constant


def test_double_backward_takes_and_says_what_it_can() -> None:
    Setting(followed_by(Doubled.apply)).check("double_backward")
    backward = torch.autograd.function.once_differentiable(Doubled.backward)
    once = type("Once", (Doubled,), {"backward": staticmethod(backward)})
    with pytest.raises(UserError, match="double_backward.*use method='finite_difference'"):
        Setting(followed_by(once.apply)).hypergradient("double_backward")  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_reentrant", [True, False])
@every_method
def test_activation_checkpointing_is_refused(method: str, use_reentrant: bool) -> None:
    rest = nn.Linear(8, 8).double()
    setting = Setting(followed_by(lambda h: checkpoint(rest, h, use_reentrant=use_reentrant), 8))
    with pytest.raises(UserError, match="activation checkpointing"):
        setting.hypergradient(method)


@every_method
def test_the_cache_of_parametrisations_is_of_the_parameters_that_are_held(method: str) -> None:
    setting = Setting(after(parametrizations.weight_norm(nn.Linear(8, 8))))
    expected = setting.hypergradient(method)
    with parametrize.cached():
        setting.network(setting.x)
        assert torch.equal(setting.hypergradient(method), expected)


@pytest.mark.parametrize("called", [True, False])
def test_a_module_with_a_state_of_its_own(called: bool) -> None:
    """Also as one whose loss is a method, as in a LightningModule, and past a list of modules."""
    torch.manual_seed(0)
    setting, writing = Setting(Stateful()), Setting(Stateful(writes=True))
    if not called:
        setting.run = writing.run = lambda network, x: network.forward(x)
    calls = setting.network.calls, writing.network.calls
    setting.check()
    if called:
        of_layer = mask_hypergradient(setting.loss, setting.network.layer, setting.mask, sgd(LR))
        assert relative(of_layer, setting.expected()) <= 1e-8
    before = copy.deepcopy(writing.network.state_dict())
    for method in METHODS:
        with pytest.raises(UserError, match="writes to a parameter"):
            writing.hypergradient(method)
    assert (setting.network.calls, writing.network.calls) == calls
    assert all(torch.equal(t, before[n]) for n, t in writing.network.state_dict().items())


@every_method
def test_two_masks_with_one_tensor(method: str) -> None:
    setting, twin = Setting(mlp()), DimensionalMask(8)
    twin.logits = setting.mask.logits
    setting.loss_of = lambda u: setting.mask(u).tanh().sum()
    expected = setting.hypergradient(method)
    setting.loss_of = lambda u: twin(u).tanh().sum()
    assert torch.equal(setting.hypergradient(method), expected)
    assert not setting.mask.logits.requires_grad
    setting.loss_of = lambda u: (u * twin.mask()).sum()  # it is not called
    with pytest.raises(UserError, match="taken from a module outside"):
        setting.hypergradient(method)


@every_method
def test_a_loss_that_reaches_nothing_or_what_was_there_before_is_refused(method: Any) -> None:
    w, a, module = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 1.0]), nn.Linear(2, 1)
    params = dict(module.named_parameters())
    before = {n: p.detach() for n, p in params.items()}
    with pytest.raises(UserError, match="parameters that the trial step moves"):
        hypergradient(lambda p, a: module(w * a).sum(), before, a, sgd(0.1), method)
    held = hypergradient(lambda p, a: module(w * a).sin(), params, a, sgd(0.1), method)
    pure = lambda p, a: functional_call(module, p, (w * a,)).sin()  # noqa: E731
    assert torch.equal(held, hypergradient(pure, params, a, sgd(0.1), method))
    with pytest.raises(UserError, match="does not depend on the logits"):
        hypergradient(lambda p, a: (p["w"] ** 2).sum(), {"w": w}, a, sgd(0.1), method)
    setting = Setting(mlp())
    plain, parameters = setting.loss, list(setting.network.parameters())
    with pytest.raises(UserError, match="taken from a module outside"):
        setting.hypergradient(
            method, outer_loss=lambda: plain() + sum(p.square().sum() for p in parameters)
        )


class Attribute(nn.Module):
    """Subtracts the mean that it has seen so far, which it holds as a plain tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 8).double()
        self.centre = torch.zeros(8, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        out = h - self.centre.clone()
        self.centre.mul_(0.5).add_(h.detach().mean(0), alpha=0.5)
        return out


@every_method
def test_what_is_not_passed_in_is_left_as_it_was(method: Any) -> None:
    network, teacher, mask = Attribute(), nn.BatchNorm1d(8).double(), DimensionalMask(8).double()
    smooth = {"weight": torch.full((8,), 0.5, dtype=torch.float64), "bias": teacher.bias.detach()}
    weights = dict(teacher.named_parameters())

    def loss() -> Tensor:
        z = mask(network(X)).tanh()
        target = functional_call(teacher, smooth, (z.detach(),))
        teacher.eval()
        target = target + teacher(z).detach()
        teacher.train()
        return (z - target).square().sum()

    optimizer = optim.SGD(network.parameters(), lr=0.1)
    result = mask_hypergradient(loss, network, mask, optimizer, method)
    assert torch.equal(mask_hypergradient(loss, network, mask, optimizer, method), result)
    assert not network.centre.any() and teacher.training
    assert all(p is weights[n] for n, p in teacher.named_parameters())

    def clips() -> Tensor:
        network.linear.weight.data.clamp_(-0.1, 0.1)
        return loss()

    before = network.linear.weight.detach().clone()
    with pytest.raises(UserError, match="writes to a parameter"):
        mask_hypergradient(clips, network, mask, optimizer, method)
    assert torch.equal(network.linear.weight, before)


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
        result = setting.hypergradient()
        adamw = optim.AdamW(setting.network.parameters())
        assert setting.hypergradient("exact", adamw).isfinite().all()
    assert result.dtype == torch.float32
    assert float(F.cosine_similarity(result.double(), expected, dim=0)) > 0.98


def test_autocast_inside_the_loss() -> None:
    """The check knows the precision that the loss computes in."""
    torch.manual_seed(0)
    for _ in range(8):
        table, mask, rows = nn.Embedding(200, 16), DimensionalMask(16), torch.randint(200, (16, 6))
        network = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))

        def loss() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                u = F.normalize(network(mask(table(rows).mean(1))))  # noqa: B023
                return F.cross_entropy(u @ u.t() / 0.2, torch.arange(16))

        assert mask_hypergradient(loss, [table, network], mask, sgd(0.1)).isfinite().all()


class Reads(torch.overrides.TorchFunctionMode):
    """Counts the values that are read off tensors, for which a GPU would stop."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = ("__bool__", "__float__", "__int__", "item", "tolist")
        self.count += getattr(func, "__name__", "") in names
        return func(*args, **(kwargs or {}))


def test_an_update_rarely_waits_for_the_device() -> None:
    """Six times at most, however many layers."""
    setting = Setting(resnet(torchvision.models.resnet50), IMAGES[:2])
    optimizer = optim.SGD(setting.network.parameters(), 0.1, momentum=0.9)
    with Reads() as reads:
        setting.hypergradient("exact", optimizer)
    assert reads.count <= 6


class InSinglePrecision(TorchDispatchMode):
    """Fails where a tensor would have double precision, which Apple's GPUs have not."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        assert torch.float64 not in {getattr(t, "dtype", None) for t in tree_leaves(result)}, func
        return result


@every_method
def test_apples_gpus_without_double_precision(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metamask_solo.method.hypergradient, "_double", lambda _: torch.float32)
    network, mask = nn.Linear(6, 8), DimensionalMask(8)
    x, optimizer = X.float(), optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    with InSinglePrecision():
        mask_hypergradient(lambda: mask(network(x)).sin().sum(), network, mask, optimizer, method)


def test_wrong_arguments() -> None:
    setting = Setting(mlp())
    with pytest.raises(UserError, match="allowed are exact"):
        setting.hypergradient("second_order")
    with pytest.raises(UserError, match="radius=0: must be above 0"):
        setting.hypergradient("finite_difference", radius=0)
    with pytest.raises(UserError, match="has no effect on a step"):
        setting.hypergradient(lr=0.1)
    with pytest.raises(UserError, match="mask: must be a module with logits"):
        mask_hypergradient(setting.loss, setting.network, nn.Identity(), sgd(0.1))
    with pytest.raises(UserError, match="parameters that the trial step moves"):
        mask_hypergradient(setting.loss, [], setting.mask, sgd(0.1))
    with pytest.raises(UserError, match="a tensor of one number"):
        Setting(mlp(), loss_of=lambda u: u).hypergradient()
    half = {"w": nn.Parameter(torch.ones(2).half())}
    with pytest.raises(UserError, match="float16.*1e-3"):
        optimizer_step(optim.Adam(half.values()), half)(half, half)  # type: ignore
