"""The command ``metamask-solo demo``: the benchmark of demo.yaml."""

from pathlib import Path

import pytest

from metamask_solo.__main__ import main
from metamask_solo.benchmark.plan import read_plan
from metamask_solo.benchmark.results import read_csv
from metamask_solo.commands import benchmark
from metamask_solo.hosts import RELEASE


@pytest.mark.parametrize("dataset", ["digits", "textured-digits"])
def test_demo_is_a_benchmark_of_one_seed(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(benchmark, "main", lambda argv: commands.append(argv) or 0)
    out = tmp_path / "a b"
    arguments = ["--dataset", dataset, "--epochs", "1", "--out", str(out)]
    assert main(["demo", *arguments, "optimizer.batch_size=16"]) == 0

    ((name, *keys),) = commands
    plan = read_plan(name, [*keys, "evaluations=[knn]"])
    methods = ["random", "pixels", "metamask", "simclr", "barlow_twins"]
    assert [(run.method, run.seed) for run in plan.runs] == [(method, 5) for method in methods]
    assert (plan.out, plan.file.data) == (out, dataset)
    config = plan.runs[-1].config
    assert (config["max_epochs"], config["optimizer"]["batch_size"]) == (1, 16)
    assert config["data"]["train_path"] == str(out / "datasets" / dataset / "train")
    # images that the package makes are known by their name, as those of the committed rows
    rows = read_csv(Path(__file__).parents[2] / "docs" / "results" / f"{dataset}.csv")
    known = {run.data_digest for run in plan.runs} == {*rows.data_digest}
    assert known == (RELEASE == "1.0.2")
