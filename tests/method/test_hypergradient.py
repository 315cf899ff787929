"""The hypergradient against a double backward in float64, and what it must leave alone."""

from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from metamask_solo.method.hypergradient import METHODS, hypergradient
from metamask_solo.method.trial import TrialStep

Network = tuple[nn.Module, int, tuple[int, ...]]


def mlp() -> Network:
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 8)), 8, (6,)


def resnet() -> Network:
    network = torchvision.models.resnet18()
    network.fc = nn.Identity()
    return network, 512, (3, 32, 32)


def vit() -> Network:
    network = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, num_classes=0, img_size=32, depth=3
    )
    return network, network.num_features, (3, 32, 32)


NETWORKS: dict[str, Callable[[], Network]] = {"mlp": mlp, "resnet18": resnet, "vit_tiny": vit}
NAMES = ["mlp", pytest.param("resnet18", marks=pytest.mark.slow), "vit_tiny"]


class Problem:
    """A small MetaMask problem in float64: network, head, two views, mask logits."""

    def __init__(self, name: str, batch: int = 6):
        torch.manual_seed(0)
        network, dims, shape = NETWORKS[name]()
        self.network = network.double().train()
        self.head = nn.Sequential(
            nn.Linear(dims, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8)
        ).double()
        self.views = [torch.randn(batch, *shape, dtype=torch.float64) for _ in range(2)]
        self.logits = 0.5 * torch.randn(dims, dtype=torch.float64)
        self.collect()

    def collect(self) -> None:
        self.params = {
            **{f"network.{n}": p for n, p in self.network.named_parameters()},
            **{f"head.{n}": p for n, p in self.head.named_parameters()},
        }

    def part(self, name: str, params: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n.split(".", 1)[1]: p for n, p in params.items() if n.startswith(name)}

    def loss(self, params: dict[str, Tensor], logits: Tensor) -> Tensor:
        network, head = self.part("network", params), self.part("head", params)
        h = [functional_call(self.network, network, (x,)) for x in self.views]
        z = [functional_call(self.head, head, (x * torch.sigmoid(logits),)) for x in h]
        z1, z2 = (F.normalize(x) for x in z)
        similarity = z1 @ z2.T / 0.2
        return F.cross_entropy(similarity, torch.arange(len(z1)))

    def trial(self, lr: float, momentum: float = 0.0, weight_decay: float = 0.0) -> TrialStep:
        buffers = {n: 0.1 * torch.randn_like(p) for n, p in self.params.items()}
        return TrialStep(lr, momentum, weight_decay, buffers if momentum else None)


def by_double_backward(problem: Problem, trial: TrialStep) -> Tensor:
    """The definition: differentiate the loss after the trial step through the trial step."""
    logits = problem.logits.clone().requires_grad_()
    params = {n: p.detach().clone().requires_grad_() for n, p in problem.params.items()}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = problem.loss(params, logits)
        gradients = torch.autograd.grad(
            loss, list(params.values()), create_graph=True, allow_unused=True
        )
        moved = {}
        for (name, p), g in zip(params.items(), gradients, strict=True):
            d = torch.zeros_like(p) if g is None else g
            d = d + trial.weight_decay * p
            if trial.momentum_buffers:
                d = d + trial.momentum * trial.momentum_buffers[name]
            moved[name] = p - trial.lr * d
        (result,) = torch.autograd.grad(problem.loss(moved, logits), logits)
    return result


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("lr", "momentum", "weight_decay"),
    [(1e-3, 0.0, 0.0), (1e-3, 0.9, 5e-4), (0.05, 0.9, 0.0), (0.4, 0.0, 5e-4), (0.4, 0.9, 5e-4)],
)
def test_exact_is_the_double_backward(
    name: str, lr: float, momentum: float, weight_decay: float
) -> None:
    problem = Problem(name)
    trial = problem.trial(lr, momentum, weight_decay)
    expected = by_double_backward(problem, trial)
    exact = hypergradient(problem.loss, problem.params, problem.logits, trial)
    assert relative(exact, expected) <= 1e-9
    first = hypergradient(problem.loss, problem.params, problem.logits, trial, "first_order")
    assert relative(first, expected) > 1e-6  # the term that first_order leaves out is there


