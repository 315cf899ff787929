r"""The hypergradient of the mask logits (MetaMask, section 4.2 and algorithm 1).

With :math:`L(\Theta, a)` the contrastive loss at network parameters :math:`\Theta` and mask logits
:math:`a`, the trial step is

.. math:: \Theta^+(a) = \Theta - \ell\,(\nabla_\Theta L(\Theta, a) + \lambda\Theta + \mu b)

(learning rate ℓ, weight decay λ, momentum μ with buffer b), and the mask descends
:math:`J(a) = L(\Theta^+(a), a)`. Its whole derivative, the path through the trial step included, is

.. math:: \nabla_a J = \partial_a L(\Theta^+, a)
          - \ell\,\partial_a \langle \nabla_\Theta L(\Theta, a), v\rangle,
          \qquad v = \nabla_\Theta L(\Theta^+, a) \text{ held constant.}

The second term mixes a derivative in a with one in Θ along v. ``exact`` takes it by forward-mode
differentiation, ``finite_difference`` by a central difference, ``first_order`` leaves it out.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from metamask_solo.method.forward_mode import Tape

METHODS = ("exact", "finite_difference", "first_order")

Params = dict[str, Tensor]
LossFunction = Callable[[Params, Tensor], Tensor]


@dataclass(frozen=True)
class TrialStep:
    """The virtual optimiser step Θ⁺ = Θ − lr · (∇L + weight_decay · Θ + momentum · buffer).

    Args:
        lr: learning rate, at least 0; one number, or one for each parameter name.
        momentum: factor of the momentum buffers, at least 0.
        weight_decay: at least 0; one number, or one for each parameter name.
        momentum_buffers: parameter name to buffer. A parameter without one has a zero buffer.
    """

    lr: float | Mapping[str, float]
    momentum: float = 0.0
    weight_decay: float | Mapping[str, float] = 0.0
    momentum_buffers: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class SplitLoss:
    """A loss whose logits act on features only: ``head(params, features(params), logits)``.

    Any callable of (params, logits) is a loss. One that says where the features end lets ``exact``
    send the network through plain forward mode, and the nested derivative through the head alone.

    Args:
        features: parameters to a tuple of feature tensors.
        head: (parameters, features, logits) to the scalar loss.
    """

    features: Callable[[Params], tuple[Tensor, ...]]
    head: Callable[[Params, tuple[Tensor, ...], Tensor], Tensor]

    def __call__(self, params: Params, logits: Tensor) -> Tensor:
        return self.head(params, self.features(params), logits)


def hypergradient(
    loss_fn: LossFunction,
    params: Mapping[str, Tensor],
    logits: Tensor,
    trial: TrialStep,
    method: str = "exact",
    *,
    radius: float = 1e-2,
    loss_scale: float = 1.0,
) -> Tensor:
    """Derivative of ``loss_fn(Θ⁺(logits), logits)`` in ``logits``.

    Nothing that is passed in changes: no parameter, no ``.grad`` field, no random state. A loss
    that draws random numbers (dropout) sees the same ones in each of its evaluations.

    Args:
        loss_fn: pure function of (params, logits) that returns a scalar; see :class:`SplitLoss`.
        params: parameter name to floating-point tensor; those that the loss does not reach are
            allowed.
        logits: the mask logits a, usually of shape (D,).
        trial: the trial step.
        method: ``exact``, ``finite_difference`` or ``first_order``.
        radius: for ``finite_difference``: the parameters move by this distance (in norm) to either
            side. Above 0.
        loss_scale: the loss is multiplied by this inside, and the result divided by it: keeps
            half-precision gradients above underflow. Above 0.

    Returns:
        A tensor of the shape and type of ``logits``.

    Raises:
        ValueError: params are empty or not floating-point, the loss is not a scalar, the momentum
            buffers do not fit the parameters, or an argument is out of range.
    """
    params = dict(params)
    _check(params, logits, trial, method, radius, loss_scale)
    loss_fn = _scaled(loss_fn, loss_scale)
    logits = logits.detach()
    tape = Tape() if method == "exact" and isinstance(loss_fn, SplitLoss) else None
    with _same_noise(logits.device) as replay:
        first = replay(loss_fn) if tape is None else _recorded(replay(loss_fn), tape)
        gradient, _ = _gradients(first, params, logits)
        moved = _moved(params, gradient, trial, loss_scale)
        del gradient  # the next pass is the one with the highest memory use
        if method == "first_order":
            return logits_gradient(replay(loss_fn), moved, logits) / loss_scale
        direction, direct = _gradients(replay(loss_fn), moved, logits)
        del moved
        direction, factor = _times_lr(direction, trial.lr)
        if factor == 0 or not direction:
            return direct / loss_scale
        if method == "exact":
            mixed = _mixed_exact(replay(loss_fn), params, logits, direction, tape)
        else:
            mixed = _mixed_difference(replay(loss_fn), params, logits, direction, radius)
    # the direction and the loss of the mixed term carry the scale, hence its square
    return direct / loss_scale - mixed * (factor / loss_scale**2)


def logits_gradient(loss_fn: LossFunction, params: Mapping[str, Tensor], logits: Tensor) -> Tensor:
    """Partial derivative of ``loss_fn(params, logits)`` in ``logits``, the parameters fixed."""
    leaf = logits.detach().requires_grad_()
    with torch.enable_grad():
        loss = _scalar(loss_fn({name: p.detach() for name, p in params.items()}, leaf))
        (gradient,) = torch.autograd.grad(loss, leaf, allow_unused=True)
    return torch.zeros_like(logits) if gradient is None else gradient


def _check(
    params: Params, logits: Tensor, trial: TrialStep, method: str, radius: float, loss_scale: float
) -> None:
    if method not in METHODS:
        raise ValueError(f"method={method!r}: allowed are {', '.join(METHODS)}")
    if not params:
        raise ValueError("params is empty: the trial step needs at least one parameter")
    for name, tensor in {**params, "logits": logits}.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}: must be floating-point")
    for name, buffer in (trial.momentum_buffers or {}).items():
        if name not in params:
            raise ValueError(f"momentum buffer {name!r} belongs to no parameter")
        if buffer.shape != params[name].shape:
            raise ValueError(
                f"momentum buffer {name!r} has shape {tuple(buffer.shape)}, "
                f"its parameter {tuple(params[name].shape)}"
            )
    for field in ("lr", "weight_decay", "momentum"):
        value = getattr(trial, field)
        if isinstance(value, Mapping) and (missing := params.keys() - value.keys()):
            raise ValueError(f"{field} has no entry for parameter {min(missing)!r}")
        for number in value.values() if isinstance(value, Mapping) else [value]:
            if not (math.isfinite(number) and number >= 0):
                raise ValueError(f"{field}={number}: must be finite and at least 0")
    if not (math.isfinite(radius) and radius > 0):
        raise ValueError(f"radius={radius}: must be finite and above 0")
    if not (math.isfinite(loss_scale) and loss_scale > 0):
        raise ValueError(f"loss_scale={loss_scale}: must be finite and above 0")


def _scalar(loss: Tensor) -> Tensor:
    if loss.dim() != 0:
        raise ValueError(f"loss_fn returned shape {tuple(loss.shape)}: must be a scalar")
    return loss


def _scaled(loss_fn: LossFunction, scale: float) -> LossFunction:
    if scale == 1.0:
        return loss_fn
    if isinstance(loss_fn, SplitLoss):
        head = loss_fn.head
        return SplitLoss(loss_fn.features, lambda p, f, a: head(p, f, a) * scale)
    return lambda p, a: loss_fn(p, a) * scale


@contextmanager
def _same_noise(
    device: torch.device,
) -> Iterator[Callable[[LossFunction], LossFunction]]:
    """Gives a wrapper that starts each evaluation of a loss from one random state.

    The random state from before the block is restored after it.
    """
    cuda = [device] if device.type == "cuda" else []
    cpu_state = torch.get_rng_state()
    cuda_states = [torch.cuda.get_rng_state(d) for d in cuda]

    def rewind() -> None:
        torch.set_rng_state(cpu_state)
        for d, state in zip(cuda, cuda_states, strict=True):
            torch.cuda.set_rng_state(state, d)

    def replay(loss_fn: LossFunction) -> LossFunction:
        if isinstance(loss_fn, SplitLoss):
            features = loss_fn.features

            def rewound(params: Params) -> tuple[Tensor, ...]:
                rewind()
                return features(params)

            return SplitLoss(rewound, loss_fn.head)

        def evaluate(params: Params, logits: Tensor) -> Tensor:
            rewind()
            return loss_fn(params, logits)

        return evaluate

    try:
        yield replay
    finally:
        rewind()


def _gradients(loss_fn: LossFunction, params: Params, logits: Tensor) -> tuple[Params, Tensor]:
    """Gradients in the parameters that the loss reaches, and in the logits."""
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    leaf = logits.detach().requires_grad_()
    with torch.enable_grad():
        loss = _scalar(loss_fn(leaves, leaf))
        *gradients, direct = torch.autograd.grad(loss, [*leaves.values(), leaf], allow_unused=True)
    reached = {n: g for n, g in zip(leaves, gradients, strict=True) if g is not None}
    return reached, torch.zeros_like(logits) if direct is None else direct


def _each(value: float | Mapping[str, float], names: list[str]) -> list[float]:
    return [value[n] for n in names] if isinstance(value, Mapping) else [value] * len(names)


@torch.no_grad()
def _moved(params: Params, gradient: Params, trial: TrialStep, loss_scale: float) -> Params:
    """The parameters after the trial step, Θ⁺."""
    names = list(params)
    lr = dict(zip(names, _each(trial.lr, names), strict=True))
    decay = _each(trial.weight_decay, names)
    moved = [p * (1.0 - lr[n] * d) for (n, p), d in zip(params.items(), decay, strict=True)]
    result = dict(zip(names, moved, strict=True))
    for name, g in gradient.items():
        result[name].add_(g, alpha=-lr[name] / loss_scale)
    if trial.momentum:
        for name, buffer in (trial.momentum_buffers or {}).items():
            result[name].add_(buffer.to(result[name]), alpha=-lr[name] * trial.momentum)
    return result


@torch.no_grad()
def _times_lr(direction: Params, lr: float | Mapping[str, float]) -> tuple[Params, float]:
    """Writes lr ⊙ direction as a number times a direction; no copy where lr is one number."""
    if not isinstance(lr, Mapping):
        return direction, float(lr)
    largest = max((lr[name] for name in direction), default=0.0)
    if largest == 0:
        return direction, 0.0
    return {name: v * (lr[name] / largest) for name, v in direction.items()}, largest


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(
        torch.stack(
            [
                torch.linalg.vector_norm(
                    t, dtype=torch.float32 if t.dtype in (torch.float16, torch.bfloat16) else None
                )
                for t in tensors
            ]
        )
    )


def _mixed_difference(
    loss_fn: LossFunction, params: Params, logits: Tensor, direction: Params, radius: float
) -> Tensor:
    """∂_a ⟨∇_Θ L(Θ, a), direction⟩ as a central difference of ∂_a L (the official way)."""
    norm = float(_norm(list(direction.values())))
    if norm == 0 or not math.isfinite(norm):
        return logits * norm  # zero, or the NaN that the caller has to see
    step = radius / norm
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            near = {
                n: p + (sign * step) * direction[n] if n in direction else p
                for n, p in params.items()
            }
        sides.append(logits_gradient(loss_fn, near, logits))
        del near
    return (sides[0] - sides[1]) / (2 * step)


def _recorded(loss: LossFunction, tape: Tape) -> SplitLoss:
    """The same loss, with what its features cost kept on the tape."""
    assert isinstance(loss, SplitLoss)
    features, head = loss.features, loss.head

    def recorded(params: Params) -> tuple[Tensor, ...]:
        with tape.record():
            return features(params)

    return SplitLoss(recorded, head)


def _mixed_exact(
    loss_fn: LossFunction, params: Params, logits: Tensor, direction: Params, tape: Tape | None
) -> Tensor:
    """∂_a ⟨∇_Θ L(Θ, a), direction⟩ as a derivative of ∂_a L along the direction."""
    fixed = {name: p.detach() for name, p in params.items()}
    along = {name: fixed[name] for name in direction}
    # fused attention has no forward-mode formula in PyTorch
    with sdpa_kernel(SDPBackend.MATH):
        if isinstance(loss_fn, SplitLoss):
            assert tape is not None
            return _mixed_split(loss_fn, fixed, along, logits, direction, tape)

        def gradient(moving: Params) -> Tensor:
            return torch.func.grad(lambda a: _scalar(loss_fn({**fixed, **moving}, a)))(logits)

        return torch.func.jvp(gradient, (along,), (direction,))[1]


def _mixed_split(
    loss: SplitLoss,
    fixed: Params,
    along: Params,
    logits: Tensor,
    direction: Params,
    tape: Tape,
) -> Tensor:
    """The exact mixed term, with the network in plain forward mode and no graph of it."""
    with torch.no_grad(), forward_ad.dual_level(), tape.replay():
        dual = {name: forward_ad.make_dual(p, direction[name]) for name, p in along.items()}
        pairs = [forward_ad.unpack_dual(f) for f in loss.features({**fixed, **dual})]
        features = tuple(pair.primal for pair in pairs)
        tangents = tuple(
            torch.zeros_like(pair.primal) if pair.tangent is None else pair.tangent
            for pair in pairs
        )

    def gradient(moving: Params, features: tuple[Tensor, ...]) -> Tensor:
        head = loss.head
        return torch.func.grad(lambda a: _scalar(head({**fixed, **moving}, features, a)))(logits)

    return torch.func.jvp(gradient, (along, features), (direction, tangents))[1]
