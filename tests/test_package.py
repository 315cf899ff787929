"""What importing the package does, and what it leaves to the first use."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import metamask_solo

PACKAGE = Path(metamask_solo.__file__).parent


def python(code: str, *, without_solo: bool = False) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` in a fresh process; ``without_solo`` makes solo-learn impossible to import."""
    hide = "import sys; sys.modules['solo'] = None; " if without_solo else ""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", hide + code], capture_output=True, text=True
    )


def test_importing_the_package_and_help_import_nothing_heavy() -> None:
    code = """
import sys, metamask_solo
from metamask_solo.__main__ import main
main(["--help"])
heavy = {"torch", "solo", "lightning", "pytorch_lightning", "numpy", "omegaconf", "pydantic"}
print("imported:", heavy & {*sys.modules})
main(["pretrain", "--help"])
print("imported:", heavy & {*sys.modules} - {"omegaconf", "pydantic"})
"""
    done = python(code)
    assert done.stdout.count("imported: set()\n") == 2, done.stdout + done.stderr


def test_the_method_registers_itself_after_solo_learn_too() -> None:
    """Before it: test_run.py."""
    done = python(
        "from solo.methods import METHODS; import metamask_solo; print(METHODS['metamask'])"
    )
    assert "metamask_solo.method.metamask.MetaMask" in done.stdout, done.stderr


def test_mask_and_hypergradient_need_no_solo_learn() -> None:
    code = """
import torch
from metamask_solo import DimensionalMask, hypergradient, nt_xent
mask = DimensionalMask(3)
loss = lambda p, a: nt_xent(p["w"] * torch.sigmoid(a), p["w"], 0.5)
step = lambda p, g: {"w": p["w"] - 0.1 * g["w"]}
print(hypergradient(loss, {"w": torch.randn(4, 3)}, mask.logits, step).shape)
"""
    done = python(code.strip(), without_solo=True)
    assert done.stdout.strip() == "torch.Size([3])", done.stderr


def test_a_missing_solo_learn_is_one_line() -> None:
    code = "from metamask_solo.__main__ import main; sys.exit(main(['knn', 'a.ckpt']))"
    done = python(code, without_solo=True)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "solo-learn" in line and "install" in line


def test_every_public_name_is_there_and_typed() -> None:
    for name in metamask_solo.__all__:
        assert getattr(metamask_solo, name).__module__.startswith("metamask_solo.")
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    typed = {
        alias.name
        for block in tree.body
        if isinstance(block, ast.If)
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert typed == set(metamask_solo.__all__)
    assert (PACKAGE / "py.typed").is_file()
    with pytest.raises(AttributeError, match="nothing"):
        _ = metamask_solo.nothing
