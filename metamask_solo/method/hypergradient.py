r"""The hypergradient of the mask logits (MetaMask, section 4.2 and algorithm 1).

With :math:`L(\Theta, a)` the loss at parameters :math:`\Theta` and mask logits :math:`a`,
:math:`g = \nabla_\Theta L(\Theta, a)`, the trial step :math:`\Theta^+ = step(\Theta, g)` and
:math:`J(a) = L(\Theta^+, a)`, the whole derivative, the path through the trial step included, is

.. math:: \nabla J = \partial_a L(\Theta^+, a) + \partial_a \langle \nabla_\Theta L(\Theta, a),
          w\rangle, \qquad w = \partial L(step(\Theta, g), a) / \partial g \text{ held constant.}

``w`` is ordinary autograd through the step, so nothing here knows what SGD is. The second term, the
*mixed term*, has a derivative in a and one in Θ along w: ``exact`` takes it as the tangent of a
gradient (forward mode over reverse mode), ``double_backward`` differentiates the graph of g,
``finite_difference`` takes a central difference, and ``first_order`` leaves it out.

What a loss must be: a function of its parameters and its logits, and beyond these only of torch's
default random numbers and of buffers of the modules that it calls. Each evaluation starts from the
same random numbers and the same buffers, and leaves both as they were. State in other attributes,
noise from a generator of its own, and hooks that change gradients or steps are not followed.
"""

import copy
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, get_args
from unittest import mock

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.utils.parametrize as parametrize
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from metamask_solo.errors import UserError

Method = Literal["exact", "double_backward", "finite_difference", "first_order"]
METHODS: tuple[Method, ...] = get_args(Method)
Params = dict[str, Tensor]
Step = Callable[[Params, Params], Params]
LossFunction = Callable[[Params, Tensor], Tensor]

CHECKPOINTING = (
    "the loss uses saved-tensor hooks (activation checkpointing or offloading), which would "
    "compute again at other parameters: turn them off for the hypergradient"
)