@pytest.mark.parametrize("name", NAMES)
def test_first_order_and_finite_difference_are_their_formulas(name: str) -> None:
    problem = Problem(name)
    lr, decay, radius = 0.05, 5e-4, 1e-2
    trial = TrialStep(lr, weight_decay=decay)
    p0 = {n: p.detach().clone().requires_grad_() for n, p in problem.params.items()}
    grads = torch.autograd.grad(
        problem.loss(p0, problem.logits), list(p0.values()), allow_unused=True
    )
    moved = {
        n: (p - lr * ((0 if g is None else g) + decay * p)).detach().requires_grad_()
        for (n, p), g in zip(p0.items(), grads, strict=True)
    }
    a = problem.logits.clone().requires_grad_()
    *v, direct = torch.autograd.grad(
        problem.loss(moved, a), [*moved.values(), a], allow_unused=True
    )
    v = [torch.zeros_like(p) if g is None else g for g, p in zip(v, p0.values(), strict=True)]
    first = hypergradient(problem.loss, problem.params, problem.logits, trial, "first_order")
    assert relative(first, direct) <= 1e-12

    size = radius / torch.cat([g.flatten() for g in v]).norm()
    sides = []
    for sign in (1, -1):
        near = {n: p.detach() + sign * size * g for (n, p), g in zip(p0.items(), v, strict=True)}
        (side,) = torch.autograd.grad(problem.loss(near, a), a)
        sides.append(side)
    expected = direct - lr * (sides[0] - sides[1]) / (2 * size)
    difference = hypergradient(
        problem.loss, problem.params, problem.logits, trial, "finite_difference", radius=radius
    )
    assert relative(difference, expected) <= 1e-9


def test_the_difference_converges_to_exact_on_a_smooth_network() -> None:
    problem = Problem("mlp")
    problem.head[2] = nn.Tanh()
    trial = problem.trial(0.1)
    exact = hypergradient(problem.loss, problem.params, problem.logits, trial)
    errors = [
        relative(
            hypergradient(
                problem.loss,
                problem.params,
                problem.logits,
                trial,
                "finite_difference",
                radius=radius,
            ),
            exact,
        )
        for radius in (1e-1, 1e-2)
    ]
    assert errors[1] < errors[0] / 50  # second order: a tenth of the radius, a hundredth


