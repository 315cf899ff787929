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
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar, cast, get_args

import torch
from torch import Tensor, nn

from metamask_solo.errors import UserError
from metamask_solo.method.names import Method
from metamask_solo.method.repetition import Repetition
from metamask_solo.method.trial import TrialStep
from metamask_solo.method.ways import (
    Loss,
    Params,
    Problem,
    all_reached,
    by_passes,
    double_backward,
    logits_partial,
)

METHODS: tuple[Method, ...] = get_args(Method)
# one tensor, or several by name: the loss gets what it was called with
Logits = TypeVar("Logits", bound=Tensor | Mapping[str, Tensor])
LossFunction = Callable[[Params, Any], Tensor]


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
            arguments. ``exact`` sees much of it in any case, but not all.

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

    def scaled(loss: LossFunction) -> Loss:
        def evaluate(own: Params, a: Params) -> Tensor:
            again.rewind()
            every = {**fixed, **{name: own[first] for name, first in names.items()}}
            value = loss(every, a if isinstance(logits, Mapping) else a["logits"])
            return _scalar(value) * loss_scale

        return evaluate

    inner = scaled(loss_fn)
    outer = inner if outer_loss_fn is None else scaled(outer_loss_fn)
    given = {name: params[name] for name in moving if params[name].requires_grad}
    problem = Problem(inner, outer, moving, masks, given, trial, loss_scale)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        Repetition([*params.values(), *masks.values()]) as again,
    ):
        if not any(trial.of(name)[0] for name in moving):
            result = all_reached(logits_partial(outer, moving, masks))
        elif method == "double_backward":
            result = double_backward(problem, check)
        else:
            result = by_passes(problem, method, radius, check, again)
    result = {name: g / loss_scale for name, g in result.items()}
    return cast(Logits, result if isinstance(logits, Mapping) else result["logits"])


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