def hypergradient(
    loss_fn: LossFunction,
    params: Mapping[str, Tensor],
    logits: Tensor,
    step: Step,
    method: Method = "exact",
    *,
    outer_loss_fn: LossFunction | None = None,
    radius: float = 1e-2,
) -> Tensor:
    """Derivative of ``outer_loss_fn(step(Θ, ∇loss_fn(Θ, a)), a)`` in the logits a.

    Nothing that is passed in changes: no parameter, ``.grad``, buffer, or random state.

    Args:
        loss_fn: function of (params, logits) that returns a scalar tensor, the loss of the trial
            step. It must compute with the tensors that it is given; see the module's docstring.
        params: parameter name to tensor. If some require grad, the others stay where they are. One
            tensor under two names takes one step.
        logits: the mask logits a, usually of shape (D,).
        step: differentiable function (params, gradients) → moved params, of the parameters that
            the loss reaches; :func:`optimizer_step` makes one of an optimiser.
        method: ``exact``; ``double_backward``: the same value for more time and memory, for what
            PyTorch has no forward mode of; ``finite_difference``; ``first_order``.
        outer_loss_fn: the loss after the trial step, such as that of another batch; None: the same.
        radius: of ``finite_difference``: how far the parameters move to either side (norm).

    Returns:
        A tensor of the shape of ``logits``.

    Raises:
        UserError: an argument is wrong; the loss reaches no parameter or no logits; the step has no
            derivative; or this way cannot differentiate the loss.

    Example:
        >>> w, a = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 1.0])
        >>> sgd = lambda p, g: {"w": p["w"] - 0.1 * g["w"]}
        >>> hypergradient(lambda p, a: (a * p["w"] ** 2).sum(), {"w": w}, a, sgd)
        tensor([0.6300, 1.2800])
    """
    if method not in METHODS:
        raise UserError(f"method={method!r}: allowed are {', '.join(METHODS)}")
    if not radius > 0:
        raise UserError(f"radius={radius}: must be above 0")
    if not callable(step):
        raise UserError(f"step={step!r}: must be a function (params, gradients) -> params")
    if not any(p.requires_grad for p in params.values()):
        originals, moving = {}, dict(params)
    else:
        originals = moving = {n: p for n, p in params.items() if p.requires_grad}
    if logits.requires_grad:
        originals = {**originals, "logits": logits}
    # one tensor under two names is one parameter
    first_name = {id(p): name for name, p in reversed(moving.items())}
    now = {name: moving[name].detach() for name in first_name.values()}
    a0 = logits.detach()

    def evaluate(
        loss: LossFunction, values: Params, a: Tensor, mode: "_ForwardMode | None" = None
    ) -> Any:
        aliased = {name: values[first_name[id(p)]] for name, p in moving.items()}
        with _repeatable([*now.values(), a0], mode):
            value = loss({**params, **aliased}, a)
        for name, t in values.items():
            if t._version:
                raise UserError(
                    f"the loss writes to the parameter {name!r}: do so before or after the step"
                )
        if not isinstance(value, Tensor) or value.dim() != 0 or not value.is_floating_point():
            raise UserError(f"the loss is {_describe(value)}: must be a real scalar tensor")
        return value

    with torch.enable_grad():
        theta, a = _leaves(now), _leaf(a0)
        value = evaluate(loss_fn, theta, a)
        graph = method == "double_backward"
        gradient = _gradient(value, theta, a, originals, graph)
        theta = {name: theta[name] for name in gradient}
        g = {name: d.detach().requires_grad_() for name, d in gradient.items()}
        moved = step({name: now[name] for name in g}, g)
        if not isinstance(moved, Mapping) or moved.keys() != g.keys():
            raise UserError("step: must return a tensor for each parameter that it is given")

        # the loss after the trial step, its gradient in Θ⁺ (v) and in the logits
        theta_plus, a_plus = _leaves(now | {n: t.detach() for n, t in moved.items()}), _leaf(a0)
        outer = evaluate(outer_loss_fn or loss_fn, theta_plus, a_plus)
        inputs = [a_plus, *originals.values()]
        if method != "first_order":
            inputs += [theta_plus[name] for name in g]
        partial, *rest = _grad(outer, inputs)
        direct = _reached_logits(partial, rest[: len(originals)], originals)
        if method == "first_order":
            return direct
        v = dict(zip(g, rest[len(originals) :], strict=True))
        w = _through_step(step, now, g, moved, v)

        norm = _norm(w.values())
        if method == "double_backward":
            try:
                _check_graph(gradient.values())
                (mixed,) = torch.autograd.grad(
                    list(gradient.values()), a, list(w.values()), allow_unused=True
                )
            except (RuntimeError, NotImplementedError) as error:
                raise _cannot(error, method) from error
            return direct if mixed is None else direct + mixed
        del gradient, moved, v, outer
        size = norm.clamp_min(torch.finfo(torch.float32).tiny)
        unit = {name: d / size.to(d.dtype) for name, d in w.items()}
        if method == "finite_difference":
            sides = []
            for sign in (radius, -radius):
                side, near = _leaf(a0), {n: now[n] + sign * d for n, d in unit.items()}
                (at_side,) = _grad(evaluate(loss_fn, _leaves(now | near), side), [side])
                sides.append(torch.zeros_like(a0) if at_side is None else at_side)
            return direct + norm.to(a0.dtype) * (sides[0] - sides[1]) / (2 * radius)
        mode = _ForwardMode()
        return direct + norm.to(a0.dtype) * _tangent_of_gradient(
            lambda values, a: evaluate(loss_fn, values, a, mode), mode, now, a0, unit, g, value
        )


