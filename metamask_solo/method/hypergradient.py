r"""The hypergradient of the mask logits (MetaMask, section 4.2 and algorithm 1).

With :math:`L(\Theta, a)` the contrastive loss at network parameters :math:`\Theta` and mask logits
:math:`a`, the trial step is

.. math:: \Theta^+(a) = \Theta - \ell\,(\nabla_\Theta L(\Theta, a) + \lambda\Theta + \mu b)

(learning rate ℓ, weight decay λ, momentum μ with buffer b), and the mask descends
:math:`J(a) = L(\Theta^+(a), a)`. Its whole derivative, the path through the trial step included, is

.. math:: \nabla_a J = \partial_a L(\Theta^+, a)
          - \ell\,\partial_a \langle \nabla_\Theta L(\Theta, a), v\rangle,
          \qquad v = \nabla_\Theta L(\Theta^+, a) \text{ held constant.}

The second term mixes a derivative in a with one in Θ along v. ``exact`` takes it as the tangent of
a gradient: Θ are dual numbers with tangents v, only a has a graph, and the graph begins at the
mask. ``double_backward`` differentiates the gradient's own graph, ``finite_difference`` takes a
central difference, ``first_order`` leaves the term out.
"""

import itertools
import math
import numbers
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any, TypeVar, cast, get_args

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from metamask_solo.errors import UserError
from metamask_solo.method.forward_mode import Tape, is_gap, what_failed
from metamask_solo.method.names import Method
from metamask_solo.method.repetition import NoiseLayout, Repetition

METHODS: tuple[Method, ...] = get_args(Method)
OUTSIDE = (
    "the loss computes with {}, which no trial step moves: call the modules, and take parameters "
    "from them, inside the loss"
)

Params = dict[str, Tensor]
# one tensor, or several by name: the loss gets what it was called with
Logits = TypeVar("Logits", bound=Tensor | Mapping[str, Tensor])
LossFunction = Callable[[Params, Any], Tensor]
_Loss = Callable[[Params, Params], Tensor]


@dataclass(frozen=True)
class _Problem:
    """What all ways have in common; losses are scaled, and functions of what moves only."""

    inner: _Loss
    outer: _Loss
    params: Params
    masks: Params
    given: Params
    trial: "TrialStep"
    scale: float


@dataclass(frozen=True)
class TrialStep:
    """The virtual optimiser step, which is that of ``torch.optim.SGD``.

    Θ⁺ = Θ − lr · b⁺ with b⁺ = momentum · b + (1 − dampening) · g and g = ∇L + weight_decay · Θ; a
    parameter without a buffer b takes its first step, b⁺ = g. With ``nesterov``,
    Θ⁺ = Θ − lr · (g + momentum · b⁺).

    Each is one number for all parameters, or one for each parameter name.

    Args:
        lr: learning rate, at least 0.
        momentum: at least 0.
        weight_decay: at least 0.
        momentum_buffers: parameter name to buffer; one that is missing or None does not exist yet.
        nesterov: whether the step looks ahead.
        dampening: within 0 and 1.

    Raises:
        UserError: a value is no number, or out of range.

    Example:
        >>> TrialStep(0.1, momentum=0.9, weight_decay={"weight": 1e-4, "bias": 0.0}).lr
        0.1
    """

    lr: float | Mapping[str, float]
    momentum: float | Mapping[str, float] = 0.0
    weight_decay: float | Mapping[str, float] = 0.0
    momentum_buffers: Mapping[str, Tensor | None] | None = None
    nesterov: bool | Mapping[str, bool] = False
    dampening: float | Mapping[str, float] = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            given = getattr(self, field.name)
            if field.name == "momentum_buffers":
                if not (given is None or isinstance(given, Mapping)):
                    raise UserError(f"momentum_buffers={given!r}: must map names to tensors")
                continue
            for value in given.values() if isinstance(given, Mapping) else [given]:
                if not isinstance(value, numbers.Real):
                    raise UserError(f"{field.name}={value!r}: must be a number")
                if not (math.isfinite(value) and float(value) >= 0):
                    raise UserError(f"{field.name}={value}: must be finite and at least 0")
                if field.name == "dampening" and float(value) > 1:
                    raise UserError(f"dampening={value}: must be at most 1")

    def of(self, name: str) -> tuple[float, float, float]:
        """What multiplies −∇L, −Θ and −b in the step of a parameter."""
        lr, momentum, decay, nesterov, dampening = (
            float(value[name] if isinstance(value, Mapping) else value)
            for value in (
                self.lr,
                self.momentum,
                self.weight_decay,
                self.nesterov,
                self.dampening,
            )
        )
        if momentum == 0:
            return lr, lr * decay, 0.0
        has_buffer = (self.momentum_buffers or {}).get(name) is not None
        new, old = (1 - dampening, momentum) if has_buffer else (1.0, 0.0)
        if nesterov:
            new, old = 1 + momentum * new, momentum * old
        return lr * new, lr * new * decay, lr * old


