"""Forward mode through a network that a backward pass has just been through, for less.

Forward mode computes, beside each value, its derivative along a direction. The gradient at the same
parameters needed the same values: a :class:`Tape` keeps those that are dear, the outputs of
convolutions and matrix products, a third of the work of the pass. Batch normalisation gets a rule
that is one kernel where PyTorch's is a dozen. What a graph of the logits goes through is left to
PyTorch.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# called as (input, weight, bias, …), linear in the input and in (weight, bias)
LINEAR_MAPS = (F.linear, torch.conv1d, torch.conv2d, torch.conv3d)


class Tape:
    """The outputs of the linear maps of one pass, in order, for a second pass over the same data.

    The second pass uses an output only where it meets the same map with the same weight in the
    same place, nothing has written to the output, and no graph begins before it; it computes the
    others again.

    Attributes:
        reused: how many outputs were used.
        differences: of each, how far the map's input was from that of the first pass, relative.
            (The values of the second pass say little of that: they come from those outputs.)
    """

    def __init__(self) -> None:
        self._kept: list[tuple[Any, int, int, Tensor, Tensor]] = []
        self._differentiates = False
        self.differences: list[Tensor] = []
        self.reused = 0

    @contextmanager
    def record(self) -> Iterator[None]:
        """Keeps the outputs of the linear maps that are called inside the block."""
        rules: dict[Any, Any] = {linear_map: self._record for linear_map in LINEAR_MAPS}
        with _Intercept(rules | {torch.autograd.grad: self._note_gradient}):
            yield

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Inside the block, dual numbers pass linear maps by what was kept, the oldest first.

        What is computed where gradients are switched off within the block is a constant of the
        reverse mode, and so it is here: it has no derivative.
        """
        self._kept.reverse()
        rules: dict[Any, Any] = {linear_map: self._replay for linear_map in LINEAR_MAPS}
        rules |= {F.batch_norm: _batch_norm, torch._weight_norm: _weight_norm}
        if self._differentiates:
            rules |= dict.fromkeys((F.batch_norm, F.instance_norm, F.layer_norm), _no_third)
        with _Intercept(rules, constants=torch.is_grad_enabled()):
            yield
        self._kept.clear()

    def _record(self, linear_map: Any, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = linear_map(*args, **kwargs)
        if len(args) > 2 and not kwargs:
            kept = output.detach()
            part = args[0].detach()[:1].clone()
            self._kept.append((linear_map, args[1].data_ptr(), kept._version, kept, part))
        return output

    def _note_gradient(self, grad: Any, *args: Any, **kwargs: Any) -> Any:
        self._differentiates = self._differentiates or bool(kwargs.get("create_graph"))
        return grad(*args, **kwargs)

    def _replay(self, linear_map: Any, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) < 3 or kwargs or not self._kept:
            return linear_map(*args, **kwargs)  # type: ignore[no-any-return]
        (x, dx), (weight, dweight) = (forward_ad.unpack_dual(t) for t in args[:2])
        bias = None if args[2] is None else forward_ad.unpack_dual(args[2])
        same_map, pointer, version, output, part = self._kept.pop()
        same = same_map is linear_map and pointer == weight.data_ptr()
        same = same and x.shape[1:] == part.shape[1:]
        if not same or output._version != version or dx is None and dweight is None:
            return linear_map(*args)  # type: ignore[no-any-return]
        if any(isinstance(t, Tensor) and t.requires_grad for t in args[:3]):
            return linear_map(*args)  # type: ignore[no-any-return]
        self.reused += 1
        off = torch.linalg.vector_norm(x[:1] - part)
        self.differences.append(off / torch.linalg.vector_norm(part).clamp_min(1e-6))
        parts = []
        if dx is not None:
            parts.append(linear_map(dx, weight, None, *args[3:]))
        if dweight is not None:
            parts.append(linear_map(x, dweight, None, *args[3:]))
        tangent = parts[0] if len(parts) == 1 else parts[0].add_(parts[1])
        if bias is not None and bias.tangent is not None:
            beyond = 0 if linear_map is F.linear else weight.dim() - 2
            tangent += bias.tangent.reshape(-1, *[1] * beyond)
        return forward_ad.make_dual(output, tangent)


def _batch_norm(
    function: Callable[..., Tensor],
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Batch normalisation of dual numbers by batch statistics.

    Its derivative in the input is a symmetric matrix, so the kernel of the backward pass also
    gives the derivative along a direction.
    """
    x0, dx = forward_ad.unpack_dual(x)
    if not training or weight is None or bias is None or dx is None or x.requires_grad:
        return function(x, running_mean, running_var, weight, bias, training, momentum, eps)
    (scale, dscale), (shift, dshift) = (forward_ad.unpack_dual(t) for t in (weight, bias))
    output, mean, inverse_std = torch.native_batch_norm(
        x0, scale, shift, running_mean, running_var, True, momentum, eps
    )
    tangent = torch.ops.aten.native_batch_norm_backward(
        dx, x0, scale, None, None, mean, inverse_std, True, eps, [True, False, False]
    )[0]
    for_channels = [1, -1] + [1] * (x0.dim() - 2)
    if dscale is not None:
        slope = dscale * inverse_std
        tangent += (x0 * slope.view(for_channels)).sub_((slope * mean).view(for_channels))
    if dshift is not None:
        tangent += dshift.view(for_channels)
    return forward_ad.make_dual(output, tangent)


def _no_third(function: Any, *args: Any, **kwargs: Any) -> Tensor:
    raise RuntimeError(
        f"PyTorch's forward mode is wrong in a loss with gradients of {function.__name__}"
    )


def _weight_norm(function: Any, v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Weight normalisation by its definition; PyTorch's kernel has no forward mode."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


class _Intercept(TorchFunctionMode):
    """Calls rules[function](function, …) in place of the functions that have a rule.

    Args:
        rules: function to rule.
        constants: whether what is computed where gradients are off has no derivative.
    """

    def __init__(self, rules: dict[Any, Callable[..., Tensor]], constants: bool = False):
        super().__init__()
        self.rules = rules
        self.constants = constants

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self.constants and not torch.is_grad_enabled():
            with forward_ad._set_fwd_grad_enabled(False):
                return func(*args, **(kwargs or {}))
        rule = self.rules.get(func)
        if rule is None:
            return func(*args, **(kwargs or {}))
        return rule(func, *args, **(kwargs or {}))


def is_gap(error: Exception) -> bool:
    """Whether PyTorch says that an operation has no forward mode."""
    return isinstance(error, NotImplementedError) and "forward AD" in str(error)


def what_failed(error: Exception) -> str:
    """The operation that lacks a derivative, and the module in which it was called."""
    operation = re.search(r"forward AD with (\S+) that does not", str(error))
    module, trace = None, error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        module = owner if isinstance(owner, nn.Module) else module
        trace = trace.tb_next
    where = "" if module is None else f" in {type(module).__name__}"
    if operation:
        return f"{operation[1]}{where} has no forward mode in PyTorch"
    return f"fails{where} ({(str(error) or repr(error)).splitlines()[0]})"
