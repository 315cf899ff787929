"""Four ways to the derivative of a loss after a trial step (see hypergradient.py)."""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from metamask_solo.errors import UserError
from metamask_solo.method.forward_mode import Tape, is_gap, what_failed
from metamask_solo.method.repetition import NoiseLayout, Repetition
from metamask_solo.method.trial import TrialStep

OUTSIDE = (
    "the loss computes with {}, which no trial step moves: call the modules, and take parameters "
    "from them, inside the loss"
)

Params = dict[str, Tensor]
Loss = Callable[[Params, Params], Tensor]


@dataclass(frozen=True)
class Problem:
    """What all ways have in common; losses are scaled, and functions of what moves only."""

    inner: Loss
    outer: Loss
    params: Params
    masks: Params
    given: Params
    trial: TrialStep
    scale: float


def _check_same(value: Tensor, again: Tensor, problem: Problem, tape: Tape | None = None) -> None:
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


def _check_again(value: Tensor, problem: Problem) -> None:
    """Refuses a loss that is another one when it is evaluated once more, at the same arguments."""
    with torch.no_grad():
        _check_same(value, _evaluate(problem.inner, problem.params, problem.masks), problem)


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


def all_reached(partial: dict[str, Tensor | None]) -> Params:
    """The partial derivative, of a loss that depends on all logits."""
    for name, g in partial.items():
        if g is None:
            of = "" if name == "logits" else f" of {name!r}"
            raise UserError(f"the loss does not depend on the logits{of}")
    return cast(Params, partial)


def _or_zeros(partial: Mapping[str, Tensor | None], masks: Params) -> Params:
    return {n: torch.zeros_like(masks[n]) if g is None else g for n, g in partial.items()}


def _gradients(
    loss: Loss, own: Params, leaves: Params, given: Params, create_graph: bool = False
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


def _evaluate(loss: Loss, params: Params, leaves: Params) -> Tensor:
    """The loss, its graph beginning at ``leaves`` if the loss does not need a longer one."""
    try:
        return loss(params, leaves)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # it may differentiate on its own, or hang a hook on what has a gradient
        with torch.enable_grad():
            return loss(_leaves(params), leaves)


def logits_partial(loss: Loss, params: Params, masks: Params) -> dict[str, Tensor | None]:
    """The gradient in the logits alone, the parameters fixed."""
    leaves = _leaves(masks)
    return _derivatives(_evaluate(loss, params, leaves), leaves)


def _check_hooks(problem: Problem, gradient: Params) -> None:
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


def double_backward(problem: Problem, check: bool) -> Params:
    """The definition: the loss after the trial step, differentiated through the trial step."""
    own, leaves = _leaves(problem.params), _leaves(problem.masks)
    with sdpa_kernel(SDPBackend.MATH):
        try:
            loss, gradient, partial = _gradients(
                problem.inner, own, leaves, problem.given, create_graph=True
            )
            all_reached(partial)
            if check:
                _check_again(loss, problem)
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


def by_passes(
    problem: Problem, method: str, radius: float, check: bool, again: Repetition
) -> Params:
    """The gradient at Θ, the gradient at Θ⁺, and the mixed term, one pass after the other."""
    inner, outer, params, masks = problem.inner, problem.outer, problem.params, problem.masks
    tape, layout, exact = Tape(), NoiseLayout(), method == "exact"
    with tape.record() if exact else nullcontext():
        value, gradient, partial = _gradients(inner, _leaves(params), _leaves(masks), problem.given)
    all_reached(partial)
    _check_hooks(problem, gradient)
    noisy = exact and again.noise_was_drawn()
    if check:
        _check_again(value, problem)
    with torch.no_grad():
        moved = _moved(params, gradient, problem.trial, problem.scale)
    del gradient, partial  # the next pass is the one with the highest memory use
    if method == "first_order":
        return _or_zeros(logits_partial(outer, moved, masks), masks)
    if noisy and outer is not inner:
        with layout:
            inner(_leaves(params), masks)
    with layout if noisy and outer is inner else nullcontext():
        _, direction, direct = _gradients(outer, _leaves(moved), _leaves(masks), problem.given)
    del moved
    direction, rate = _times_rate(direction, {n: problem.trial.of(n)[0] for n in direction})
    if exact and problem.scale != 1.0:
        direction, rate = _of_norm_one(direction, rate)
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


@torch.no_grad()
def _of_norm_one(direction: Params, rate: float) -> tuple[Params, float]:
    """The same product, with a direction of a norm near 1 (by a power of two, which is exact).

    A scaled direction times a scaled loss would leave the range of half precision.
    """
    norm = _norm(direction)
    if norm == 0 or not math.isfinite(norm):
        return direction, rate
    factor = 2.0 ** -math.frexp(norm)[1]
    return {name: v * factor for name, v in direction.items()}, rate / factor


def _mixed_exact(problem: Problem, direction: Params, tape: Tape) -> tuple[Tensor, Params]:
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
            partial = all_reached(_derivatives(value, leaves))
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


def _mixed_difference(problem: Problem, direction: Params, radius: float) -> Params:
    """∂_a ⟨∇_Θ L(Θ, a), direction⟩ as a central difference of ∂_a L (the official way)."""
    norm = _norm(direction)
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
        sides.append(all_reached(logits_partial(problem.inner, near, problem.masks)))
        del near
    return {n: (side - sides[1][n]) / (2 * step) for n, side in sides[0].items()}


def _norm(tensors: Params) -> float:
    norms = [
        torch.linalg.vector_norm(
            t, dtype=torch.float32 if t.dtype in (torch.float16, torch.bfloat16) else None
        )
        for t in tensors.values()
    ]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