def hypergradient(
    loss_fn: LossFunction,
    params: Mapping[str, Tensor],
    logits: Logits,
    trial: TrialStep,
    method: Method = "exact",
    *,
    outer_loss_fn: LossFunction | None = None,
    radius: float = 1e-2,
    loss_scale: float = 1.0,
    check: bool = True,
) -> Logits:
    """Derivative of ``outer_loss_fn(Θ⁺(logits), logits)`` in ``logits``.

    :func:`metamask_solo.mask_hypergradient` is the same for modules. Nothing that is passed in
    changes: no parameter, no ``.grad`` field, no buffer, no random state. Every evaluation sees the
    same random numbers of torch, numpy and ``random``, and the same buffers of the modules that it
    calls. Where ``torch.no_grad`` or ``detach`` holds something constant, it is constant here too.

    Not known here are random generators of your own, and state that is kept outside of modules: a
    loss that gives another value when it is evaluated again is refused (see ``check``).

    Args:
        loss_fn: function of (params, logits) that returns a scalar tensor: the loss of the trial
            step. It must compute with the tensors that it is given, not with a module's own.
        params: parameter name to floating-point tensor. Those that do not require grad stay where
            they are (unless none does and they are plain tensors), one tensor under several names
            takes one step, and those that the loss does not reach are allowed.
        logits: the mask logits a, usually of shape (D,); or several by name.
        trial: the trial step.
        method: ``exact``; ``double_backward``: the same, with about 1.3 times the time and 1.6
            times the memory, for what PyTorch has no forward mode of; ``finite_difference``;
            ``first_order``.
        outer_loss_fn: the loss after the trial step, such as that of another batch; None: the same.
        radius: for ``finite_difference``: the parameters move by this distance (in norm) to either
            side. Above 0.
        loss_scale: the losses are multiplied by this inside, and the result divided by it: keeps
            half-precision gradients above underflow. Above 0.
        check: whether to evaluate ``loss_fn`` once more, to see that it is a function of its
            arguments. ``exact`` always sees it, for free.

    Returns:
        A tensor of the shape and type of ``logits``, or one for each name.

    Raises:
        UserError: an argument is wrong, a loss is no scalar or no function of its arguments, or
            this way cannot differentiate it; the message says which one can.

    Example:
        >>> w, a = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 1.0])
        >>> hypergradient(lambda p, a: (a * p["w"] ** 2).sum(), {"w": w}, a, TrialStep(0.1))
        tensor([0.6300, 1.2800])
    """
    masks: Params = dict(logits) if isinstance(logits, Mapping) else {"logits": logits}
    _check(params, masks, trial, method, radius, loss_scale)
    fixed, moving, names = _moving(params, trial)
    masks = {name: a.detach() for name, a in masks.items()}

    def scaled(loss: LossFunction) -> _Loss:
        def evaluate(own: Params, a: Params) -> Tensor:
            again.rewind()
            every = {**fixed, **{name: own[first] for name, first in names.items()}}
            value = loss(every, a if isinstance(logits, Mapping) else a["logits"])
            return _scalar(value) * loss_scale

        return evaluate

    inner = scaled(loss_fn)
    outer = inner if outer_loss_fn is None else scaled(outer_loss_fn)
    given = {name: params[name] for name in moving if params[name].requires_grad}
    problem = _Problem(inner, outer, moving, masks, given, trial, loss_scale)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        Repetition([*params.values(), *masks.values()]) as again,
    ):
        if not any(trial.of(name)[0] for name in moving):
            result = _all_reached(_partial(outer, moving, masks))
        elif method == "double_backward":
            result = _double_backward(problem)
        else:
            result = _by_passes(problem, method, radius, check, again)
    result = {name: g / loss_scale for name, g in result.items()}
    return cast(Logits, result if isinstance(logits, Mapping) else result["logits"])


