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
default random numbers and of what the modules that it calls hold: buffers, frozen parameters and
plain attributes. Each evaluation starts from the same random numbers and the same modules, and
leaves both as they were. Lists and other containers that a loss writes to, noise from a generator
of its own, TorchScript, hooks that change gradients, and a custom autograd.Function whose backward
autograd cannot differentiate are not followed.
"""

import copy
import inspect
import itertools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, get_args
from unittest import mock

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
import torch.nn.utils.parametrize as parametrize
import torch.nn.utils.stateless as stateless
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from metamask_solo.errors import UserError
from metamask_solo.method import Method

METHODS: tuple[Method, ...] = get_args(Method)
Params = dict[str, Tensor]
Step = Callable[[Params, Params], Params]
LossFunction = Callable[[Params, Tensor], Tensor]

CHECKPOINTING = (
    "the loss uses saved-tensor hooks (activation checkpointing or offloading), which would "
    "compute again at other parameters: turn them off for the hypergradient"
)
GIVE_RATE = "give the trial step a rate of its own (lr, in a run meta.trial_lr): 1e-3 to start with"


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
            step. It must compute with the tensors that it is given, which a module that it calls
            holds instead of ``params`` and ``logits``; see the module's docstring.
        params: parameter name to tensor, each once. If some require grad, only these move.
        logits: the mask logits a, usually of shape (D,).
        step: differentiable function (params, gradients) → moved params, of the parameters that
            the loss reaches; :func:`optimizer_step` makes one of an optimiser.
        method: ``exact``; ``double_backward``: the same value for more time and memory, for what
            PyTorch has no forward mode of; ``finite_difference``: for steps like SGD's;
            ``first_order``.
        outer_loss_fn: the loss after the trial step, such as that of another batch; None: the same.
        radius: of ``finite_difference``: how far the parameters move to either side (norm).

    Returns:
        A tensor of the shape of ``logits``.

    Raises:
        UserError: an argument is wrong; the loss reaches no parameter or no logits; the step has no
            derivative; or this way cannot differentiate the loss, or would lose its digits.

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
    moving = {n: p for n, p in params.items() if p.requires_grad} or dict(params)
    originals = [*(p for p in moving.values() if p.requires_grad), logits]
    now, a = {n: p.detach() for n, p in moving.items()}, logits.detach().clone().requires_grad_()

    def evaluate(loss: LossFunction, values: Params) -> Tensor:
        held = {id(params[n]): t for n, t in values.items()} | {id(logits): a}
        with _same_function(held):
            value = loss({**params, **values}, a)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise UserError("the loss must be a tensor of one number")
        return value

    def differentiate(
        loss: LossFunction, theta: Params, names: Iterable[str] | None, create_graph: bool = False
    ) -> tuple[Tensor, Params]:
        """The derivative of a loss in the logits, and in those named parameters it reaches."""
        leaves = {n: t.detach().requires_grad_() for n, t in theta.items()}
        with _no_own_gradient(method) if create_graph else nullcontext():
            value = evaluate(loss, leaves)
        inputs = {n: leaves[n] for n in names or ()}
        partial, *rest = _grad(value, [a, *originals, *inputs.values()], create_graph=create_graph)
        strays, derivatives = rest[: len(originals)], rest[len(originals) :]
        if any(d is not None for d in strays):
            raise UserError(
                "the loss uses a parameter that was taken from a module outside the loss, so no "
                "trial step moves it: call modules, and read their parameters, inside the loss"
            )
        if partial is None:
            raise UserError("the loss does not depend on the logits")
        reached = {n: d for n, d in zip(inputs, derivatives, strict=True) if d is not None}
        if names is not None and not reached:
            raise UserError("the loss does not depend on the parameters that the trial step moves")
        return partial, reached

    # Each dictionary of tensors below is as large as the network: none lives longer than needed.
    with torch.enable_grad(), ExitStack() as stack:
        stack.callback(logits.requires_grad_, logits.requires_grad)
        logits.requires_grad_()  # so that a loss that computes with these themselves is seen
        # copies, the first time: a loss that writes to its parameters, which is refused, has then
        # not written to those that were passed in
        copies = {n: t.clone() for n, t in now.items()}
        try:
            _, gradient = differentiate(loss_fn, copies, now, method == "double_backward")
        finally:  # a backward pass may fail after a write; NaN is no difference
            pairs = zip([logits, *now.values()], [a, *copies.values()], strict=True)
            changed = [((x < y) | (x > y)).any().to(a.device) for x, y in pairs]
            if torch.stack(changed).any():
                raise UserError("the loss writes to a parameter: do so before or after the step")
        del copies
        g = {n: d.detach().requires_grad_() for n, d in gradient.items()}
        if method != "double_backward":
            gradient = {}
        moved = step({n: now[n].clone() for n in g}, g)  # which may write to them
        theta_plus = {n: moved[n].detach() if n in g else t.clone() for n, t in now.items()}
        after = None if method == "first_order" else g
        direct, v = differentiate(outer_loss_fn or loss_fn, theta_plus, after)
        if method == "first_order":
            return direct

        del theta_plus
        w = _through_step(moved, g, v)
        del moved, v
        norm = _norm(w.values())
        tiny = max(torch.finfo(t).tiny for t in (torch.float32, *(d.dtype for d in w.values())))
        size = norm.clamp_min(tiny)
        unit = {n: w.pop(n) / size.to(g[n].dtype) for n in g}
        if method == "exact":  # what it is compared with
            slope, allowed = _dot(g, unit), 4 * _norm(g.values())
        del g
        mixed: Tensor | None
        functions = _Functions([a, *now.values()])
        try:
            if method == "exact":
                # The graph begins at the logits, so the network before the mask runs in forward
                # mode alone. With create_graph the backward formulas of linear algebra do not use
                # saved factors, which carry no tangent.
                with forward_ad.dual_level():
                    duals = now | {n: forward_ad.make_dual(now[n], d) for n, d in unit.items()}
                    with _no_own_gradient(method), functions:
                        value = evaluate(loss_fn, duals)
                    (partial,) = _grad(value, [a], create_graph=True)
                    tangent = forward_ad.unpack_dual(value).tangent
                    mixed = None if partial is None else forward_ad.unpack_dual(partial).tangent
                # an operator may have no or a wrong forward mode, and a loss may be no function of
                # its arguments
                difference = slope - (0.0 if tangent is None else tangent)
                if difference.abs() > allowed * functions.eps**0.5:  # false for NaN, to be seen
                    raise UserError(
                        "exact: forward and reverse mode give different derivatives of the loss: "
                        "an operator has a wrong forward mode, or noise or state changes between "
                        f"evaluations; {_others(method)}"
                    )
            elif method == "double_backward":
                _refuse_once_differentiable(gradient.values())
                along: Any = sum((gradient[n] * d).sum() for n, d in unit.items())
                (mixed,) = _grad(along, [a])
            else:
                sides = []
                for r in (radius, -radius):
                    near = now | {n: now[n] + r * d for n, d in unit.items()}
                    with functions:
                        sides.append(differentiate(loss_fn, near, None)[0])
                mixed = (sides[0] - sides[1]) / (2 * radius)
                rounding = norm * functions.eps * _norm(sides) / (2 * radius)
                if rounding > 0.1 * _norm([direct + norm * mixed]):
                    why = "a tenth of the result would be rounding, as with adaptive optimisers"
                    raise UserError(f"{method}: {why}: use method='exact' or 'double_backward'")
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UserError(f"{method}: {_first_line(error)}; {_others(method)}") from error
        return direct if mixed is None else direct + size.to(direct.dtype) * mixed.detach()


def optimizer_step(
    optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor], lr: float | None = None
) -> Step:
    """The next step of an optimiser as a differentiable function (params, gradients) → params.

    It is computed by the optimiser's own class, on copies of parameters and state, so momentum,
    decay, adaptive rates and groups are those of the next real step. Gradient clipping is no part
    of it. The optimiser is read when the step is called, and never changed.

    Args:
        optimizer: one whose step is torch's own, has no hooks and takes ``differentiable=True``:
            all but LBFGS, SparseAdam, Adafactor and Muon. Others, such as LARS, need ``lr``, as do
            Adam and its like for parameters in float16.
        params: the parameters by name; each is in one group of the optimiser.
        lr: None, or a rate: the step is then Θ − lr · (g + weight_decay · Θ), with the weight decay
            of the parameter's group.

    Raises:
        UserError: a parameter is in no group, or PyTorch cannot differentiate the step.

    Example:
        >>> w = nn.Parameter(torch.ones(2))
        >>> step = optimizer_step(torch.optim.SGD([w], lr=0.1), {"w": w})
        >>> step({"w": w.detach()}, {"w": torch.ones(2)})["w"]
        tensor([0.9000, 0.9000])
    """
    if type(optimizer).__name__.startswith("Lightning"):  # self.optimizers() of a LightningModule
        optimizer = getattr(optimizer, "optimizer", optimizer)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, p in params.items():
        if id(p) not in group_of:
            raise UserError(f"parameter {name!r} is in no group of the optimiser")
    if lr is not None:
        decay = {n: group_of[id(p)].get("weight_decay", 0) for n, p in params.items()}
        return lambda now, gradients: {
            n: now[n] - lr * (g + decay[n] * now[n]) for n, g in gradients.items()
        }

    def is_of_torch(function: Any) -> bool:  # functools.wraps copies the module's name
        return function.__globals__["__name__"].startswith("torch.")

    # without torch's profiling and no_grad around it
    own_step: Any = inspect.unwrap(type(optimizer).step, stop=lambda f: not is_of_torch(f))
    differentiable = all("differentiable" in group for group in optimizer.param_groups)
    hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    if not (differentiable and is_of_torch(own_step)) or hooks:
        kind = type(optimizer).__name__ + (" with hooks" if hooks else "")
        raise UserError(f"optimizer: PyTorch cannot differentiate the step of {kind}; {GIVE_RATE}")

    def step(now: Params, gradients: Params) -> Params:
        moved = {n: now[n].clone() for n in gradients}
        twin: Any = object.__new__(type(optimizer))
        twin.__dict__.update(vars(optimizer), param_groups=[], state=defaultdict(dict))
        for name, p in moved.items():
            g, group = gradients[name], {**group_of[id(params[name])], "params": [p]}
            if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW) and group["lr"] == 0:
                p.add_(g, alpha=0)  # their step divides by the rate
                continue
            state = twin.state[p] = copy.deepcopy(optimizer.state.get(params[name], {}))
            if isinstance(optimizer, torch.optim.SGD):
                if group["momentum"] and state.get("momentum_buffer") is None:
                    # torch makes its first buffer without a derivative; this has both
                    state["momentum_buffer"] = torch.zeros_like(p)
                    group["dampening"] = 0
            elif not isinstance(optimizer, torch.optim.Rprop):
                # a root of squares, as Adam's, has no slope at 0, where dead units have their
                # gradient, nor where squares underflow; the step has one, and ``small`` is far
                # below every epsilon
                if g.dtype == torch.float16:
                    raise UserError(f"optimizer: its squares underflow in float16; {GIVE_RATE}")
                small = 1e3 * torch.finfo(g.dtype).tiny ** 0.5
                g = torch.where(g.abs() < small, g + (small - g).detach(), g)
            p.grad = g
            for key, value in state.items():
                if isinstance(value, Tensor) and value.dim() < p.dim():
                    # a count, as are those that begin now; 1 - 0.999 is rough in single precision
                    state[key] = value.to(_double(value.device))
            # the one code path of torch's optimisers that autograd can follow
            group |= {"differentiable": True, "foreach": False, "fused": None, "capturable": False}
            twin.param_groups.append(group)
        with mock.patch.object(torch, "get_default_dtype", lambda: torch.float64):
            own_step(twin)
        return moved

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
        modules: what the trial step moves: every parameter that requires grad, but for the logits;
            those of the mask's module move, too.
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
    if any(isinstance(part, nn.parallel.DistributedDataParallel) for part in parts):
        raise UserError("modules: give DistributedDataParallel's own module, its .module")
    # called with the loss, which then need not call the modules itself
    holder: Any = nn.ModuleList([*parts, mask] if isinstance(mask, nn.Module) else parts)
    holder.forward = lambda closure: closure()
    logits: Any = getattr(mask, "logits", mask)
    if not any(logits is p for p in holder.parameters()):
        raise UserError("mask: must be a module with logits, or a parameter of one of the modules")
    params = {n: p for n, p in holder.named_parameters() if p.requires_grad and p is not logits}
    step: Any = optimizer_or_step
    if isinstance(optimizer_or_step, torch.optim.Optimizer):
        step = optimizer_step(optimizer_or_step, params, lr)
    elif lr is not None:
        raise UserError(f"lr={lr}: has no effect on a step that is a function; leave it out")

    def on_modules(closure: Callable[[], Tensor]) -> LossFunction:
        return lambda values, a: holder(closure)

    inner, outer = on_modules(loss), on_modules(outer_loss or loss)
    return hypergradient(inner, params, logits, step, method, outer_loss_fn=outer, radius=radius)


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


def _double(device: torch.device) -> torch.dtype:
    """Double precision, in which no small norm underflows; Apple's GPUs have none."""
    return torch.float32 if device.type == "mps" else torch.float64