def test_rates_and_decays_for_each_parameter() -> None:
    problem = Problem("mlp")
    names = list(problem.params)
    lr = {n: 0.02 * (i + 1) for i, n in enumerate(names)}
    decay = {n: 1e-3 * i for i, n in enumerate(names)}
    logits = problem.logits.clone().requires_grad_()
    params = {n: p.detach().clone().requires_grad_() for n, p in problem.params.items()}
    grads = torch.autograd.grad(
        problem.loss(params, logits), list(params.values()), create_graph=True
    )
    moved = {
        n: p - lr[n] * (g + decay[n] * p) for (n, p), g in zip(params.items(), grads, strict=True)
    }
    (expected,) = torch.autograd.grad(problem.loss(moved, logits), logits)
    trial = TrialStep(lr, weight_decay=decay)
    assert (
        relative(hypergradient(problem.loss, problem.params, problem.logits, trial), expected)
        <= 1e-9
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_scale_changes_nothing(name: str) -> None:
    problem = Problem(name)
    trial = problem.trial(0.05, 0.9, 5e-4)
    for method in METHODS:
        plain, scaled = (
            hypergradient(
                problem.loss, problem.params, problem.logits, trial, method, loss_scale=scale
            )
            for scale in (1.0, 1024.0)
        )
        assert relative(scaled, plain) <= 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_nothing_else_changes(method: str) -> None:
    problem = Problem("resnet18")
    modules = (problem.network, problem.head)
    for p in problem.params.values():
        p.grad = torch.randn_like(p)
    trial = problem.trial(0.05, 0.9, 5e-4)
    assert trial.momentum_buffers is not None
    watched = [
        *problem.params.values(),
        *(p.grad for p in problem.params.values()),
        *(b for m in modules for b in m.buffers()),
        *trial.momentum_buffers.values(),
        problem.logits,
    ]
    before = [t.clone() for t in watched]
    noise = torch.get_rng_state()
    hypergradient(problem.loss, problem.params, problem.logits, trial, method)
    assert all(torch.equal(a, b) for a, b in zip(watched, before, strict=True))
    assert torch.equal(torch.get_rng_state(), noise)
    assert problem.logits.grad is None and not problem.logits.requires_grad


def test_dropout_sees_the_same_noise_in_every_pass() -> None:
    """Against a double backward whose two evaluations start from one random state."""
    problem = Problem("mlp")
    problem.network = nn.Sequential(
        nn.Linear(6, 12), nn.Tanh(), nn.Dropout(0.5), nn.Linear(12, 8)
    ).double()
    problem.collect()
    trial = problem.trial(0.1)
    state = torch.get_rng_state()
    plain = problem.loss

    def rewound(params: dict[str, Tensor], logits: Tensor) -> Tensor:
        torch.set_rng_state(state)
        return plain(params, logits)

    problem.loss = rewound  # type: ignore[method-assign]
    expected = by_double_backward(problem, trial)
    torch.set_rng_state(state)
    exact = hypergradient(plain, problem.params, problem.logits, trial)
    assert relative(exact, expected) <= 1e-9


def test_unreached_parameters_are_allowed() -> None:
    problem = Problem("mlp")
    trial = TrialStep(0.1, momentum=0.9, weight_decay=1e-2)
    more = {**problem.params, "unused": torch.ones(3, dtype=torch.float64, requires_grad=True)}
    for method in METHODS:
        got = hypergradient(problem.loss, more, problem.logits, trial, method)
        want = hypergradient(problem.loss, problem.params, problem.logits, trial, method)
        assert relative(got, want) <= 1e-12


def test_a_rate_of_zero_gives_the_plain_gradient() -> None:
    problem = Problem("mlp")
    a = problem.logits.detach().requires_grad_()
    (plain,) = torch.autograd.grad(problem.loss(problem.params, a), a)
    for method in METHODS:
        got = hypergradient(problem.loss, problem.params, problem.logits, TrialStep(0.0), method)
        assert relative(got, plain) <= 1e-12


def test_a_zero_direction_needs_no_difference() -> None:
    params, logits = {"w": torch.zeros(2)}, torch.ones(2)
    result = hypergradient(
        lambda p, a: (p["w"] * p["w"] * a).sum(),
        params,
        logits,
        TrialStep(1.0),
        "finite_difference",
    )
    assert torch.equal(result, torch.zeros(2))


W = {"w": torch.ones(2)}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(params={}), "empty"),
        (dict(params={"w": torch.ones(2, dtype=torch.int64)}), "floating"),
        (dict(logits=torch.ones(2, dtype=torch.int64)), "floating"),
        (dict(loss_fn=lambda p, a: p["w"] * a), "scalar"),
        (dict(method="second_order"), "allowed are exact"),
        (dict(trial=0.1), "trial=0.1: must be a TrialStep"),
        (dict(loss_fn=lambda p, a: (p["w"] * a, 1)), "is a tuple"),
        (dict(loss_fn=lambda p, a: 1.0), "is a float"),
        (dict(loss_fn=lambda p, a: None), "is a NoneType"),
        (dict(trial=TrialStep({"x": 0.1})), "lr has no entry"),
        (dict(trial=TrialStep(0.1, 0.9, 0.0, {"x": torch.ones(2)})), "belongs to no parameter"),
        (dict(trial=TrialStep(0.1, 0.9, 0.0, {"w": torch.ones(3)})), "shape"),
        (dict(radius=0.0), "radius=0"),
        (dict(loss_scale=0.0), "loss_scale=0"),
    ],
)
def test_bad_arguments(arguments: dict, words: str) -> None:
    good = dict(
        loss_fn=lambda p, a: (p["w"] * a).sum(),
        params=W,
        logits=torch.ones(2),
        trial=TrialStep(0.1),
    )
    with pytest.raises(ValueError, match=words):
        hypergradient(**{**good, **arguments})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(lr=-0.1), "lr=-0.1"),
        (dict(lr=float("nan")), "lr=nan"),
        (dict(lr=None), "lr=None: must be a number"),
        (dict(lr=0.1, momentum=-1), "momentum=-1"),
        (dict(lr=0.1, momentum={"w": -1}), "momentum=-1"),
        (dict(lr=0.1, weight_decay="1e-4"), "weight_decay='1e-4'"),
        (dict(lr=0.1, dampening=1.5), "at most 1"),
        (dict(lr=0.1, momentum_buffers=torch.ones(2)), "must map names"),
    ],
)
def test_a_bad_trial_step_is_refused_when_it_is_made(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrialStep(**arguments)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    lr=st.floats(0.0, 0.5),
    momentum=st.floats(0.0, 0.99),
    weight_decay=st.floats(0.0, 0.1),
)
def test_exact_on_random_quadratics(
    seed: int, lr: float, momentum: float, weight_decay: float
) -> None:
    """L = ½ wᵀ diag(a) w + bᵀ w has its hypergradient in closed form."""
    rng = torch.Generator().manual_seed(seed)
    w, b, a, buffer = torch.randn(4, 5, generator=rng, dtype=torch.float64)
    trial = TrialStep(lr, momentum, weight_decay, {"w": buffer})
    moved = w - lr * (a * w + b + weight_decay * w + momentum * buffer)
    expected = 0.5 * moved**2 - lr * w * (a * moved + b)
    got = hypergradient(
        lambda p, a: 0.5 * (a * p["w"] ** 2).sum() + (b * p["w"]).sum(), {"w": w}, a, trial
    )
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