def logits_gradient(loss_fn: LossFunction, params: Mapping[str, Tensor], logits: Logits) -> Logits:
    """Partial derivative of ``loss_fn(params, logits)`` in ``logits``, the parameters fixed."""
    return hypergradient(loss_fn, params, logits, TrialStep(0.0))


def _check(
    params: Mapping[str, Tensor],
    masks: Params,
    trial: TrialStep,
    method: str,
    radius: float,
    loss_scale: float,
) -> None:
    if method not in METHODS:
        raise UserError(f"method={method!r}: allowed are {', '.join(METHODS)}")
    if not isinstance(trial, TrialStep):
        raise UserError(f"trial={trial!r}: must be a TrialStep, such as TrialStep(lr=0.1)")
    for kind, tensors in (("params", params), ("logits", masks)):
        if not tensors:
            raise UserError(f"{kind} is empty: the hypergradient needs at least one tensor")
        for name, tensor in tensors.items():
            if not (isinstance(tensor, Tensor) and tensor.is_floating_point()):
                found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise UserError(f"{kind}: {name!r} is {found}; must be a floating-point tensor")
            if tensor.layout != torch.strided and (kind == "logits" or tensor.requires_grad):
                raise UserError(f"{kind}: {name!r} is sparse; must be dense, or not require grad")
    for name, buffer in (trial.momentum_buffers or {}).items():
        if name not in params:
            raise UserError(f"momentum_buffers: {name!r} belongs to no parameter")
        if buffer is not None and buffer.shape != params[name].shape:
            raise UserError(
                f"momentum_buffers: {name!r} has shape {tuple(buffer.shape)}, "
                f"its parameter {tuple(params[name].shape)}"
            )
    for argument, number in (("radius", radius), ("loss_scale", loss_scale)):
        if not (math.isfinite(number) and number > 0):
            raise UserError(f"{argument}={number}: must be finite and above 0")


def _moving(
    params: Mapping[str, Tensor], trial: TrialStep
) -> tuple[Params, Params, dict[str, str]]:
    """The parameters that stay; those that move, each once; name to the name that moves it."""
    some = any(p.requires_grad for p in params.values())
    fixed: Params = {}
    moving: Params = {}
    names: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, p in params.items():
        if not p.requires_grad and (some or isinstance(p, nn.Parameter)):
            fixed[name] = p.detach()
            continue
        for field in fields(trial):
            value = getattr(trial, field.name)
            needed = isinstance(value, Mapping) and field.name != "momentum_buffers"
            if needed and name not in value:
                raise UserError(f"{field.name} has no entry for parameter {name!r}")
        dense = p.numel() and p.layout == torch.strided
        same: Any = (p.device, p.data_ptr(), p.shape, p.stride()) if dense else name
        names[name] = first.setdefault(same, name)
        moving.setdefault(names[name], p.detach())
        if trial.of(name) != trial.of(names[name]):
            raise UserError(
                f"params: {names[name]!r} and {name!r} are one tensor, but not in the trial step"
            )
    _refuse_overlaps(moving)
    if not moving:
        raise UserError("params: none requires grad, so the trial step moves nothing")
    return fixed, moving, names