def _norm(tensors: Iterable[Tensor]) -> Tensor:
    """The norm of all of them."""
    norms = [torch.linalg.vector_norm(t.detach(), dtype=_double(t.device)) for t in tensors]
    return torch.stack(norms).norm()


def _dot(one: Params, two: Params) -> Any:
    """⟨one, two⟩, in single precision at least."""

    def flat(t: Tensor) -> Tensor:
        return t.detach().flatten().to(torch.promote_types(t.dtype, torch.float32))

    return sum(torch.dot(flat(one[n]), flat(d)) for n, d in two.items())


def _grad(value: Any, inputs: list[Tensor], **kwargs: Any) -> tuple[Tensor | None, ...]:
    if not value.requires_grad:
        return (None,) * len(inputs)
    return torch.autograd.grad(value, inputs, allow_unused=True, **kwargs)


def _refuse_once_differentiable(gradients: Iterable[Tensor]) -> None:
    """Refuses a graph that ``once_differentiable`` cut, which autograd leaves out silently."""
    nodes, seen = [g.grad_fn for g in gradients], set()
    while nodes:
        node = nodes.pop()
        if type(node).__name__ == "Error":
            raise RuntimeError("a function is marked with once_differentiable")
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]


def _through_step(moved: Params, g: Params, v: Params) -> Params:
    """w = ∂⟨v, step(Θ, g)⟩/∂g, v held constant."""
    try:
        w = torch.autograd.grad(
            [moved[n] for n in v], list(g.values()), list(v.values()), materialize_grads=True
        )
    except RuntimeError as error:
        raise UserError(
            f"optimizer: no derivative flows through its step ({_first_line(error)}); {GIVE_RATE}"
        ) from error
    return {n: d.detach() for n, d in zip(g, w, strict=True)}