def optimizer_step(
    optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor], lr: float | None = None
) -> Step:
    """The next step of an optimiser as a differentiable function (params, gradients) → params.

    It is computed by the optimiser's own class, on copies of parameters and state, so momentum,
    decay, adaptive rates and groups are those of the next real step. Gradient clipping is no part
    of it. The optimiser is read when the step is called, and never changed.

    Args:
        optimizer: of torch, or one whose step autograd can differentiate; others need ``lr``.
        params: the parameters by name; each is in one group of the optimiser.
        lr: None, or a rate: the step is then Θ − lr · (g + weight_decay · Θ), with the weight decay
            of the parameter's group.

    Raises:
        UserError: a parameter is in no group. When the step is called: it has no derivative.

    Example:
        >>> w = nn.Parameter(torch.ones(2))
        >>> step = optimizer_step(torch.optim.SGD([w], lr=0.1), {"w": w})
        >>> step({"w": w.detach()}, {"w": torch.ones(2)})["w"]
        tensor([0.9000, 0.9000])
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(f"optimizer={_describe(optimizer)}: must be an optimiser of torch")
    if type(optimizer).__name__.startswith("Lightning"):  # self.optimizers() of a LightningModule
        optimizer = getattr(optimizer, "optimizer", optimizer)
    if any(isinstance(value, torch.optim.Optimizer) for value in vars(optimizer).values()):
        raise UserError(
            f"optimizer={_describe(optimizer)}: wraps another one, which cannot be copied: give "
            f"that one; or {_GIVE_RATE}"
        )
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, p in params.items():
        if id(p) not in group_of:
            raise UserError(f"parameter {name!r} is in no group of the optimiser")
    if lr is not None:
        if not (isinstance(lr, int | float) and 0 <= lr < float("inf")):
            raise UserError(f"lr={lr!r}: must be a finite number of at least 0")
        decay = {n: group_of[id(p)].get("weight_decay", 0) for n, p in params.items()}

        def plain_gradient_step(now: Params, gradients: Params) -> Params:
            return {n: now[n] - lr * (g + decay[n] * now[n]) for n, g in gradients.items()}

        return plain_gradient_step

    kind, name_of_kind = type(optimizer), type(optimizer).__name__
    of_torch = kind.__module__.startswith("torch.optim")

    def next_step(now: Params, gradients: Params) -> Params:
        moved = {name: now[name].clone() for name in gradients}
        clones = {id(params[name]): clone for name, clone in moved.items()}
        twin = _copy_of(optimizer, clones)
        for name, clone in moved.items():
            clone.grad = gradients[name]
            state = twin.state.get(clone, {})
            for key, value in state.items():
                state[key] = _in_precision(value, clone)
        # the one code path of torch's optimisers that autograd can follow
        options = {"differentiable": True, "foreach": False, "fused": None, "capturable": False}
        for group in twin.param_groups:
            group.update({k: v for k, v in options.items() if k in group})
        if of_torch:
            # each parameter has a group of its own, since some may not have taken a step yet
            twin.param_groups = [
                {**group, "params": [p]} for group in twin.param_groups for p in group["params"]
            ]
        for group in twin.param_groups if of_torch and kind is torch.optim.SGD else []:
            state = twin.state[group["params"][0]]
            if group["momentum"] and state.get("momentum_buffer") is None:
                # torch makes its first buffer without a derivative; this has value and derivative
                state["momentum_buffer"] = torch.zeros_like(group["params"][0])
                group["dampening"] = 0
        function: Any = kind.step
        while hasattr(function, "__wrapped__") and "torch" in function.__code__.co_filename:
            function = function.__wrapped__  # torch's profiling, and its no_grad
        # steps are counted in tensors of the default type; 1 - 0.999 is rough in single precision
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            function(twin)
        finally:
            torch.set_default_dtype(default)
        return moved

    def step(now: Params, gradients: Params) -> Params:
        try:
            if not of_torch:
                _check_step(next_step, now, gradients, name_of_kind)
            return next_step(now, gradients)
        except UserError:
            raise
        except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise UserError(
                f"optimizer: the step of {name_of_kind} cannot be differentiated "
                f"({_first_line(error)}); {_GIVE_RATE}"
            ) from error

    return step


def mask_hypergradient(
    loss: Callable[[], Tensor],
    modules: nn.Module | Iterable[nn.Module],
    mask: nn.Module | nn.Parameter,
    optimizer_or_step: torch.optim.Optimizer | Step,
    method: Method = "exact",
    *,
    outer_loss: Callable[[], Tensor] | None = None,
    lr: float | None = None,
    radius: float = 1e-2,
) -> Tensor:
    """The hypergradient of a mask: derivative of the loss after the optimiser's next step.

    :func:`hypergradient` on ordinary modules. While ``loss`` runs, the modules hold other
    parameters; afterwards they hold their own, and nothing else has changed either.

    With several processes, the loss must be that of this process alone (``gather=False`` in
    :func:`metamask_solo.nt_xent`); average the result by :func:`mean_over_processes`.

    Args:
        loss: calls the modules and the mask, and returns the scalar loss of the trial step.
        modules: what the trial step moves: every parameter that requires grad, but for the mask's.
        mask: a :class:`metamask_solo.DimensionalMask`, any module with ``logits``, or a parameter
            of one of the modules.
        optimizer_or_step: the optimiser whose next step on ``loss`` is the trial step; or a
            function (params, gradients) → params by the names of ``nn.ModuleList(modules)``.
        method: see :func:`hypergradient`; ``radius``, too.
        outer_loss: the loss after the trial step, such as that of another batch; None: the same.
        lr: see :func:`optimizer_step`.

    Returns:
        A tensor of the shape of the logits.

    Raises:
        UserError: see :func:`hypergradient` and :func:`optimizer_step`.

    Example:
        >>> backbone, head, mask = nn.Linear(4, 3), nn.Linear(3, 2), DimensionalMask(3)
        >>> optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()])
        >>> x = torch.randn(8, 4)
        >>> loss = lambda: head(mask(backbone(x))).square().mean()
        >>> mask_hypergradient(loss, [backbone, head], mask, optimizer).shape
        torch.Size([3])
    """
    parts = [modules] if isinstance(modules, nn.Module) else list(modules)
    for part in parts:
        if not isinstance(part, nn.Module):
            raise UserError(f"modules: holds {_describe(part)}; must hold modules alone")
        if isinstance(part, nn.parallel.DistributedDataParallel | nn.DataParallel):
            raise UserError(f"modules: give {type(part).__name__}'s own module, its .module")
    every = nn.ModuleList([*parts, mask] if isinstance(mask, nn.Module) else parts)
    logits: Any = getattr(mask, "logits", mask)
    if not any(logits is p for p in every.parameters()):
        raise UserError("mask: must be a module with logits, or a parameter of one of the modules")
    params = {n: p for n, p in every.named_parameters() if p.requires_grad and p is not logits}
    if isinstance(optimizer_or_step, torch.optim.Optimizer):
        step = optimizer_step(optimizer_or_step, params, lr)
    elif callable(optimizer_or_step) and lr is None:
        step = optimizer_or_step
    else:
        raise UserError(
            f"optimizer={_describe(optimizer_or_step)}, lr={lr}: must be an optimiser of torch, or "
            "a function (params, gradients) -> params without lr"
        )

    def on_modules(closure: Callable[[], Tensor]) -> LossFunction:
        def evaluate(p: Params, a: Tensor) -> Tensor:
            held = {id(params[name]): t for name, t in p.items()} | {id(logits): a}
            with _holding(every, held):
                return closure()

        return evaluate

    return hypergradient(
        on_modules(loss),
        params,
        logits,
        step,
        method,
        outer_loss_fn=None if outer_loss is None else on_modules(outer_loss),
        radius=radius,
    )


def mean_over_processes(gradient: Tensor) -> Tensor:
    """The mean of ``gradient`` over the processes of a distributed run; itself otherwise.

    Without it, the masks of the processes of a run under DistributedDataParallel drift apart.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return gradient
    total = gradient.clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()