def _refuse_overlaps(moving: Params) -> None:
    """Refuses parameters that are other views of one memory; the same view is one parameter."""
    spans = []
    for name, p in moving.items():
        extent = 1 + sum((size - 1) * s for size, s in zip(p.shape, p.stride(), strict=True))
        if p.numel() == extent and p.data_ptr():
            start = p.data_ptr()
            spans.append((str(p.device), start, start + extent * p.element_size(), name))
    spans.sort()
    for (device, _, end, one), (other_device, start, _, two) in itertools.pairwise(spans):
        if device == other_device and start < end:
            raise UserError(f"params: {one!r} and {two!r} share memory, but in different shapes")


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor):
        raise UserError(f"the loss is a {type(loss).__name__}: must be a scalar tensor")
    if loss.dim() != 0:
        raise UserError(f"the loss has shape {tuple(loss.shape)}: must be a scalar tensor")
    if loss.is_complex():
        raise UserError(f"the loss is {loss.dtype}: must be a real number")
    return loss


def _check_same(value: Tensor, again: Tensor, problem: _Problem, tape: Tape | None = None) -> None:
    """Refuses a loss whose second evaluation differs by more than rounding can explain."""
    kind = value.device.type
    types = {value.dtype, *(p.dtype for p in problem.params.values())}
    if torch.is_autocast_enabled(kind):
        types.add(torch.get_autocast_dtype(kind))
    first, second = float(value) / problem.scale, float(again) / problem.scale
    relative = 4 * max(torch.finfo(t).eps for t in types) ** 0.5
    allowed = relative * max(abs(first), 1e-2)
    if tape is not None and any(float(d) > relative for d in tape.differences):
        raise UserError(
            "the loss gives a layer other inputs when it is evaluated again: noise from a "
            "generator of its own, state outside of modules, or dropout inside a fused kernel"
        )
    if abs(first - second) > allowed:  # false for NaN, which the caller has to see
        raise UserError(
            f"the loss is {first:.6g}, and {second:.6g} when it is evaluated again: noise from a "
            "generator of its own, state outside of modules, or dropout inside a fused kernel"
        )


def _leaves(tensors: Params) -> Params:
    return {name: t.detach().requires_grad_() for name, t in tensors.items()}


def _derivatives(
    value: Tensor, leaves: Params, create_graph: bool = False
) -> dict[str, Tensor | None]:
    if not value.requires_grad:
        return dict.fromkeys(leaves)
    found = torch.autograd.grad(
        value, list(leaves.values()), allow_unused=True, create_graph=create_graph
    )
    return dict(zip(leaves, found, strict=True))


def _reached(gradient: dict[str, Tensor | None]) -> Params:
    reached = {name: g for name, g in gradient.items() if g is not None}
    if not reached:
        raise UserError(
            "the loss reaches none of the parameters: it must compute with those that it is given"
        )
    return reached


def _all_reached(partial: dict[str, Tensor | None]) -> Params:
    for name, g in partial.items():
        if g is None:
            of = "" if name == "logits" else f" of {name!r}"
            raise UserError(f"the loss does not depend on the logits{of}")
    return cast(Params, partial)


def _or_zeros(partial: Mapping[str, Tensor | None], masks: Params) -> Params:
    return {n: torch.zeros_like(masks[n]) if g is None else g for n, g in partial.items()}


def _gradients(
    loss: _Loss, own: Params, leaves: Params, given: Params, create_graph: bool = False
) -> tuple[Tensor, Params, dict[str, Tensor | None]]:
    """The loss, its gradients in the parameters that it reaches, and those in the logits."""
    value = loss(own, leaves)
    others = {f"logits {n}": a for n, a in leaves.items()} | _by_given_name(given)
    try:
        found = _derivatives(value, {**own, **others}, create_graph)
    except RuntimeError as error:
        if "second time" in str(error):
            raise UserError(OUTSIDE.format("what is computed outside of it")) from error
        raise
    reached = _reached({name: found[name] for name in own})
    _check_given(found, given)
    return value.detach(), reached, {name: found[f"logits {name}"] for name in leaves}


