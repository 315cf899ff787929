"""Which finished runs a benchmark takes for its own: those of the same config and images."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from metamask_solo.__main__ import main
from metamask_solo.benchmark.file import read_file
from metamask_solo.benchmark.plan import read_plan
from metamask_solo.commands.benchmark import report_of_rows
from metamask_solo.errors import UserError

SCRIPTS = Path(__file__).parents[2] / "scripts" / "benchmark"
SIMCLR, METAMASK = {"config": "simclr.yaml"}, {"config": "metamask.yaml"}


def digests(file: Path, *overrides: str) -> list[tuple[str, str, str]]:
    runs = read_plan(file, list(overrides)).runs
    return [(run.digest, run.config_digest, run.data_digest) for run in runs]


def test_images_behind_links_count(
    benchmark_file: Callable[..., Path], images: Path, tmp_path: Path
) -> None:
    file = benchmark_file(methods={"simclr": SIMCLR}, seeds=[0], references=["pixels"])
    linked = tmp_path / "linked"
    for split in ("train", "val"):
        (linked / split).mkdir(parents=True)
        for folder in (images / split).iterdir():
            (linked / split / folder.name).symlink_to(folder)
    own = [f"data.{split}_path={linked / split}" for split in ("train", "val")]

    # the same files, by a link or not
    assert digests(file, *own) == digests(file)
    other = tmp_path / "other"
    shutil.copytree(images, other)
    first = next((other / "train").rglob("*.png"))
    first.write_bytes(first.read_bytes() + b"0")
    (linked / "train" / first.parent.name).unlink()
    (linked / "train" / first.parent.name).symlink_to(first.parent)
    for one, two in zip(digests(file, *own), digests(file), strict=True):
        assert not {*one} & {*two}


def test_images_that_the_methods_files_name_count(
    benchmark_file: Callable[..., Path], images: Path, tmp_path: Path
) -> None:
    """Without the key data; where they lie does not count."""
    named = tmp_path / "named"
    shutil.copytree(images, named)

    def file(simclr: Path, metamask: Path) -> Path:
        path = benchmark_file(data=..., seeds=[0])
        for name, place in (("simclr", simclr), ("metamask", metamask)):
            cfg = OmegaConf.load(tmp_path / f"{name}.yaml")
            for split in ("train", "val"):
                OmegaConf.update(cfg, f"data.{split}_path", str(place / split))
            OmegaConf.save(cfg, tmp_path / f"{name}.yaml")
        return path

    before = digests(file(images, images))
    assert digests(file(named, named)) == before
    next((named / "val").rglob("*.png")).unlink()
    for one, two in zip(digests(file(named, named)), before, strict=True):
        assert not {*one} & {*two}
    # methods that read different images are no benchmark
    with pytest.raises(UserError, match="metamask, seed 0: its images are others than those of s"):
        read_plan(file(images, named), [])


def test_of_torchvisions_files_the_name_says_all(
    benchmark_file: Callable[..., Path], tmp_path: Path
) -> None:
    """The first run downloads them, and other data sets may lie beside them."""
    file = benchmark_file(methods={"simclr": SIMCLR}, data=..., seeds=[0])
    folder = tmp_path / "datasets"
    cfg = OmegaConf.load(tmp_path / "simclr.yaml")
    for key, value in (("dataset", "cifar10"), ("train_path", folder), ("val_path", folder)):
        OmegaConf.update(cfg, f"data.{key}", str(value))
    OmegaConf.save(cfg, tmp_path / "simclr.yaml")

    before = digests(file)
    (folder / "cifar-10-batches-py").mkdir(parents=True)
    (folder / "cifar-10-batches-py" / "test_batch").write_bytes(b"1")
    (folder / "other.png").write_bytes(b"1")
    assert digests(file) == before
    given = [f"data.{split}_path={folder}" for split in ("train", "val")]
    assert digests(file, *given) == before
    assert digests(file, "overrides=[data.dataset=cifar100]") != before


def test_rows_of_other_images_are_not_compared(tmp_path: Path) -> None:
    file, bench = tmp_path / "rows.csv", tmp_path / "bench.yaml"
    bench.write_text(
        "name: t\nmethods: {a: {config: a.yaml}, b: {config: b.yaml}}\nseeds: [0, 1]\n"
        f"references: [pixels]\nreference: a\nevaluations: [knn]\nrows: {file}\n"
    )

    def report(a: str, b: str, pixels: str) -> str:
        found = [("a", 0, 50, a), ("a", 1, 51, a), ("b", 0, 40, b), ("b", 1, 42, b)]
        lines = [
            f"{method},,{seed},finished,{knn},{images}"
            for method, seed, knn, images in (*found, ("pixels", 0, 30, pixels))
        ]
        head = "method,setting,seed,status,knn,data_digest"
        file.write_text("\n".join([head, *lines]) + "\n")
        return report_of_rows(read_file(bench, []))

    for same in ("17", ""):  # an older version did not say
        assert "| a − b | 2 | **+9.50" in report(same, same, same)
    for a, b, pixels, who in (("17", "18", "17", "b"), ("17", "17", "18", "a")):
        with pytest.raises(UserError, match=f"pixels, seed 0, and {who}, seed 0, are of diff"):
            report(a, b, pixels)
    with pytest.raises(UserError, match="b, seed 0, do not both say their images"):
        report("17", "", "17")
    # the rows of a reference alone are no report of methods that are wanted
    with pytest.raises(UserError, match="has no row of these methods"):
        report_of_rows(read_file(bench, ["methods.c.config=c.yaml", "only=[c]"]))


def test_a_row_without_a_figure_is_refused_before_any_work(
    benchmark_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows_file = tmp_path / "rows.csv"
    file = benchmark_file(methods={"simclr": SIMCLR}, seeds=[0, 1], rows=str(rows_file))
    for run in read_plan(file, []).runs:
        run.folder.mkdir(parents=True)
        (run.folder / "result.json").write_text(json.dumps({"metrics": {"knn": 1, "linear": 2}}))
    assert main(["benchmark", str(file), "--tables-only"]) == 0
    with rows_file.open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert lines[0]["data_digest"].isdigit() and lines[0]["data_digest"] == lines[1]["data_digest"]
    lines[1]["linear"] = ""
    with rows_file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    shutil.rmtree(tmp_path / "out")
    capsys.readouterr()

    for keys in ([], ["--tables-only"]):
        assert main(["benchmark", str(file), *keys]) == 2
        error = capsys.readouterr().err
        assert f"rows={rows_file}: simclr, seed 1: has no linear" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "override",
    [
        "data.train_path=/nowhere",
        "data=digits",
        "overrides=[optimizer.lr=0.5]",
        "overrides+=[optimizer.lr=0.5]",
        "methods.joint.overrides=[optimizer.lr=0.5]",
        "search.optimizer.lr=[0.5]",
    ],
)
def test_what_changes_no_rows_is_refused_with_them(
    override: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["benchmark", str(SCRIPTS / "digits.yaml"), "--from-rows", override]) == 2
    assert f"error: {override}: changes no rows" in capsys.readouterr().err


def test_overrides_are_replaced_aloud_or_added_to(benchmark_file: Callable[..., Path]) -> None:
    file = benchmark_file(
        methods={"simclr": {**SIMCLR, "overrides": ["optimizer.lr=0.25"]}, "metamask": METAMASK},
        overrides=["optimizer.weight_decay=0.5", "+scheduler.warmup_start_lr=\\${optimizer.lr}"],
        seeds=[0],
    )

    def plan(*overrides: str) -> tuple[list[Any], list[str]]:
        found = read_plan(file, list(overrides))
        told = [
            (r.config["optimizer"]["weight_decay"], r.config["scheduler"].get("warmup_start_lr"))
            for r in found.runs
        ]
        return told, found.notes

    before, notes = plan()
    assert [decay for decay, _ in before] == [0.5, 0.5] and before[0][1] == 0.25 and notes == []
    added, notes = plan("overrides+=[optimizer.weight_decay=0.125]")
    assert added == [(0.125, start) for _, start in before] and notes == []
    replaced, notes = plan("overrides=[optimizer.weight_decay=0.125]")
    assert [decay for decay, _ in replaced] == [0.125, 0.125] and replaced[0][1] != 0.25
    assert notes == [
        "overrides=… replaces optimizer.weight_decay=0.5, "
        "+scheduler.warmup_start_lr=\\${optimizer.lr} of the file; overrides+=… would add to them."
    ]
    _, notes = plan("overrides+=[optimizer.lr=0.5]")
    assert notes == [
        "overrides: optimizer.lr=0.5 does not reach simclr, whose own overrides say otherwise."
    ]
    _, notes = plan("methods.simclr.overrides=[]")
    assert notes == [
        "methods.simclr.overrides=… replaces optimizer.lr=0.25 of the file; "
        "methods.simclr.overrides+=… would add to them."
    ]
    (run, *_), notes = (
        read_plan(file, ["methods.metamask.seeds=[7]"]).runs,
        plan("methods.metamask.seeds=[7]")[1],
    )
    assert run.method == "simclr"
    assert notes == ["metamask has no run: none of its own seeds=[7] is in seeds=[0]."]


def test_of_reference_and_comparisons_the_command_line_wins() -> None:
    file = SCRIPTS / "cifar10_small.yaml"

    assert ("heads", "joint") in read_file(file, []).pairs
    pairs = read_file(file, ["reference=vicreg"]).pairs
    assert pairs and {one for one, _ in pairs} == {"vicreg"}
    assert read_file(file, ["reference=vicreg", "comparisons=[[fast,heads]]"]).pairs == [
        ("fast", "heads")
    ]


def test_a_search_may_be_named_on_the_command_line(benchmark_file: Callable[..., Path]) -> None:
    file = benchmark_file(methods={"simclr": SIMCLR}, seeds=[0])

    runs = read_plan(file, ["search.optimizer.lr=[0.5,0.25]"]).runs
    assert [run.setting for run in runs] == [{"optimizer.lr": 0.5}, {"optimizer.lr": 0.25}]
