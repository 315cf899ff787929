"""A benchmark's YAML file: what it becomes, and what is refused before anything is written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metamask_solo.__main__ import main
from metamask_solo.benchmark.plan import read_plan

SCRIPTS = Path(__file__).parents[2] / "scripts" / "benchmark"
FILES = sorted(file.name for file in SCRIPTS.glob("*.yaml"))

SIMCLR = {"config": "simclr.yaml"}
WRONG: list[tuple[dict[str, Any], list[str], str]] = [
    ({"seed": 1}, [], "seed: unknown; allowed are name, out"),
    ({"name": ...}, [], "name=None"),
    ({"name": "a/b"}, [], "name=a/b"),
    ({"seeds": []}, [], "seeds=[]"),
    ({"seeds": [0, -1]}, [], "seeds=[0, -1]"),
    ({"seeds": [1, 1]}, [], "a seed occurs twice"),
    ({"seeds": [0.5]}, [], "seeds=[0.5]"),
    ({"epochs": 0}, [], "epochs=0"),
    ({}, ["epochs=many"], "epochs=many"),
    ({}, ["epochs"], "epochs: must be KEY=VALUE"),
    ({"evaluations": ["knn", "guess"]}, [], "must be a list of knn, linear"),
    ({"data": "mnist"}, [], "data=mnist: allowed are digits"),
    ({"data": {"train_path": "x"}}, [], "data.val_path: missing"),
    ({"data": {"train_path": "x", "val_path": "y"}}, [], "data.train_path="),
    ({"methods": {}}, [], "methods: missing"),
    ({"methods": {"a b": SIMCLR}}, [], "methods.a b"),
    ({"methods": {"simclr": "simclr.yaml"}}, [], "must be a mapping with config"),
    ({"methods": {"simclr": {}}}, [], "methods.simclr.config: missing"),
    ({"methods": {"simclr": {**SIMCLR, "seed": 1}}}, [], "methods.simclr.seed: unknown"),
    ({"methods": {"simclr": {"config": "no.yaml"}}}, [], "methods.simclr.config=no.yaml: no such"),
    ({"reference": "vicreg"}, [], "reference=vicreg: allowed are simclr, metamask"),
    ({"overrides": ["seed=3"]}, [], "overrides: seed is set by the benchmark's own key seeds"),
    ({"overrides": ["++max_epochs=3"]}, [], "own key epochs"),
    ({"overrides": "lr=3"}, [], "overrides=lr=3: must be a list"),
    ({"overrides": ["optimizer.rate=3"]}, [], "methods.simclr: "),
    ({"overrides": ["optimizer.lr=-3"]}, [], "methods.simclr: optimizer.lr=-3"),
    ({"overrides": ["method=simsalabim"]}, [], "methods.simclr: method=simsalabim: allowed"),
    ({"overrides": ["+method_kwargs.alfa=3"]}, [], "methods.metamask: method_kwargs.alfa"),
    ({"overrides": ["data.val_path=null"], "data": ...}, [], "data.val_path"),
    ({"search": {"optimizer.lr": 0.1}}, [], "search.optimizer.lr=0.1: must be a list"),
    ({"search": {"optimizer.rate": [0.1]}}, [], "search: optimizer.rate is not in simclr.yaml"),
    ({"search": {"seed": [1]}}, [], "own key seeds"),
    ({"launcher": "cluster"}, [], "launcher=cluster: "),
    ({"launcher": {"name": "joblib", "jobs": 2}}, [], "launcher=joblib: "),
    ({"keep_checkpoints": "no"}, [], "keep_checkpoints=no"),
]


@pytest.mark.parametrize(("keys", "overrides", "message"), WRONG)
def test_a_wrong_file_is_one_line_and_nothing_is_written(
    keys: dict[str, Any],
    overrides: list[str],
    message: str,
    benchmark_file: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if keys.get("overrides") == ["+method_kwargs.alfa=3"]:  # solo-learn's methods take any
        keys = {**keys, "methods": {"metamask": {"config": "metamask.yaml"}}}
    file = benchmark_file(**keys)
    before = sorted(tmp_path.rglob("*"))

    assert main(["benchmark", str(file), *overrides]) == 2

    error = capsys.readouterr().err
    assert error.startswith("metamask-solo benchmark: error: ") and error.count("\n") == 1
    assert message in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("content", [None, "- a\n", "a: [", "\x00\x01"])
def test_an_unreadable_file_is_one_line(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bench.yaml"
    if content is not None:
        file.write_text(content)

    assert main(["benchmark", str(file)]) == 2

    error = capsys.readouterr().err
    assert str(file) in error and error.count("\n") == 1


def test_methods_times_seeds(benchmark_file: Callable[..., Path], tmp_path: Path) -> None:
    methods = {
        "simclr": {"config": "simclr.yaml", "overrides": ["optimizer.weight_decay=0.5"]},
        "metamask": {"config": "metamask.yaml"},
    }
    file = benchmark_file(methods=methods, overrides=["optimizer.weight_decay=0.25"], epochs=7)

    plan = read_plan(file, ["seeds=[3,4]"])

    names = [(run.method, run.seed) for run in plan.runs]
    assert names == [("simclr", 3), ("metamask", 3), ("simclr", 4), ("metamask", 4)]
    assert [run.config["seed"] for run in plan.runs] == [3, 3, 4, 4]
    decays = [run.config["optimizer"]["weight_decay"] for run in plan.runs]
    assert decays == [0.5, 0.25, 0.5, 0.25]  # a method's own overrides come last
    assert {run.config["max_epochs"] for run in plan.runs} == {7}
    assert len({run.folder for run in plan.runs}) == 4
    assert {run.config["checkpoint"]["dir"] for run in plan.runs} == {
        str(run.folder / "training") for run in plan.runs
    }


def test_a_search_is_every_combination(benchmark_file: Callable[..., Path]) -> None:
    search = {"search": {"method_kwargs.temperature": [0.1, 0.2], "optimizer.lr": [2.0]}}
    methods = {
        "simclr": {"config": "simclr.yaml", **search},
        "metamask": {"config": "metamask.yaml"},
    }
    file = benchmark_file(methods=methods, search={"optimizer.lr": [0.1, 0.3]}, seeds=[0])

    plan = read_plan(file, [])

    assert [run.variant for run in plan.runs] == [
        "simclr optimizer.lr=2.0 method_kwargs.temperature=0.1",
        "simclr optimizer.lr=2.0 method_kwargs.temperature=0.2",
        "metamask optimizer.lr=0.1",
        "metamask optimizer.lr=0.3",
    ]
    assert [run.config["optimizer"]["lr"] for run in plan.runs] == [2.0, 2.0, 0.1, 0.3]
    assert plan.searched


def test_the_digest_is_that_of_what_decides_the_result(
    benchmark_file: Callable[..., Path], tmp_path: Path
) -> None:
    file = benchmark_file(seeds=[0])

    def digests(*overrides: str) -> list[str]:
        return [run.digest for run in read_plan(file, list(overrides)).runs]

    first = digests()
    assert len(set(first)) == 2
    assert digests() == first
    assert digests(f"out={tmp_path / 'other'}") == first  # another place, the same runs
    assert digests("launcher=joblib", "name=x", "seeds=[0]") == first
    assert not set(digests("epochs=2")) & set(first)
    assert not set(digests("overrides=[optimizer.lr=0.4]")) & set(first)
    assert not set(digests("evaluations=[knn]")) & set(first)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_the_files_of_the_repository_are_good(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # no data set is there yet
    plan = read_plan(SCRIPTS / name, [])

    assert plan.out == tmp_path / "benchmarks" / Path(name).stem
    assert plan.data == Path(name).stem.replace("_search", "-search").replace("smoke", "digits")
    assert plan.searched == name.endswith("_search.yaml")
    assert len(plan.runs) == len({run.folder for run in plan.runs})
    names = {run.config["name"] for run in plan.runs}
    assert len(names) == len(plan.methods)
    assert not list(tmp_path.iterdir())