def _by_given_name(given: Params) -> Params:
    return {f"given {name}": p for name, p in given.items()}


def _check_given(found: Mapping[str, Tensor | None], given: Params) -> None:
    """Refuses a loss that reaches parameters past those that it is given."""
    for name in given:
        if found[f"given {name}"] is not None:
            raise UserError(OUTSIDE.format(f"the parameter {name!r} that was there before"))


def _evaluate(loss: _Loss, params: Params, leaves: Params) -> Tensor:
    """The loss, its graph beginning at ``leaves`` if the loss does not need a longer one."""
    try:
        return loss(params, leaves)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # it may differentiate on its own, or hang a hook on what has a gradient
        with torch.enable_grad():
            return loss(_leaves(params), leaves)


def _partial(loss: _Loss, params: Params, masks: Params) -> dict[str, Tensor | None]:
    """The gradient in the logits alone, the parameters fixed."""
    leaves = _leaves(masks)
    return _derivatives(_evaluate(loss, params, leaves), leaves)


def _check_hooks(problem: _Problem, gradient: Params) -> None:
    """Refuses hooks that change a parameter's gradient on its way to the optimiser."""
    for name, p in problem.given.items():
        for hook in list((p._backward_hooks or {}).values()) if name in gradient else []:
            plain = gradient[name].detach() / problem.scale
            seen = plain.clone()
            changed = hook(seen)
            if not torch.equal(seen if changed is None else changed, plain):
                raise UserError(
                    f"params: a hook on {name!r} changes its gradient, which the trial step does "
                    "not know: remove it for the hypergradient"
                )


def _double_backward(problem: _Problem) -> Params:
    """The definition: the loss after the trial step, differentiated through the trial step."""
    own, leaves = _leaves(problem.params), _leaves(problem.masks)
    with sdpa_kernel(SDPBackend.MATH):
        try:
            _, gradient, partial = _gradients(
                problem.inner, own, leaves, problem.given, create_graph=True
            )
            _all_reached(partial)
            _check_hooks(problem, gradient)
            _check_differentiable_twice(gradient)
            moved = _moved(own, gradient, problem.trial, problem.scale)
            value = problem.outer(moved, leaves)
            found = _derivatives(value, {**leaves, **_by_given_name(problem.given)})
            partial = {name: found[name] for name in leaves}
            _check_given(found, problem.given)
        except RuntimeError as error:
            raise _refusal("double_backward", error, "'finite_difference'") from error
    return _or_zeros(partial, problem.masks)


def _check_differentiable_twice(gradient: Params) -> None:
    """Finds functions marked once_differentiable, which a graph may pass by without an error."""
    nodes: list[Any] = [g.grad_fn for g in gradient.values()]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
            if node.name() == "torch::autograd::Error":
                raise RuntimeError("an autograd.Function is marked once_differentiable")


def _refusal(method: str, error: Exception, instead: str) -> Exception:
    if isinstance(error, UserError | torch.OutOfMemoryError):
        return error
    return UserError(f"method={method!r}: {what_failed(error)}; use method={instead}")


