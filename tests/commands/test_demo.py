"""The command ``metamask-solo demo``: the benchmark of demo.yaml."""

from pathlib import Path

import pytest

from metamask_solo.__main__ import main
from metamask_solo.benchmark.plan import read_plan
from metamask_solo.commands import benchmark


def test_demo_is_a_benchmark_of_one_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(benchmark, "main", lambda argv: commands.append(argv) or 0)
    out = tmp_path / "a b"
    arguments = ["--dataset=textured-digits", "--epochs=1", f"--out={out}"]
    assert main(["demo", *arguments, "optimizer.batch_size=16"]) == 0

    ((name, *keys),) = commands
    plan = read_plan(name, [*keys, "evaluations=[knn]"])
    methods = ["random", "pixels", "metamask", "simclr", "barlow_twins"]
    assert [(run.method, run.seed) for run in plan.runs] == [(method, 5) for method in methods]
    assert (plan.out, plan.file.data) == (out, "textured-digits")
    config = plan.runs[-1].config
    assert (config["max_epochs"], config["optimizer"]["batch_size"]) == (1, 16)
    assert config["data"]["train_path"] == str(out / "datasets/textured-digits/train")
