"""A benchmark's YAML file: what it becomes, and what is refused before anything is written."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metamask_solo.__main__ import main
from metamask_solo.benchmark.file import EVALUATIONS, read_file
from metamask_solo.benchmark.plan import read_plan
from metamask_solo.errors import UserError
from metamask_solo.hosts import RELEASE

SCRIPTS = Path(__file__).parents[2] / "scripts" / "benchmark"
FILES = sorted(file.name for file in SCRIPTS.glob("*.yaml"))

SIMCLR = {"config": "simclr.yaml"}
METAMASK = {"config": "metamask.yaml"}
WRONG: list[tuple[dict[str, Any], list[str], str]] = [
    ({"seed": 1}, [], "seed: unknown setting; did you mean seeds?"),
    ({"evalutions": ["knn"]}, [], "evalutions: unknown setting; did you mean evaluations?"),
    ({"name": ...}, [], "name: missing; give it a word of letters"),
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
    ({"methods": {1: SIMCLR}}, [], "methods.1={'config': 'simclr.yaml'}: a name is made of"),
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
    ({"search": {"optimizer.lr": [[0.1]]}}, [], "search.optimizer.lr=[[0.1]]: must be a list"),
    ({"search": {"optimizer.rate": [0.1]}}, [], "search: optimizer.rate is not in simclr.yaml"),
    ({"search": {"seed": [1]}}, [], "own key seeds"),
    ({}, ["search.seed=[1]"], "own key seeds"),
    ({}, ["search.optimizer.lr=0.1"], "must be a mapping of keys to lists of values"),
    ({}, ["overrides+=5"], "overrides+=5: += adds a list to a list"),
    ({}, ["name+=[a]"], "name+=[a]: += adds a list to a list"),
    ({}, ["only=simclr"], "only=simclr: must be a list of methods, such as [simclr]"),
    ({}, ["only=[simclr]", "methods.simclr.seeds=[7]"], "methods.simclr.seeds=[7]: none of them"),
    ({"launcher": "cluster"}, [], "launcher=cluster: "),
    ({"launcher": {"name": "joblib", "jobs": 2}}, [], "launcher=joblib: "),
    ({"keep_checkpoints": "no"}, [], "keep_checkpoints=no"),
    ({"references": ["noise"]}, [], "references=['noise']: must be a list of random, pixels"),
    ({"references": ["random"], "methods": {"random": SIMCLR}}, [], "methods.random: the name of"),
    ({"noise_floor": ["simclr"]}, [], "noise_floor=['simclr']: must be two of simclr, metamask"),
    ({"noise_floor": ["simclr", "simclr"]}, [], "noise_floor="),
    ({"comparisons": [["simclr", "byol"]]}, [], "comparisons: ['simclr', 'byol'] must be two of"),
    ({"comparisons": [["simclr", "metamask"], ["metamask", "simclr"]]}, [], "is there twice"),
    ({"rows": 3}, [], "rows=3: must be the path of a CSV file"),
    ({"only": ["byol"]}, [], "only=['byol']: must be a list of simclr, metamask"),
    ({"methods": {"simclr": {**SIMCLR, "seeds": [-1]}}}, [], "methods.simclr.seeds=[-1]"),
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


def test_searched_values_keep_their_types(benchmark_file: Callable[..., Path]) -> None:
    """A digest is one of them: 1 is neither 1.0 nor true."""
    values = [1, 1.0, True, "1", None, 1e-3]
    (found,) = read_file(benchmark_file(search={"key": values}), []).search.values()
    assert [repr(value) for value in found] == [repr(value) for value in values]


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
    assert plan.file.searched


@pytest.mark.slow
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


def test_the_digest_of_a_config_is_of_all_but_the_seed(
    benchmark_file: Callable[..., Path], images: Path, tmp_path: Path
) -> None:
    file = benchmark_file(
        methods={"simclr": SIMCLR}, seeds=[0, 1], references=["random"], evaluations=["knn"]
    )

    def digests(*overrides: str) -> list[str]:
        return [run.config_digest for run in read_plan(file, list(overrides)).runs]

    random, other_random, simclr, other = first = digests()
    assert random == other_random != simclr == other
    assert digests("seeds=[0,7]", f"out={tmp_path / 'other'}") == first
    assert digests("evaluations=[knn,linear]") == first
    assert not {*digests("overrides=[optimizer.lr=0.4]")[2:]} & {*first}
    assert all(text.isdecimal() for text in first)  # older versions read no other column
    # other data are another config; and the digest of a run is what it ever was
    runs = read_plan(file, []).runs
    known = {
        "evaluations": {"knn": EVALUATIONS["knn"]},
        "solo-learn": RELEASE,
    }
    files = {}
    for split in ("train", "val"):
        paths = sorted(path for path in (images / split).rglob("*") if path.is_file())
        text = "".join(f"{p.relative_to(images / split)} {p.stat().st_size}\n" for p in paths)
        files[f"{split}_path"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    for run in runs:
        config = {**run.config, "data": {**run.config["data"], **files}}
        config["checkpoint"] = {k: v for k, v in config["checkpoint"].items() if k != "dir"}
        text = json.dumps({"config": config, **known}, sort_keys=True)
        assert run.digest == hashlib.sha256(text.encode()).hexdigest()[:12]
    copy = tmp_path / "copy"
    shutil.copytree(images, copy)
    next((copy / "val").rglob("*.png")).unlink()
    elsewhere = [f"data.{split}_path={copy / split}" for split in ("train", "val")]
    assert not {*digests(*elsewhere)} & {*first}


def test_the_place_of_the_data_does_not_matter_but_what_they_are_does(
    benchmark_file: Callable[..., Path], images: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(images, copy)
    file = benchmark_file(seeds=[0], references=["random", "pixels"])
    elsewhere = [f"data.{split}_path={copy / split}" for split in ("train", "val")]

    def digests() -> tuple[list[str], list[str]]:
        plans = [read_plan(file, overrides) for overrides in ([], elsewhere)]
        assert plans[1].runs[2].config["data"]["train_path"] == str(copy / "train")
        return tuple([run.digest for run in plan.runs] for plan in plans)  # type: ignore[return-value]

    here, there = digests()
    assert here == there and len(set(here)) == 4
    next((copy / "val").rglob("*.png")).unlink()
    here, there = digests()
    assert not set(here) & set(there)


def test_class_folders_instead_of_torchvisions_files(
    benchmark_file: Callable[..., Path], images: Path, tmp_path: Path
) -> None:
    """The same benchmark takes both; solo-learn is told which."""
    own = {"methods": {"simclr": {**SIMCLR, "overrides": ["data.dataset=cifar10"]}}}

    def dataset(*overrides: str) -> str:
        (run,) = read_plan(benchmark_file(seeds=[0], **own), list(overrides)).runs
        return str(run.config["data"]["dataset"])

    assert dataset() == "custom"
    (tmp_path / "root" / "cifar-10-batches-py").mkdir(parents=True)
    paths = [f"data.{split}_path={tmp_path / 'root'}" for split in ("train", "val")]
    assert dataset(*paths) == "cifar10"
    with pytest.raises(UserError, match="data.train_path=.*: holds no class folder"):
        (tmp_path / "empty").mkdir()
        dataset(*(f"data.{split}_path={tmp_path / 'empty'}" for split in ("train", "val")))


@pytest.mark.slow
def test_references_seeds_and_only(benchmark_file: Callable[..., Path]) -> None:
    methods = {"simclr": SIMCLR, "metamask": {"config": "metamask.yaml", "seeds": [1]}}
    file = benchmark_file(methods=methods, references=["pixels", "random"], seeds=[0, 1])

    def runs(*overrides: str) -> list[tuple[str, int]]:
        return [(run.method, run.seed) for run in read_plan(file, list(overrides)).runs]

    references = [("random", 0), ("random", 1), ("pixels", 0)]
    assert runs() == [*references, ("simclr", 0), ("simclr", 1), ("metamask", 1)]
    assert runs("only=[metamask]") == [*references, ("metamask", 1)]
    assert runs("only=[]") == references
    # an epoch more of the methods is nothing to them
    before = {run.digest for run in read_plan(file, []).runs[:3]}
    assert {run.digest for run in read_plan(file, ["epochs=9"]).runs[:3]} == before
    assert {run.digest for run in read_plan(file, ["only=[metamask]"]).runs[:3]} == before


def test_each_comparison_is_counted_once(benchmark_file: Callable[..., Path]) -> None:
    names = ("simclr", "joint", "fixed_mask", "metamask")
    file = benchmark_file(methods={name: METAMASK for name in names})

    def found(**keys: Any) -> list[tuple[str, str]]:
        return read_file(file, [f"{key}={value}" for key, value in keys.items()]).pairs

    # a mask that stays is the joint losses: its comparison would be another's once more
    assert found() == [("metamask", "simclr"), ("metamask", "joint")]
    assert found(reference="fixed_mask") == [("fixed_mask", "simclr"), ("fixed_mask", "metamask")]
    assert found(noise_floor="[simclr,joint]") == [
        ("metamask", "simclr"),
        ("metamask", "fixed_mask"),
    ]
    assert found(comparisons="[[joint,simclr]]") == [("joint", "simclr")]


@pytest.mark.slow
def test_the_report_tells_which_baselines_several_processes_change(
    benchmark_file: Callable[..., Path],
) -> None:
    overrides = ["method=barlow_twins", "~method_kwargs.temperature"]
    methods = {
        "barlow": {"config": "simclr.yaml", "overrides": overrides},
        "metamask": METAMASK,
    }

    def notes(devices: str) -> list[str]:
        return read_plan(
            benchmark_file(methods=methods, overrides=[f"devices={devices}"]), []
        ).notes

    assert notes("1") == notes("[0]") == []
    for devices in ("2", "[0,1]"):
        (note,) = notes(devices)
        assert note.startswith("barlow: with several processes, solo-learn's gradient")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FILES if name != "custom.yaml"])  # needs images
def test_the_files_of_the_repository_are_good(
    name: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # no data set is there yet
    # class folders are looked at, and must be there
    folders = [f"data.{split}_path={images / split}" for split in ("train", "val")]
    plan = read_plan(SCRIPTS / name, folders if name == "imagenet-100.yaml" else [])

    assert plan.out == tmp_path / (
        "demo" if name == "demo.yaml" else f"benchmarks/{Path(name).stem}"
    )
    if "digits" in name:
        assert plan.file.data == Path(name).stem.replace("_search", "-search")
    assert plan.file.searched == name.endswith("_search.yaml")
    assert len(plan.runs) == len({run.folder for run in plan.runs})
    assert not list(tmp_path.iterdir())
    if "digits" not in name and name != "demo.yaml" and not plan.file.searched:
        assert plan.file.floor == ("joint", "fixed_mask")
        assert plan.file.shown[:2] == ["random", "pixels"]
        methods = {
            run.method: run.config["method_kwargs"]
            for run in plan.runs
            if run.method in ("joint", "fixed_mask")
        }
        found = [{**methods[m], "mask": None} for m in plan.file.floor]
        assert found[0] == found[1]
        assert not found[0]["meta"]["enabled"]