def _by_passes(
    problem: _Problem, method: str, radius: float, check: bool, again: Repetition
) -> Params:
    """The gradient at Θ, the gradient at Θ⁺, and the mixed term, one pass after the other."""
    inner, outer, params, masks = problem.inner, problem.outer, problem.params, problem.masks
    tape, layout, exact = Tape(), NoiseLayout(), method == "exact"
    with tape.record() if exact else nullcontext():
        value, gradient, partial = _gradients(inner, _leaves(params), _leaves(masks), problem.given)
    _all_reached(partial)
    _check_hooks(problem, gradient)
    noisy = exact and again.noise_was_drawn()
    if check and not exact:
        with torch.no_grad():
            _check_same(value, _evaluate(inner, params, masks), problem)
    with torch.no_grad():
        moved = _moved(params, gradient, problem.trial, problem.scale)
    del gradient, partial  # the next pass is the one with the highest memory use
    if method == "first_order":
        return _or_zeros(_partial(outer, moved, masks), masks)
    if noisy and outer is not inner:
        with layout:
            inner(_leaves(params), masks)
    with layout if noisy and outer is inner else nullcontext():
        _, direction, direct = _gradients(outer, _leaves(moved), _leaves(masks), problem.given)
    del moved
    direction, rate = _times_rate(direction, {n: problem.trial.of(n)[0] for n in direction})
    if exact:
        with layout if noisy else nullcontext():
            value_again, mixed = _mixed_exact(problem, direction, tape)
        _check_same(value, value_again, problem, tape)
    else:
        mixed = _mixed_difference(problem, direction, radius)
    # the direction and the loss of the mixed term both carry the scale; the caller divides by one
    return {
        name: g - mixed[name] * (rate / problem.scale)
        for name, g in _or_zeros(direct, masks).items()
    }


def _moved(params: Params, gradient: Params, trial: TrialStep, scale: float) -> Params:
    """The parameters after the trial step, Θ⁺; those without a gradient stay, as in torch."""
    moved = dict(params)
    for name, g in gradient.items():
        rate, decay, momentum = trial.of(name)
        moved[name] = (params[name] * (1.0 - decay)).add_(g, alpha=-rate / scale)
        if momentum:
            buffer = cast(Mapping[str, Tensor], trial.momentum_buffers)[name]
            moved[name].add_(buffer.to(moved[name]), alpha=-momentum)
    return moved


@torch.no_grad()
def _times_rate(direction: Params, rates: dict[str, float]) -> tuple[Params, float]:
    """Writes rate ⊙ direction as a direction times a number; no copy where all rates are one."""
    largest = max(rates.values())
    return {
        name: v if rates[name] == largest else v * (rates[name] / largest)
        for name, v in direction.items()
        if rates[name]
    }, largest


def _mixed_exact(problem: _Problem, direction: Params, tape: Tape) -> tuple[Tensor, Params]:
    """The loss, and ∂_a ⟨∇_Θ L(Θ, a), direction⟩ as the derivative of ∂_a L along the direction."""

    def differentiate(tape: Tape) -> tuple[Tensor, Params]:
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            dual = {
                name: forward_ad.make_dual(p, direction[name]) if name in direction else p
                for name, p in problem.params.items()
            }
            leaves = _leaves(problem.masks)
            with tape.replay():
                value = problem.inner(dual, leaves)
            partial = _all_reached(_derivatives(value, leaves))
            tangents = {name: forward_ad.unpack_dual(g).tangent for name, g in partial.items()}
            return forward_ad.unpack_dual(value).primal.detach(), _or_zeros(tangents, problem.masks)

    try:
        try:
            return differentiate(tape)
        except NotImplementedError as error:
            if not is_gap(error):
                raise
            # recurrent networks have slower kernels that have a forward mode
            with (
                torch.backends.mkldnn.flags(enabled=False),
                torch.backends.cudnn.flags(enabled=False),
            ):
                return differentiate(Tape())
    except RuntimeError as error:  # NotImplementedError is one
        raise _refusal("exact", error, "'double_backward' or 'finite_difference'") from error


def _mixed_difference(problem: _Problem, direction: Params, radius: float) -> Params:
    """∂_a ⟨∇_Θ L(Θ, a), direction⟩ as a central difference of ∂_a L (the official way)."""
    norm = float(_norm(list(direction.values()))) if direction else 0.0
    if norm == 0 or not math.isfinite(norm):
        return {n: a * norm for n, a in problem.masks.items()}  # zero, or the NaN to be seen
    step = radius / norm
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            near = {
                n: p + (sign * step) * direction[n] if n in direction else p
                for n, p in problem.params.items()
            }
        sides.append(_all_reached(_partial(problem.inner, near, problem.masks)))
        del near
    return {n: (side - sides[1][n]) / (2 * step) for n, side in sides[0].items()}


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