# --- derivatives -----------------------------------------------------------------------------

_GIVE_RATE = (
    "give the trial step a rate of its own (lr, in a run meta.trial_lr): 1e-3 to start with"
)


def _leaf(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_()


def _leaves(tensors: Params) -> Params:
    # clones: what the loss writes to them must not reach the caller's
    return {name: _leaf(t) for name, t in tensors.items()}


def _norm(tensors: Iterable[Tensor]) -> Tensor:
    """The norm of all of them, in double precision, in which no small one underflows."""
    norms = [torch.linalg.vector_norm(t.detach(), dtype=torch.float64) for t in tensors]
    return torch.stack(norms).norm()


def _grad(value: Tensor, inputs: list[Tensor], **kwargs: Any) -> tuple[Tensor | None, ...]:
    if not value.requires_grad:
        return (None,) * len(inputs)
    return torch.autograd.grad(value, inputs, allow_unused=True, **kwargs)


def _gradient(
    value: Tensor, theta: Params, a: Tensor, originals: Params, create_graph: bool
) -> Params:
    """∇_Θ of the loss, of the parameters that it reaches."""
    inputs = [*theta.values(), *originals.values()]
    derivatives = _grad(value, inputs, create_graph=create_graph)
    _reached_logits(a, derivatives[len(theta) :], originals)
    reached = {n: d for n, d in zip(theta, derivatives, strict=False) if d is not None}
    if not reached:
        raise UserError(
            "the loss reaches none of the parameters: it must compute with those that it is given"
        )
    return reached


def _reached_logits(
    partial: Tensor | None, stray: Iterable[Tensor | None], originals: Params
) -> Tensor:
    """The partial derivative in the logits, of a loss that reaches them and no stray parameter."""
    for name, derivative in zip(originals, stray, strict=True):
        if derivative is not None:
            raise UserError(
                f"the loss computes with the parameter {name!r} that was there before, which no "
                "trial step moves: call the modules, and take parameters from them, inside the loss"
            )
    if partial is None:
        raise UserError("the loss does not depend on the logits")
    return partial


def _check_graph(gradients: Iterable[Tensor]) -> None:
    """Refuses a graph that ``once_differentiable`` cut, which autograd leaves out silently."""
    nodes = [g.grad_fn for g in gradients]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if node is None:
            continue
        if type(node).__name__ == "Error":
            raise RuntimeError("a function is marked with once_differentiable")
        following = {next_node for next_node, _ in node.next_functions} - seen
        seen |= following
        nodes += following


def _through_step(
    step: Step, now: Params, g: Params, moved: Params, v: dict[str, Tensor | None]
) -> Params:
    """w = ∂⟨v, step(Θ, g)⟩/∂g, v held constant."""

    def slope(g: Params, moved: Params) -> Params:
        pairs = [(moved[n], d) for n, d in v.items() if d is not None and moved[n].requires_grad]
        try:
            outputs, directions = zip(*pairs, strict=True)
            found = torch.autograd.grad(outputs, list(g.values()), directions, allow_unused=True)
        except RuntimeError as error:
            raise UserError(
                f"optimizer: its step cannot be differentiated ({_first_line(error)}); {_GIVE_RATE}"
            ) from error
        return {
            n: torch.zeros_like(d) if w is None else w.detach()
            for (n, d), w in zip(g.items(), found, strict=True)
        }

    if not any(t.requires_grad for t in moved.values()):
        if all(torch.equal(moved[name], now[name]) for name in g):  # a rate of 0
            return {name: torch.zeros_like(d) for name, d in g.items()}
        raise UserError(f"optimizer: no derivative flows through its step; {_GIVE_RATE}")
    if all(d is None for d in v.values()):
        return {name: torch.zeros_like(d) for name, d in g.items()}
    w = slope(g, moved)
    # Adam's step has a slope where a gradient is 0, as dead units have, but its square root has
    # none. A gradient far below every epsilon has that slope. NaN elsewhere must be seen.
    lost = {n: (g[n] == 0) & ~d.isfinite() for n, d in w.items()}
    if torch.stack([at.any() for at in lost.values()]).any():
        near = {n: torch.where(lost[n], 1e-16, d.detach()).requires_grad_() for n, d in g.items()}
        at_near = slope(near, step({n: now[n] for n in g}, near))
        w = {n: torch.where(lost[n], at_near[n], d) for n, d in w.items()}
    return w


def _tangent_of_gradient(
    loss: Callable[[Params, Tensor], Tensor],
    mode: "_ForwardMode",
    now: Params,
    a0: Tensor,
    unit: Params,
    g: Params,
    value: Tensor,
) -> Tensor:
    """∂_a⟨∇_Θ L, unit⟩, as the tangent of ∂_a L along ``unit``; checks itself.

    The graph begins at the logits, so the network before the mask runs in forward mode alone.
    With ``create_graph`` the backward formulas of linear algebra do not use saved factors, which
    carry no tangent.
    """
    a = _leaf(a0)
    try:
        with forward_ad.dual_level():
            duals = {n: forward_ad.make_dual(now[n].clone(), d) for n, d in unit.items()}
            dual_value = loss(now | duals, a)
            with _ForwardMode():
                (partial,) = _grad(dual_value, [a], create_graph=True)
            slope = forward_ad.unpack_dual(dual_value).tangent
            mixed = None if partial is None else forward_ad.unpack_dual(partial).tangent
            again = None
            if mode.differentiates and slope is not None:
                (again,) = _grad(slope, [a])
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise _cannot(error, "exact") from error
    mixed = torch.zeros_like(a0) if mixed is None else mixed.detach()
    # The tangent of the loss is ⟨g, unit⟩. It is not, where an operator has no or a wrong forward
    # mode, or where the loss is no function of its arguments.
    types = {value.dtype, a0.dtype, *(t.dtype for t in now.values())}
    if torch.is_autocast_enabled(value.device.type):
        types.add(torch.get_autocast_dtype(value.device.type))
    allowed = 4 * max(torch.finfo(t).eps for t in types) ** 0.5
    products = torch.stack([(g[n].detach().double() * d).sum() for n, d in unit.items()])
    off = (products.sum() - (0.0 if slope is None else slope)).abs()
    wrong = off > allowed * _norm(g.values())
    if again is not None:
        # A loss with gradients of its own needs third derivatives, whose forward mode is wrong for
        # normalisations; the gradient of the tangent does not need it.
        wrong = wrong | ((mixed - again).norm() > allowed * mixed.norm())
    if wrong:  # false for NaN, which the caller has to see
        raise UserError(
            "exact: the loss has another derivative in forward mode than in reverse mode: an "
            "operator without a right forward mode, or noise or state that is not repeated; "
            f"{_other_ways('exact')}"
        )
    return mixed


def _other_ways(method: str) -> str:
    if method == "exact":
        return "use method='double_backward' or 'finite_difference'"
    return "use method='finite_difference'"


def _cannot(error: Exception, method: str) -> UserError:
    """One line that names the operation, the module in which it was called, and the other ways."""
    if isinstance(error, UserError):
        return error
    operation = re.search(r"forward AD with (\S+) that does not", str(error))
    module, trace = None, error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        module = owner if isinstance(owner, nn.Module) else module
        trace = trace.tb_next
    where = "" if module is None else f" in {type(module).__name__}"
    reason = (
        f"{operation[1]}{where} has no forward mode in PyTorch"
        if operation
        else f"fails{where} ({_first_line(error)})"
    )
    return UserError(f"{method}: {reason}; {_other_ways(method)}")


def _check_step(step: Step, now: Params, gradients: Params, name: str) -> None:
    """Refuses a step whose autograd derivative is not its derivative, such as LARS's.

    Compares both in double precision along one direction, for the sum of the moved parameters
    weighted by noise. The optimisers of torch need no such check: the tests know them.
    """
    noise = torch.Generator().manual_seed(0)

    def drawn(g: Tensor) -> Tensor:
        return torch.rand(g.shape, generator=noise, dtype=torch.float64).to(g.device) + 0.5

    theta = {n: t.double() for n, t in now.items()}
    g = {n: d.detach().double() for n, d in gradients.items()}
    weights = {n: drawn(d) * d.sign() for n, d in g.items()}
    along = {n: drawn(d) * d for n, d in g.items()}
    leaves = _leaves(g)
    total = torch.stack([(weights[n] * t).sum() for n, t in step(theta, leaves).items()]).sum()
    slopes = dict(zip(g, _grad(total, list(leaves.values())), strict=True))
    terms = [(along[n] * d).nan_to_num() for n, d in slopes.items() if d is not None]
    by_autograd = sum((t.sum() for t in terms), torch.zeros((), dtype=torch.float64))
    h, sides = 1e-4, []
    for sign in (h, -h):
        near = step(theta, {n: d + sign * along[n] for n, d in g.items()})
        changes = [(weights[n] * (t - theta[n])).sum() for n, t in near.items()]
        sides.append(torch.stack(changes).sum())
    difference = (sides[0] - sides[1]) / (2 * h)
    scale = difference.abs() + sum(t.abs().sum() for t in terms)
    if (difference - by_autograd).abs() > 1e-4 * scale:
        raise UserError(f"optimizer: autograd cannot follow the step of {name}; {_GIVE_RATE}")


def _copy_of(optimizer: torch.optim.Optimizer, clones: dict[int, Tensor]) -> Any:
    """A copy of an optimiser that has only the clones of its parameters, and state of its own."""
    twin: Any = object.__new__(type(optimizer))
    memo: dict[int, Any] = dict(clones) | {id(optimizer): twin}
    left_out = {"param_groups", "state", "step"}  # schedulers put a step of theirs on the object
    for key, value in vars(optimizer).items():
        if key not in left_out:
            hooks = "hook" in key and isinstance(value, dict)
            twin.__dict__[key] = type(value)() if hooks else copy.deepcopy(value, memo)
    twin.defaults["differentiable"] = True  # else torch's own step switches autograd off
    twin.param_groups = [
        {k: copy.deepcopy(v, memo) for k, v in group.items() if k != "params"}
        | {"params": [clones[id(p)] for p in group["params"] if id(p) in clones]}
        for group in optimizer.param_groups
    ]
    twin.state = defaultdict(dict)
    for owner, state in optimizer.state.items():
        if not isinstance(owner, Tensor) or id(owner) in clones:
            twin.state[memo.get(id(owner), owner)] = copy.deepcopy(state, memo)
    return twin


def _in_precision(value: Any, clone: Tensor) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.to(clone.dtype) if value.shape == clone.shape else value.double()


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    return f"a {type(value).__name__}"


def _first_line(error: Exception) -> str:
    return (str(error) or repr(error)).splitlines()[0]


# --- evaluations of one and the same function ------------------------------------------------


@contextmanager
def _repeatable(tensors: list[Tensor], mode: "_ForwardMode | None") -> Iterator[None]:
    """A block that starts from the state before it, and leaves that state behind.

    Random numbers are those of before; each module that is called works on copies of its buffers;
    kernels are those that have all derivatives; no other process is waited for.
    """
    buffers = _Buffers()

    def refuse_checkpointing(*args: Any) -> None:
        raise UserError(CHECKPOINTING)

    gpus = sorted({t.device.index for t in tensors if t.is_cuda})
    _evaluating.append(buffers)
    with ExitStack() as stack:
        stack.callback(_evaluating.pop)
        stack.enter_context(torch.random.fork_rng(gpus))
        stack.callback(buffers.restore)
        stack.callback(register_module_forward_pre_hook(buffers.copy).remove)
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        fast_path = torch.backends.mha.get_fastpath_enabled()
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        torch.backends.mha.set_fastpath_enabled(False)  # it has no derivatives of any kind
        for owner, name, value in (
            (nn.SyncBatchNorm, "forward", _BatchNorm.forward),
            (torch.utils.checkpoint.CheckpointFunction, "apply", refuse_checkpointing),
            (parametrize, "_cache", {}),  # of the parameters that are held now
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        if "torch._dynamo" in sys.modules:  # without it nothing is compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            stack.enter_context(_NoCollectives())
        if mode is not None:
            stack.enter_context(mode)
        try:
            with torch.autograd.graph.disable_saved_tensors_hooks(CHECKPOINTING):
                yield
        except RuntimeError as error:
            if CHECKPOINTING in str(error) and not isinstance(error, UserError):
                raise UserError(CHECKPOINTING) from error
            raise


class _Buffers:
    """Lets modules work on copies of their buffers, and puts the buffers back."""

    def __init__(self) -> None:
        self.kept: dict[nn.Module, tuple[dict[str, Any], dict[str, Any]]] = {}
        self.copies: dict[int, Tensor] = {}

    def copy(self, called: nn.Module, args: Any = None) -> None:
        if called in self.kept:
            return
        for module in called.modules():  # a part may be called by its forward, past a hook
            if module not in self.kept:
                attributes = {k: v for k, v in vars(module).items() if isinstance(v, Tensor)}
                self.kept[module] = dict(module._buffers), attributes
                for key, buffer in module._buffers.items():
                    if buffer is not None:  # tied buffers stay tied
                        module._buffers[key] = self.copies.setdefault(id(buffer), buffer.clone())

    def restore(self) -> None:
        for module, (buffers, attributes) in self.kept.items():
            module._buffers.clear()
            module._buffers.update(buffers)
            vars(module).update(attributes)  # such as the weight of an old weight_norm


class _ForwardMode(TorchFunctionMode):
    """What is computed where gradients are off is a constant, in forward mode as in reverse mode.

    Attributes:
        differentiates: whether the loss asked for a graph of a gradient.
    """

    differentiates = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            with forward_ad._set_fwd_grad_enabled(False):
                return func(*args, **kwargs)
        if func is torch.autograd.grad and kwargs.get("create_graph"):
            self.differentiates = True
        if func is torch._weight_norm:  # its kernel has no forward mode; this is its definition
            v, g, dim = (*args, 0)[:3]
            return v * (g / torch.norm_except_dim(v, 2, dim))
        return func(*args, **kwargs)


class _NoCollectives(TorchDispatchMode):
    """Refuses a loss that exchanges tensors with other processes.

    The trial step of such a loss is another one on each process, and the gradients that they
    exchange would be those of the sum of all losses.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            raise UserError(
                f"the loss exchanges tensors between processes ({func.__name__}), which has no "
                "hypergradient: give the loss of this process alone, as nt_xent(..., gather=False)"
            )
        return func(*args, **(kwargs or {}))


# of the evaluations that run now; a loss may call for a hypergradient of its own
_evaluating: list[_Buffers] = []


@contextmanager
def _holding(every: nn.Module, tensors: Mapping[int, Tensor]) -> Iterator[None]:
    """Puts other tensors in the place of parameters, by identity, wherever modules hold them.

    (torch.func.functional_call leaves its own behind where one module stands under two names.)
    A loss that is a method of a module, and not its forward, works on copies of buffers, too.
    """
    slots = [
        (module._parameters, name, p)
        for module in every.modules()
        for name, p in module._parameters.items()
        if p is not None
    ]
    versions = [p._version for _, _, p in slots]
    _evaluating[-1].copy(every)
    try:
        for holder, name, p in slots:
            holder[name] = tensors.get(id(p), p)  # type: ignore[assignment]
        yield
    finally:
        for holder, name, p in slots:
            holder[name] = p
    for (_, name, p), version in zip(slots, versions, strict=True):
        if p._version != version:
            raise UserError(f"the loss writes to the parameter {name!r}: do so after the step")
