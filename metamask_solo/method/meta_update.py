"""The meta-update on ordinary modules: hypergradient, trial step of an optimiser.

Torch only. The method itself is in metamask.py, the mathematics in hypergradient.py.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from metamask_solo.errors import UserError
from metamask_solo.method.hypergradient import hypergradient
from metamask_solo.method.names import Method
from metamask_solo.method.processes import count_and_rank
from metamask_solo.method.trial import TrialStep

Masks = nn.Module | nn.Parameter


def mask_hypergradient(
    loss: Callable[[], Tensor],
    modules: nn.Module | Iterable[nn.Module],
    mask: Masks | Mapping[str, Masks],
    optimizer: torch.optim.Optimizer | TrialStep,
    method: Method = "exact",
    *,
    outer_loss: Callable[[], Tensor] | None = None,
    lr: float | None = None,
    momentum: bool = True,
    weight_decay: bool = True,
    radius: float = 1e-2,
    loss_scale: float = 1.0,
    check: bool = True,
) -> Any:
    """The hypergradient of a mask: derivative of the loss after the optimiser's next step.

    :func:`metamask_solo.hypergradient` on ordinary objects. While ``loss`` runs, the modules hold
    other parameters; after the call they hold their own, and nothing else has changed either.
    The trial step is a plain one: gradient clipping of the regular step has no part in it.

    Args:
        loss: calls the modules and the mask, and returns the scalar loss of the trial step.
        modules: what the trial step moves: every parameter that requires grad, but for the mask's.
        mask: a :class:`DimensionalMask` (any module with ``logits``), or a parameter of one of the
            modules; or several by name.
        optimizer: the optimiser whose next step on ``loss`` is the trial step; or a TrialStep, by
            the parameter names of ``nn.ModuleList(modules)``.
        method: see :func:`metamask_solo.hypergradient`; radius, loss_scale and check, too.
        outer_loss: the loss after the trial step, such as that of another batch; None: the same.
        lr: the trial step's rate; None: that of ``optimizer``, which has to be SGD then. 0: the
            plain gradient of the loss in the logits.
        momentum: whether SGD's momentum takes part.
        weight_decay: whether the optimiser's weight decay takes part.

    Returns:
        A tensor of the shape of the logits, or a dictionary of one for each mask.

    Raises:
        UserError: see :func:`metamask_solo.hypergradient`; or a parameter is in no group of the
            optimiser, or a module replaces its parameters or buffers while it is called.

    Example:
        >>> backbone, head, mask = nn.Linear(4, 3), nn.Linear(3, 2), DimensionalMask(3)
        >>> optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.1)
        >>> x = torch.randn(8, 4)
        >>> loss = lambda: head(mask(backbone(x))).square().mean()
        >>> mask_hypergradient(loss, [backbone, head], mask, optimizer).shape
        torch.Size([3])
    """
    parts = [modules] if isinstance(modules, nn.Module) else list(modules)
    given = dict(mask) if isinstance(mask, Mapping) else {"logits": mask}
    for part in [*parts, *given.values()]:
        if isinstance(part, nn.parallel.DistributedDataParallel | nn.DataParallel):
            raise UserError(f"modules: give {type(part).__name__}'s own module, its .module")
    for part in parts:
        if not isinstance(part, nn.Module):
            raise UserError(f"modules: holds a {type(part).__name__}; must hold modules alone")
    logits: dict[str, Any] = {name: getattr(m, "logits", m) for name, m in given.items()}
    own = nn.ModuleList([*parts, *(m for m in given.values() if isinstance(m, nn.Module))])
    for name, module in own.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UserError(
                f"modules: {name} is a TorchScript module, which cannot hold other parameters: "
                "give the module that it was made of"
            )
    names = {id(p): name for name, p in own.named_parameters()}
    for name, a in logits.items():
        if id(a) not in names:
            raise UserError(f"mask {name!r} is no module with logits, and no parameter of one")
    taken = {id(a) for a in logits.values()}
    params = {n: p for n, p in own.named_parameters() if p.requires_grad and id(p) not in taken}
    if isinstance(optimizer, TrialStep):
        trial = optimizer
    else:
        trial = trial_step(optimizer, params, lr, momentum, weight_decay)

    def pure(closure: Callable[[], Tensor]) -> Callable[[Mapping[str, Tensor], Any], Tensor]:
        def evaluate(p: Mapping[str, Tensor], a: Mapping[str, Tensor]) -> Tensor:
            swapped = {id(params[name]): t for name, t in p.items()}
            with _swapped(own, swapped | {id(logits[name]): t for name, t in a.items()}):
                return closure()

        return evaluate

    before = _contents(own)
    result = hypergradient(
        pure(loss),
        params,
        logits,
        trial,
        method,
        outer_loss_fn=None if outer_loss is None else pure(outer_loss),
        radius=radius,
        loss_scale=loss_scale,
        check=check,
    )
    for name, (tensor, version) in _contents(own).items():
        if before.get(name, (None, 0))[0] is not tensor or before[name][1] != version:
            raise UserError(f"modules: {name} changes when it is used, so no step can be undone")
    return result if isinstance(mask, Mapping) else result["logits"]


@contextmanager
def _swapped(own: nn.Module, tensors: Mapping[int, Tensor]) -> Iterator[None]:
    """Puts other tensors in the place of parameters, by their id, wherever they are held.

    (torch.func.functional_call leaves its own behind where one module stands under two names.)
    """
    places = [
        (module._parameters, name, p)
        for module in own.modules()
        for name, p in module._parameters.items()
        if id(p) in tensors
    ]
    try:
        for held, name, p in places:
            held[name] = tensors[id(p)]  # type: ignore[assignment]
        yield
    finally:
        for held, name, p in places:
            held[name] = p


def _contents(module: nn.Module) -> dict[str, tuple[Tensor, int]]:
    named = [*module.named_parameters(), *module.named_buffers()]
    # tensors of the inference mode have no version, and cannot be written to outside of it
    return {name: (t, 0 if t.is_inference() else t._version) for name, t in named}


def trial_step(
    optimizer: torch.optim.Optimizer,
    params: Mapping[str, Tensor],
    lr: float | None = None,
    momentum: bool = True,
    weight_decay: bool = True,
) -> TrialStep:
    """The optimiser's next step as a trial step; its state is read in place.

    Gradient clipping is no part of it: the trial step is that of the unclipped gradient.

    Args:
        optimizer: the optimiser of the regular step.
        params: the parameters of the trial step by name; each is in one group of the optimiser.
        lr: learning rate, or None for the one that ``optimizer`` has now (SGD only: another
            optimiser's rate means something else).
        momentum: whether SGD's momentum (with dampening and Nesterov's form) takes part. Other
            optimisers' buffers hold other things than gradients, so they never do.
        weight_decay: whether the optimiser's weight decay takes part.

    Raises:
        UserError: a parameter is in no group of the optimiser, the optimiser ascends
            (``maximize``), or ``lr`` is None and it is not SGD.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
        >>> trial_step(optimizer, dict(model.named_parameters())).nesterov
        True
    """
    if not hasattr(optimizer, "param_groups"):
        raise UserError(f"optimizer={optimizer!r}: must be an optimiser of torch, or a TrialStep")
    sgd = isinstance(optimizer, torch.optim.SGD)
    if lr is None and not sgd:
        raise UserError(
            f"lr=None: the rate of {type(optimizer).__name__} is not that of a gradient step; give "
            "a number"
        )
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, p in params.items():
        if id(p) not in groups:
            raise UserError(f"parameter {name!r} is in no group of the optimiser")
        if groups[id(p)].get("maximize", False):
            raise UserError("optimizer: maximize=True; a trial step descends")
    own = {name: groups[id(p)] for name, p in params.items()}

    def each(key: str, used: bool = True) -> Any:
        return _one_or_each({n: g.get(key, 0.0) if used else 0.0 for n, g in own.items()})

    moves = sgd and momentum
    buffers = {
        name: optimizer.state[p].get("momentum_buffer")
        for name, p in params.items()
        if moves and p in optimizer.state
    }
    return TrialStep(
        lr=each("lr") if lr is None else lr,
        momentum=each("momentum", moves),
        weight_decay=each("weight_decay", weight_decay),
        momentum_buffers=buffers,
        nesterov=each("nesterov", moves),
        dampening=each("dampening", moves),
    )


def _one_or_each(values: dict[str, Any]) -> Any:
    distinct = {value if isinstance(value, bool) else float(value) for value in values.values()}
    if len(distinct) == 1:
        return distinct.pop()
    return {n: v if isinstance(v, bool) else float(v) for n, v in values.items()}


def mean_over_processes(gradient: Tensor) -> Tensor:
    """The mean of ``gradient`` over the processes of a distributed run; itself otherwise."""
    processes, _ = count_and_rank()
    if processes == 1:
        return gradient
    total = gradient.clone()
    torch.distributed.all_reduce(total)
    return total / processes
