"""Evaluations of a loss that start from one state, and leave it behind as it was.

A derivative that takes several evaluations of a loss is right only if all of them are of the same
function: the same dropout, the same running statistics, the same memory bank.
"""

import random
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.utils.checkpoint as checkpoint
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from metamask_solo.errors import UserError

# what every module has, beside its buffers no state of an evaluation
INTERNAL = frozenset(nn.Module().__dict__)
COPIED = (list, dict, deque)

SAVED_TENSOR_HOOKS = (
    "the loss uses saved-tensor hooks (activation checkpointing or offloading), which would "
    "compute again at other parameters: turn them off for the hypergradient"
)


class Repetition:
    """A block in which :meth:`rewind` brings back the state that it began with.

    - *Random numbers* of torch (CPU and the given tensors' GPUs), numpy and ``random``. Generators
      of the caller's own are not known here.
    - *Buffers, tensors, numbers, lists, dictionaries and queues* that are attributes of a module
      that is called, such as running statistics or a memory bank: the module works on copies until
      the next rewind.
    - SyncBatchNorm, which has no forward mode and would wait for the other processes, is an
      ordinary BatchNorm; activation checkpointing, whose second pass may come after the parameters
      were put back, is off; compiled modules run as they were written.

    Args:
        tensors: on the devices that the loss computes on.
    """

    def __init__(self, tensors: Iterable[Tensor]):
        self._gpus = {t.device for t in tensors if t.is_cuda}
        self._kept: dict[nn.Module, list[tuple[dict[str, Any], str, Any, Any]]] = {}
        self._copies: dict[int, Tensor] = {}

    def __enter__(self) -> "Repetition":
        self._random = self._random_state()
        with ExitStack() as stack:
            stack.callback(self.rewind)
            stack.callback(register_module_forward_pre_hook(self._shield).remove)
            for owner, name, value in (
                (nn.SyncBatchNorm, "forward", _BatchNorm.forward),
                (checkpoint.CheckpointFunction, "apply", lambda run, preserve, *args: run(*args)),
                (checkpoint, "_checkpoint_without_reentrant_generator", _no_checkpoint),
                (checkpoint, "_checkpoint_without_reentrant_generator_impl", _no_checkpoint),
            ):
                if hasattr(owner, name):
                    stack.enter_context(mock.patch.object(owner, name, value))
            # nothing is compiled without dynamo, whose import takes seconds
            if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            # the transformer's fast path has no derivatives of any kind
            stack.callback(
                torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled()
            )
            torch.backends.mha.set_fastpath_enabled(False)
            stack.enter_context(_no_saved_tensor_hooks())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    def rewind(self) -> None:
        """Brings back the state that the block began with."""
        cpu, gpus, own, numpys = self._random
        torch.set_rng_state(cpu)
        for device, state in gpus.items():
            torch.cuda.set_rng_state(state, device)
        random.setstate(own)
        if numpys is not None:
            sys.modules["numpy"].random.set_state(numpys)
        for module, kept in self._kept.items():
            for attributes, name, original, copy in kept:
                # another buffer than the copy was put there by functional_call
                if attributes is not module._buffers or attributes.get(name) is copy:
                    attributes[name] = original
        self._kept.clear()
        self._copies.clear()

    def noise_was_drawn(self) -> bool:
        """Whether random numbers of torch were drawn since the last rewind."""
        cpu, gpus, *_ = self._random_state()
        before = self._random
        return not torch.equal(cpu, before[0]) or any(
            not torch.equal(state, before[1][device]) for device, state in gpus.items()
        )

    def _random_state(self) -> tuple[Tensor, dict[torch.device, Tensor], Any, Any]:
        numpy = sys.modules.get("numpy")
        return (
            torch.get_rng_state(),
            {device: torch.cuda.get_rng_state(device) for device in self._gpus},
            random.getstate(),
            None if numpy is None else numpy.random.get_state(),
        )

    def _shield(self, called: nn.Module, args: Any) -> None:
        if called in self._kept:
            return
        for module in called.modules():  # some call forward of a part directly
            if module in self._kept:
                continue
            if isinstance(module, torch.jit.ScriptModule):
                if module.training and next(module.buffers(), None) is not None:
                    raise UserError(
                        "the loss calls a TorchScript module in training mode, whose buffers "
                        "cannot be kept: put it into evaluation mode"
                    )
                continue
            kept = self._kept[module] = []
            for attributes in (module._buffers, module.__dict__):
                for name, value in attributes.items():
                    if isinstance(value, Tensor):
                        copy: Any = self._copies.get(id(value))  # tied tensors stay tied
                        if copy is None:
                            copy = self._copies[id(value)] = value.clone()
                    elif name in INTERNAL:
                        continue
                    elif isinstance(value, list | dict | deque) and type(value) in COPIED:
                        copy = value.copy()
                    elif value is None or type(value) in (int, float, str, tuple):
                        copy = value  # None: made at the first call, perhaps
                    else:
                        continue
                    kept.append((attributes, name, value, copy))
                    attributes[name] = copy


class NoiseLayout(TorchDispatchMode):
    """Noise in one memory layout: the second block of this mode draws as the first one did.

    Random numbers fill a tensor in the order of its memory, and a network whose kernels differ
    between two passes can hold the same numbers in another order.
    """

    def __init__(self) -> None:
        super().__init__()
        self._strides: list[tuple[int, ...]] = []
        self._next: Iterator[tuple[int, ...]] | None = None

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._next = iter(self._strides)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        random_in = torch.Tag.nondeterministic_seeded in func.tags and args
        if not random_in or not isinstance(args[0], Tensor):
            return func(*args, **(kwargs or {}))
        x, *others = args
        if self._next is None:
            self._strides.append(x.stride())
            return func(*args, **(kwargs or {}))
        stride = next(self._next, x.stride())
        if stride == x.stride() or len(stride) != x.dim():
            return func(*args, **(kwargs or {}))
        like_before = x.new_empty_strided(x.shape, stride).copy_(x)
        result = func(like_before, *others, **(kwargs or {}))
        return x.copy_(result) if func._schema.is_mutable else result


def _no_checkpoint(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


@contextmanager
def _no_saved_tensor_hooks() -> Iterator[None]:
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(SAVED_TENSOR_HOOKS):
            yield
    except RuntimeError as error:
        if SAVED_TENSOR_HOOKS in str(error):
            raise UserError(SAVED_TENSOR_HOOKS) from error
        raise