def _others(method: str) -> str:
    twice = "'double_backward' or " if method == "exact" else ""
    return f"use method={twice}'finite_difference'"


def _first_line(error: Exception) -> str:
    return (str(error) or repr(error)).splitlines()[0]


# --- evaluations of one and the same function ------------------------------------------------


@contextmanager
def _same_function(held: dict[int, Tensor]) -> Iterator[None]:
    """Evaluations within such blocks are of one function, and leave the state before them behind.

    Random numbers are those of before; each module that is called works on copies of its buffers
    and frozen parameters, and on the parameters of this evaluation, put in by identity, since
    functional_call is wrong for a module under two names; kernels are those that have all
    derivatives; no other process is waited for.
    """
    kept: dict[nn.Module, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    copies = dict(held)  # tied tensors stay tied
    reparametrized = stateless._reparametrize_module

    def copy_state(called: nn.Module, args: Any) -> None:
        for module in called.modules() if called not in kept else ():
            if module not in kept:  # a part may be called by its forward, past a hook
                holders: Any = vars(module), module._parameters, module._buffers
                kept[module] = [(holder, dict(holder)) for holder in holders]
                for holder, content in kept[module]:
                    for name, t in content.items():
                        trained = isinstance(t, nn.Parameter) and t.requires_grad
                        if isinstance(t, Tensor) and (id(t) in copies or not trained):
                            holder[name] = copies.setdefault(id(t), t.clone())

    def put_back() -> None:
        for holder, content in itertools.chain(*reversed(kept.values())):  # copies share theirs
            mode = {key: holder[key] for key in ("training",) if key in holder}  # set by the loss
            holder.clear()
            holder.update(content | mode)

    def reparametrize(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        copy_state(module, args)  # what functional_call puts in is no state of the module
        return reparametrized(module, *args, **kwargs)

    def refuse_checkpointing(*args: Any) -> None:
        raise UserError(CHECKPOINTING)

    with ExitStack() as stack:
        devices = {t.device.index for t in held.values() if t.is_cuda}
        stack.enter_context(torch.random.fork_rng(devices))
        stack.callback(put_back)
        stack.callback(register_module_forward_pre_hook(copy_state).remove)
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        for owner, name, value in (
            (torch.backends.mha, "_is_fastpath_enabled", False),  # it has no derivatives
            (nn.SyncBatchNorm, "forward", _BatchNorm.forward),
            (torch.utils.checkpoint.CheckpointFunction, "apply", refuse_checkpointing),
            (parametrize, "_cache", {}),  # of the parameters that are held now
            (stateless, "_reparametrize_module", reparametrize),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        if "torch._dynamo" in sys.modules:  # without it nothing is compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            stack.enter_context(_NoCollectives())
        try:
            with torch.autograd.graph.disable_saved_tensors_hooks(CHECKPOINTING):
                yield
        except RuntimeError as error:
            if CHECKPOINTING in str(error):
                raise UserError(CHECKPOINTING) from error
            raise


@contextmanager
def _no_own_gradient(method: Method) -> Iterator[None]:
    """Refuses a loss with a gradient in it: its second derivative is wrong for normalisations."""
    run = torch.autograd._engine_run_backward

    def refuse(*args: Any, **kwargs: Any) -> Any:
        if method == "exact" or args[3]:  # create_graph
            raise UserError(f"{method}: the loss takes a gradient of its own; {_others(method)}")
        return run(*args, **kwargs)

    with mock.patch.object(torch.autograd, "_engine_run_backward", refuse):
        yield


def _with_tangents(tree: Any) -> list[tuple[Tensor, bool]]:
    """The tensors that may have a tangent, but for those inside of a vmap, and whether each has."""
    tensors = [t for t in tree_leaves(tree) if isinstance(t, Tensor)]
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    floats = [t for t in tensors if t.is_floating_point() or t.is_complex()]
    return [(t, forward_ad.unpack_dual(t).tangent is not None) for t in floats if not wrapped(t)]


def _drops_a_tangent(func: Any, args: Any, kwargs: Any, outputs: list[tuple[Tensor, bool]]) -> bool:
    """Whether an output without a tangent depends, in reverse mode, on an input with one."""
    inputs = [] if all(has for _, has in outputs) else _with_tangents((args, kwargs))
    if not any(has for _, has in inputs):
        return False
    leaves = {id(t): t.detach().requires_grad_(has).clone() for t, has in inputs}
    args, kwargs = tree_map(lambda t: leaves.get(id(t), t), (args, kwargs))
    devices = {t.device.index for t, _ in inputs if t.is_cuda}
    with torch.random.fork_rng(devices), forward_ad._set_fwd_grad_enabled(False):
        again = _with_tangents(func(*args, **kwargs))
    return any(t.requires_grad and not has for (t, _), (_, has) in zip(again, outputs, strict=True))


class _Functions(TorchFunctionMode):
    """Each function that a loss calls, for its rounding and for its forward mode.

    ``eps`` is the coarsest rounding of these tensors and of what was computed, autocast included.
    What is computed where gradients are off is a constant, as it is in reverse mode. A function
    that drops a tangent is refused, one whose result would have a gradient in reverse mode.
    """

    def __init__(self, tensors: Iterable[Tensor]):
        super().__init__()
        self.eps = max(torch.finfo(t.dtype).eps for t in tensors)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            with forward_ad._set_fwd_grad_enabled(False):
                return func(*args, **kwargs)
        options = {k: v for k, v in kwargs.items() if v is not None}
        if func is F.mse_loss and options == {"reduction": "mean"}:
            # against a constant target, the forward mode of the mean's gradient fails
            result = func(*args, **{**kwargs, "reduction": "none"}).mean()
        elif func is torch._weight_norm:
            v, g, dim = (*args, 0)[:3]  # its kernel has no forward mode; this is its definition
            norm = v.norm() if dim == -1 else torch.norm_except_dim(v, 2, dim)
            result = v * (g / norm)
        else:
            result = func(*args, **kwargs)
        outputs = _with_tangents(result)
        self.eps = max([self.eps, *(torch.finfo(t.dtype).eps for t, _ in outputs)])
        if _drops_a_tangent(func, args, kwargs, outputs):
            raise UserError(
                f"exact: {resolve_name(func) or func} has no forward mode, so forward and "
                f"reverse mode give different derivatives of the loss; {_others('exact')}"
            )
        return result


class _NoCollectives(TorchDispatchMode):
    """Refuses a loss that exchanges tensors with other processes: its trial steps differ."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            raise UserError(
                f"the loss exchanges tensors between processes ({func.__name__}), which has no "
                "hypergradient: give the loss of this process alone, as nt_xent(..., gather=False)"
            )
        return func(*args, **(kwargs or {}))
