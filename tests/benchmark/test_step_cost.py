"""The timing command: its yardstick, its output and its errors."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from metamask_solo.__main__ import main
from metamask_solo.benchmark import step_cost
from metamask_solo.hosts import RELEASE

SMALL = step_cost.Setting(stem="standard", batch_size=4)


def _after_a_step(variant: str) -> dict[str, Any]:
    step, _ = step_cost._step_of(SMALL, variant)
    step()
    return _inside(step)


def _inside(function: Any) -> dict[str, Any]:
    """The variables of the surrounding function that a nested one uses."""
    return inspect.getclosurevars(function).nonlocals


def test_the_yardstick_computes_what_finite_difference_computes() -> None:
    """Both start from one seed, so after a step of each the masks agree: times can be compared."""
    ours, yardstick = (_after_a_step(name) for name in ("finite_difference", "two_models"))
    logits = ours["model"].mask.logits
    assert logits.abs().max() > 0
    torch.testing.assert_close(_inside(yardstick["update"])["logits"].detach(), logits.detach())


@pytest.mark.skipif(RELEASE == "1.0.2", reason="has no such backbone")
def test_a_backbone_without_a_stem_is_built() -> None:
    setting = step_cost.Setting(backbone="wide_resnet28w2")
    assert step_cost._config(setting, "simclr").backbone.name == "wide_resnet28w2"


def test_the_command_prints_a_table_and_writes_the_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cost.json"
    setting = ["--stem", "standard", "--batch-size", "4", "--rounds", "2"]
    assert not main(["step-cost", *setting, "--only", "heads", "--json", str(path)])

    report = json.loads(path.read_text())
    assert set(report["seconds"]) == {"joint", "heads"} == set(report["memory_mib"])
    assert all(len(seconds) == 2 for seconds in report["seconds"].values())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-2:]] == ["joint", "heads"]
    assert lines[-2].split()[1] == "1.00"


@pytest.mark.parametrize(
    "arguments", ["--backbone=resnet19", "--batch-size=0", "--rounds=0", "--device=cuda:77"]
)
def test_a_wrong_argument_is_named(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["step-cost", arguments]) == 2
    name, _, value = arguments.strip("-").replace("-", "_").partition("=")
    error = capsys.readouterr().err.replace("-", "_")
    assert name in error and value in error and error.count("\n") == 1
