"""``performance.compile``: the backbone of the training and validation steps is compiled."""

from typing import Any

import torch

from metamask_solo.hosts import pl

# on one release or the other
BACKBONES = ("backbone", "encoder", "momentum_backbone", "momentum_encoder")


class CompiledBackbone(pl.Callback):  # type: ignore[name-defined]
    """Compiles the backbones in place; names in checkpoints stay as they are.

    Only what runs within a step is compiled: MetaMask's hypergradient differentiates the backbone
    forwards and twice, which compiled code cannot do.
    """

    def __init__(self) -> None:
        self.switches: list[_Switch] = []

    def setup(self, trainer: Any, model: Any, stage: str) -> None:
        found = {id(m): m for m in (getattr(model, name, None) for name in BACKBONES)}
        self.switches = [_Switch(m) for m in found.values() if isinstance(m, torch.nn.Module)]

    def on_train_batch_start(self, *_: Any) -> None:
        self._turn(True)

    def on_train_batch_end(self, *_: Any) -> None:  # the mask's update comes after it
        self._turn(False)

    def on_validation_batch_start(self, *_: Any) -> None:
        self._turn(True)

    def on_validation_batch_end(self, *_: Any) -> None:
        self._turn(False)

    def teardown(self, trainer: Any, model: Any, stage: str) -> None:
        for switch in self.switches:
            switch.module._compiled_call_impl = None
        self.switches = []

    def _turn(self, on: bool) -> None:
        for switch in self.switches:
            switch.on = on


class _Switch:
    """Stands where ``torch.nn.Module.compile`` puts its compiled call."""

    def __init__(self, module: torch.nn.Module):
        self.module = module
        self.on = False
        self.compiled = torch.compile(module._call_impl)
        module._compiled_call_impl = self  # type: ignore[assignment]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.compiled if self.on else self.module._call_impl
        return call(*args, **kwargs)


def compiler_failed(error: BaseException) -> bool:
    """Whether an error is that of torch's compiler: no C++ compiler, or code that it cannot do."""
    return any(kind.__module__.startswith("torch._dynamo") for kind in type(error).__mro__) or any(
        kind.__module__.startswith("torch._inductor") for kind in type(error).__mro__
    )
