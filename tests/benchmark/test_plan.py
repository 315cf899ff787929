"""A benchmark's YAML file: what it becomes, and what is refused before anything is written."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metamask_solo.__main__ import main
from metamask_solo.benchmark import worker
from metamask_solo.benchmark.plan import compose_method, read_plan
from metamask_solo.benchmark.schema import read_file
from metamask_solo.errors import UserError

pytestmark = pytest.mark.usefixtures("small_backbone")
SCRIPTS = Path(__file__).parents[2] / "scripts" / "benchmark"
SIMCLR, METAMASK = {"config": "simclr.yaml"}, {"config": "metamask.yaml"}
WRONG: list[tuple[dict[str, Any], list[str], str]] = [
    ({"seed": 1}, [], "seed: unknown setting; did you mean seeds?"),
    ({"seeds": [1, 1]}, [], "a seed occurs twice"),
    ({"methods": ["simclr"]}, [], "methods=['simclr']: "),
    ({}, ["epochs"], "epochs: must be KEY=VALUE"),
    ({"data": "mnist"}, [], "data=mnist: no such folder; allowed are digits"),
    ({"data": {"train_path": "x", "val_path": "y"}}, [], "data.train_path="),
    ({"methods": {"simclr": {"config": "no.yaml"}}}, [], "simclr: no.yaml: no such file; the pack"),
    ({"methods": {"random": SIMCLR}}, [], "methods.random: this name is reserved"),
    ({"baseline": "vicreg"}, [], "baseline=vicreg: allowed are simclr, metamask"),
    ({}, ["overrides+=[max_epochs=3]"], "max_epochs is set by the benchmark's own key epochs"),
    ({"overrides": ["optimizer.lr=-3"]}, [], "methods.simclr: optimizer.lr=-3"),
    ({"overrides": ["optimizer.batch_size=1000"]}, [], "there are only 20 training images"),
    ({"search": {"optimizer.rate": [0.1]}}, [], "search: optimizer.rate is not in simclr.yaml"),
    ({}, ["only=[simclr]", "methods.simclr.seeds=[7]"], "no method has any of these seeds"),
    ({"launcher": {"name": "joblib", "jobs": 2}}, [], "launcher=joblib: "),
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
    file = benchmark_file(**keys)
    before = sorted(tmp_path.rglob("*"))

    assert main(["benchmark", str(file), *overrides]) == 2

    error = capsys.readouterr().err
    assert error.startswith("metamask-solo benchmark: error: ") and error.count("\n") == 1
    assert message in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("content", ["- a\n", "a: [", "\x00\x01"])
def test_an_unreadable_file_is_one_line(content: str, tmp_path: Path) -> None:
    file = tmp_path / "bench.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=r"bench.yaml: [^\n]*$"):
        read_file(file, [])


def test_packaged_files_are_known_by_name() -> None:
    expected = read_file(SCRIPTS / "cifar10_small.yaml", [])
    package = "pkg://metamask_solo"
    for name in (
        *("cifar10_small", "cifar10_small.yaml", f"{package}.scripts.benchmark.cifar10_small"),
        f"{package}/scripts/benchmark/cifar10_small.yaml",
    ):
        assert read_file(name, []) == expected


def test_methods_times_seeds_and_whose_overrides_win(
    benchmark_file: Callable[..., Path], tmp_path: Path
) -> None:
    methods = {
        "simclr": {**SIMCLR, "overrides": ["optimizer.weight_decay=0.5"]},
        "metamask": {**METAMASK, "seeds": [4]},
    }
    keys: dict[str, Any] = {"methods": methods, "overrides": ["optimizer.weight_decay=0.25"]}
    file = benchmark_file(**keys, untrained=["pixels", "random"])

    def runs(*overrides: str) -> list[tuple[str, int, Any]]:
        planned = read_plan(file, ["seeds=[3,4]", *overrides]).runs
        decays = [run.config.get("optimizer", {}).get("weight_decay") for run in planned]
        return [(run.method, run.seed, d) for run, d in zip(planned, decays, strict=True)]

    untrained = [("random", 3, None), ("random", 4, None), ("pixels", 3, None)]
    simclr = [("simclr", 3, 0.5), ("simclr", 4, 0.5)]
    assert runs() == [*untrained, *simclr, ("metamask", 4, 0.25)]
    assert runs("only=[metamask]") == [*untrained, ("metamask", 4, 0.25)]
    assert runs("only=[]") == untrained
    # on a command line they reach every method
    last = [("simclr", 3, 0.125), ("simclr", 4, 0.125), ("metamask", 4, 0.125)]
    assert runs("overrides+=[optimizer.weight_decay=0.125]") == [*untrained, *last]
    assert runs("overrides=[optimizer.weight_decay=0.125]") == [*untrained, *last]
    # a method that the command line adds is wanted
    file = benchmark_file(**keys, only=[])
    mine = f"methods.mine.config={tmp_path / 'simclr.yaml'}"
    assert runs(mine) == [("mine", 3, 0.25), ("mine", 4, 0.25)]


def test_a_search_is_every_combination(benchmark_file: Callable[..., Path]) -> None:
    search = {"search": {"method_kwargs.temperature": [0.1, 0.2], "optimizer.lr": [2.0]}}
    file = benchmark_file(
        methods={"simclr": {**SIMCLR, **search}, "metamask": METAMASK},
        search={"optimizer.lr": [0.1]},
        seeds=[0],
    )
    runs = read_plan(file, ["search.optimizer.weight_decay=[0.5]"]).runs
    assert [str(run) for run in runs] == [
        f"{setting}, seed 0"
        for setting in (
            "simclr optimizer.lr=2.0 optimizer.weight_decay=0.5 method_kwargs.temperature=0.1",
            "simclr optimizer.lr=2.0 optimizer.weight_decay=0.5 method_kwargs.temperature=0.2",
            "metamask optimizer.lr=0.1 optimizer.weight_decay=0.5",
        )
    ]
    assert runs[1].config["method_kwargs"]["temperature"] == 0.2


@pytest.mark.slow
def test_a_run_is_known_by_what_decides_its_result(
    benchmark_file: Callable[..., Path], images: Path, tmp_path: Path
) -> None:
    file = benchmark_file(seeds=[0], untrained=["random"])

    def digests(*overrides: str) -> list[str]:
        return [run.digest for run in read_plan(file, list(overrides)).runs]

    first = digests()
    assert len({*first}) == 3
    # neither places, nor names, nor how fast images are read
    copy = tmp_path / "copy"
    shutil.copytree(images, copy)
    elsewhere = [f"data.{split}_path={copy / split}" for split in ("train", "val")]
    same = [[f"out={tmp_path / 'other'}", *elsewhere], ["launcher=joblib", "name=x"]]
    same += [["overrides=[data.num_workers=1,wandb.project=x,name=y]"]]
    for overrides in same:
        assert digests(*overrides) == first
    for overrides in (["epochs=2"], ["overrides=[optimizer.lr=0.4]"]):
        # what is untrained does not depend on them
        assert digests(*overrides)[0] == first[0] and not {*digests(*overrides)[1:]} & {*first}
    assert not {*digests("evaluations=[knn]")} & {*first}
    runs = read_plan(file, ["seeds=[0,1]"]).runs
    assert len({run.config_digest for run in runs}) == 3 and len({r.data_digest for r in runs}) == 1
    (copy / "val" / "class_0" / "a.heic").touch()
    assert "heic" in read_plan(file, elsewhere).notes[0]
    image = next((copy / "val").rglob("*.png"))
    image.write_bytes(image.read_bytes() + b"0")
    assert not {*digests(*elsewhere)} & {*first}


def test_methods_that_read_different_images_are_no_benchmark(
    benchmark_file: Callable[..., Path],
) -> None:
    part = {**METAMASK, "overrides": ["data.fraction=0.5"]}
    with pytest.raises(UserError, match="metamask: its images are not those of simclr"):
        read_plan(benchmark_file(methods={"simclr": SIMCLR, "metamask": part}), [])


def test_class_folders_instead_of_torchvisions_files(
    benchmark_file: Callable[..., Path], tmp_path: Path
) -> None:
    """The same benchmark takes both; solo-learn is told which, and of a packed one the name."""
    methods = {"simclr": {**SIMCLR, "overrides": ["data.dataset=cifar10"]}}
    file = benchmark_file(methods=methods, seeds=[0])
    assert read_plan(file, []).runs[0].config["data"]["dataset"] == "custom"
    root = tmp_path / "root" / "cifar-10-batches-py"
    root.mkdir(parents=True)
    paths = [f"data.{split}_path={tmp_path / 'root'}" for split in ("train", "val")]
    (run,) = read_plan(file, paths).runs
    assert run.config["data"]["dataset"] == "cifar10"
    (root / "test_batch").write_bytes(b"1")
    assert read_plan(file, paths).runs[0].digest == run.digest


def test_a_folder_of_ones_own_is_split_or_taken_as_it_is(
    benchmark_file: Callable[..., Path], images: Path, tmp_path: Path
) -> None:
    def data(folder: Path) -> Any:
        return read_plan(benchmark_file(data=str(folder), seeds=[0]), []).file.data

    assert data(images).train_path == str(images / "train")
    split = data(images / "train")  # class folders
    assert split.train_path == str(tmp_path / "out" / "images" / "train") and split.val_path
    shutil.rmtree(tmp_path / "out")
    flat = data(images / "train" / "class_0")  # all of them: nothing is measured on others
    assert flat.no_labels and flat.val_path is None
    assert flat.train_path == str(images / "train" / "class_0")
    with pytest.raises(UserError, match=r"data.val_path: missing; .* need labelled images"):
        read_plan(benchmark_file(data={"train_path": str(images / "train")}), [])


def test_each_comparison_is_counted_once(benchmark_file: Callable[..., Path]) -> None:
    names = ("simclr", "joint", "fixed_mask", "metamask")
    file = benchmark_file(methods={name: METAMASK for name in names})

    def pairs(*overrides: str, failed: str = "") -> list[tuple[str, str]]:
        benchmark = read_file(file, ["untrained=[pixels]", *overrides])
        methods = {*benchmark.shown} - {failed}
        same = ("joint", "fixed_mask")
        return benchmark.pairs(methods, same if {*same} <= methods else ())

    # a mask that stays is the joint losses: its comparison would be another's once more
    assert pairs() == [("simclr", "joint"), ("metamask", "joint")]
    assert pairs("baseline=fixed_mask") == [("simclr", "fixed_mask"), ("metamask", "fixed_mask")]
    assert pairs("baseline=metamask") == [("simclr", "metamask"), ("joint", "metamask")]
    assert pairs("comparisons=[[joint,simclr]]") == [("joint", "simclr")]
    # a baseline that is left out, or whose runs all failed, is replaced
    for keys in ("baseline=simclr", "baseline=joint", "comparisons=[[joint,simclr]]"):
        assert pairs("only=[simclr,metamask]", keys) == [("metamask", "simclr")]
    assert pairs(failed="joint") == [("fixed_mask", "simclr"), ("metamask", "simclr")]
    assert pairs("only=[]") == []
    # of baseline and comparisons, the command line wins
    small = read_file("cifar10_small", ["baseline=vicreg"])
    assert {baseline for _, baseline in small.pairs(small.trained)} == {"vicreg"}


def test_differences_beside_the_losses_are_named(benchmark_file: Callable[..., Path]) -> None:
    assert read_plan(benchmark_file(), []).notes == []
    keys = ["optimizer.batch_size=5", "augmentations.0.crop_size=24", "accumulate_grad_batches=2"]
    keys += ["devices=2", "data.background=black"]
    methods = {"mine": {**METAMASK, "overrides": keys}, "metamask": METAMASK}
    notes = read_plan(benchmark_file(methods=methods), []).notes
    assert len(notes) == len(keys)
    assert any("crop_size=24 of mine; " in n and "crop_size=32 of metamask" in n for n in notes)
    assert any("optimizer.batch_size=5 of mine" in note for note in notes)


def test_what_is_untrained_has_the_completed_config_of_a_method(
    benchmark_file: Callable[..., Path],
) -> None:
    overrides = ["backbone.name=vit_tiny", "data.num_workers=auto"]
    file = benchmark_file(seeds=[0], untrained=["random"], overrides=overrides)
    result = worker._run(read_plan(file, ["only=[]"]).runs[0].config, ["knn"])
    assert 0 <= result["knn"] <= 100


def test_quick_leaves_what_was_asked_for() -> None:
    asked = {"precision": "bf16-mixed", "augmentations.0.crop_size": 64}
    overrides = ",".join(f"{key}={value}" for key, value in asked.items())
    for keys, setting, expected in (
        ([], {}, ("32", 32, 10)),
        ([f"overrides+=[{overrides}]", "epochs=2"], {}, ("bf16-mixed", 64, 2)),
        ([], asked, ("bf16-mixed", 64, 10)),
    ):
        cfg = compose_method(SCRIPTS, read_file("custom", ["quick=True", *keys]), "simclr", setting)
        assert (cfg.precision, cfg.augmentations[0].crop_size, cfg.max_epochs) == expected


@pytest.mark.parametrize("name", sorted(file.stem for file in SCRIPTS.glob("*.yaml")))
def test_the_methods_of_the_shipped_files_compose(name: str) -> None:
    benchmark = read_file(name, [])
    for method in benchmark.methods:
        cfg = compose_method(SCRIPTS, benchmark, method, {})
        assert cfg.max_epochs == benchmark.epochs
        if method in ("joint", "fixed_mask"):
            assert cfg.method == "metamask" and not cfg.method_kwargs.meta.enabled
