"""``performance.compile``: the steps' backbone is compiled, and the result is the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import pretrain_config, train

from metamask_solo.errors import UserError
from metamask_solo.training.compiling import compiler_failed


def test_the_steps_are_compiled_and_the_masks_update_is_not(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _ = train(pretrain_config(images, tmp_path / "plain"))
    called: list[bool] = []

    def compile_to_itself(function: Any) -> Any:
        def compiled(*args: Any) -> Any:
            # forward-mode derivatives are what compiled code cannot do
            called.append(torch.autograd.forward_ad._current_level >= 0)
            return function(*args)

        return compiled

    monkeypatch.setattr(torch, "compile", compile_to_itself)
    cfg = pretrain_config(images, tmp_path / "compiled", performance={"compile": True})
    model, _ = train(cfg)
    # two views in each of two steps, and one batch of validation images
    assert called == [False] * 5
    own, other = plain.state_dict(), model.state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)


def test_a_compiler_that_fails_is_one_line(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.exc import TorchDynamoException

    class NoCompiler(TorchDynamoException):
        pass

    NoCompiler.__module__ = "torch._inductor.exc"

    def fail(function: Any) -> Any:
        def compiled(*args: Any) -> Any:
            raise NoCompiler("No working C++ compiler found")

        return compiled

    monkeypatch.setattr(torch, "compile", fail)
    cfg = pretrain_config(images, tmp_path, performance={"compile": True})
    with pytest.raises(UserError, match="performance.compile=True.*No working C.. compiler"):
        train(cfg)
    assert not compiler_failed(RuntimeError("other"))
