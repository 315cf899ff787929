"""Aggregation against numbers computed by hand."""

import csv
import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from metamask_solo.__main__ import main
from metamask_solo.benchmark.file import BenchmarkFile, read_file
from metamask_solo.benchmark.plan import read_plan
from metamask_solo.benchmark.records import Result
from metamask_solo.benchmark.rows import VERSIONS, Row, csv_table, group, known_rows, read_csv
from metamask_solo.benchmark.statistics import (
    best_settings,
    clear_winner,
    compare,
    detectable_effect,
    mean_and_deviation,
    noise_floor,
)
from metamask_solo.benchmark.tables import markdown
from metamask_solo.commands.benchmark import report_of_rows
from metamask_solo.errors import UserError

FILES = Path(__file__).parents[2] / "scripts" / "benchmark"
# of Student's distribution with 2 degrees of freedom, from a printed table
T_975_2 = 4.302653


def rows(method: str, knn: list[float], setting: str = "", **more: Any) -> list[Row]:
    return [
        Row(
            **{
                "method": method,
                "setting": setting,
                "seed": seed,
                "status": "finished",
                "metrics": {"knn": value, **more.get("metrics", {})},
                "seconds_per_epoch": 2.0 + seed,
                "peak_memory_mib": 100.0,
                "parameters": 11_000_000,
                "epochs": 1,
                "device": "cpu",
                "versions": dict.fromkeys(VERSIONS, "1"),
                **{name: value for name, value in more.items() if name != "metrics"},
            }
        )
        for seed, value in enumerate(knn)
    ]


def benchmark(*methods: str, **keys: Any) -> BenchmarkFile:
    content = {
        "name": "t",
        "data": "digits",
        "methods": {method: {"config": "a.yaml"} for method in methods or ("a", "b", "c")},
        "evaluations": ["knn"],
        "reference": (methods or "a")[0],
        **keys,
    }
    return BenchmarkFile.model_validate(content)


def test_mean_and_deviation() -> None:
    # deviations from 4: -2, 0, 2; their squares by n - 1: 8 / 2
    assert mean_and_deviation([2.0, 4.0, 6.0]) == (4.0, 2.0)
    assert mean_and_deviation([5.0]) == (5.0, None)


def test_rankme_is_not_told_in_percentage_points() -> None:
    def page(metric: str) -> str:
        found = [r for m in "ab" for r in rows(m, [1, 2], metrics={metric: 5.0})]
        return markdown(benchmark("a", "b", evaluations=[metric]), found)

    assert "Percentage points: mean of the differences" in page("knn")
    assert "The units of each measure: mean of the differences" in page("rankme")


def test_the_difference_is_paired_by_the_seed() -> None:
    one = rows("a", [50.0, 60.0, 70.0])
    other = list(reversed(rows("b", [49.0, 58.0, 67.0])))  # the order must not count

    (found,) = compare([("a", "b")], group([*one, *other]), ["knn"])

    # differences 1, 2, 3: mean 2, deviation 1
    assert (found.seeds, found.mean) == (3, pytest.approx(2.0))
    half = T_975_2 / math.sqrt(3)
    assert found.interval == pytest.approx((2 - half, 2 + half))
    # t = 2 √3 with 2 degrees of freedom, whose distribution has a closed form
    t = 2 * math.sqrt(3)
    assert found.p_value == pytest.approx(1 - t / math.sqrt(t * t + 2))


def test_a_family_is_corrected_for_its_number() -> None:
    """Three p-values: Holm takes them times 3, 2 and 1; the intervals are at 1 - 0.05 / 3."""
    groups = group(
        [
            *rows("a", [50.0, 60.0, 70.0]),
            *rows("b", [49.0, 58.9, 68.95]),  # 1, 1.1, 1.05
            *rows("c", [49.0, 58.0, 67.0]),  # 1, 2, 3
            *rows("d", [51.0, 59.0, 70.0]),  # -1, 1, 0
        ]
    )
    alone = {n: compare([("a", n)], groups, ["knn"])[0] for n in "bcd"}
    one, two, three = compare([("a", "b"), ("a", "c"), ("a", "d")], groups, ["knn"])

    assert one.p_value == pytest.approx(3 * (alone["b"].p_value or 0))
    assert two.p_value == pytest.approx(2 * (alone["c"].p_value or 0))
    assert three.p_value == pytest.approx(1.0)
    assert (one.clear, two.clear, three.clear) == (True, False, False)
    # the quantile of 1 - 0.05 / 6 with 2 degrees of freedom, from its closed form
    level = 1 - 0.05 / 3
    quantile = level * math.sqrt(2 / (1 - level**2))
    half = quantile / math.sqrt(3)
    assert two.interval == pytest.approx((2 - half, 2 + half))


@pytest.mark.parametrize("seeds", [2, 3, 5, 8])
def test_the_detectable_difference_is_detected_in_four_of_five_cases(seeds: int) -> None:
    """Simulated experiments, tested by the mean and deviation alone."""
    draw = np.random.default_rng(seeds)
    differences = draw.normal(detectable_effect(seeds), 1, (40_000, seeds))
    t = differences.mean(1) / differences.std(1, ddof=1) * math.sqrt(seeds)

    shown = float((abs(t) > stats.t.ppf(0.975, seeds - 1)).mean())

    assert shown == pytest.approx(0.8, abs=0.01)


def test_more_seeds_show_smaller_differences() -> None:
    effects = [detectable_effect(seeds) for seeds in (2, 3, 4, 6, 10)]
    assert effects == sorted(effects, reverse=True)
    # differences 1, 2, 3: deviation 1
    groups = group([*rows("a", [50.0, 60.0, 70.0]), *rows("b", [49.0, 58.0, 67.0])])
    (found,) = compare([("a", "b")], groups, ["knn"])
    assert found.detectable == pytest.approx(detectable_effect(3))


def test_the_noise_floor_is_what_one_method_differs_by() -> None:
    one, other = rows("joint", [50.0, 60.0, 70.0]), rows("fixed_mask", [51.0, 58.0, 70.0])

    floor = noise_floor(one, other, "knn")

    assert floor is not None and floor.pairs == 3
    assert floor.size == pytest.approx(math.sqrt((1 + 4 + 0) / 3))
    assert floor.detectable == pytest.approx(detectable_effect(3) * floor.size)
    assert noise_floor(one[:1], other[1:], "knn") is None
    text = markdown(
        benchmark("joint", "fixed_mask", "heads", comparisons=[["heads", "joint"]]),
        [*one, *other, *rows("heads", [50.0, 60.0, 70.5])],
    )
    assert "| kNN % | 3 | 1.29 | 4.21 |" in text
    assert text.count("| heads − joint | 3 |") == 1


CANCELS = "are one method: a mask that stays where it is cancels in both heads"


@pytest.mark.parametrize(
    ("name", "overrides", "cancels"),
    [
        ("smoke", [], True),
        ("digits", [], True),
        ("textured-digits", [], True),
        ("cifar10", [], True),
        ("cifar10_small", [], True),
        ("imagenet-100", [], True),
        ("stl10", [], True),
        ("smoke", ["noise_floor=[simclr,barlow_twins]"], False),
        ("smoke", ["noise_floor=[joint,simclr]"], False),
        ("smoke", ["noise_floor=[joint,metamask]"], False),  # its mask moves
        ("smoke", ["methods.joint.overrides=[optimizer.lr=0.5]"], False),
        ("smoke", ["methods.joint.overrides=[method_kwargs.lamb=0.5]"], False),
        ("smoke", ["methods.joint.overrides=[method_kwargs.mask.lr=0.5]"], True),
        ("smoke", ["methods.joint.config=gone.yaml"], False),
    ],
)
def test_the_reason_of_a_noise_floor_is_given_where_it_holds(
    name: str, overrides: list[str], cancels: bool
) -> None:
    file = read_file(FILES / f"{name}.yaml", overrides)
    one, other = file.floor or ("", "")

    text = markdown(file, [*rows(one, [50.0]), *rows(other, [51.0])], ["evaluations=[knn]"])

    assert (f"{one} and {other} {CANCELS}, which begin" in text) == cancels
    named = f"The benchmark's file names {one} and {other} as one method. Root mean square"
    assert (named in text) != cancels


def test_means_of_other_seeds_are_told_of() -> None:
    a, b = rows("a", [90.0, 70.0, 70.0]), rows("b", [89.0])
    said = (
        "Not all lines have the same seeds: means of different seeds are not to be compared "
        "directly; the paired differences use common seeds only."
    )

    # the mean of b is 12.33 higher, and on its seed it is 1 lower
    text = markdown(benchmark("a", "b"), [*a, *b])
    assert said in text and "| a − b | 1 | +1.00 | – | – |" in text
    # as many seeds need not be the same ones
    assert said in markdown(benchmark("a", "b"), [a[0], rows("b", [0.0, 1.0])[1]])
    same = [*a, *rows("b", [1.0, 2.0, 3.0]), *rows("pixels", [30.0])]
    assert said not in markdown(benchmark("a", "b", references=["pixels"]), same)


def test_a_comparison_without_a_common_seed_is_told_of() -> None:
    a, b = rows("a", [80.0, 81.0]), rows("b", [70.0, 71.0, 72.0])[2:]
    said = "No seed has finished runs of both: "

    # of c nothing is finished, and b has another seed
    text = markdown(benchmark(), [*a, *b])
    assert f"## Paired differences\n\n{said}a − b, a − c." in text
    text = markdown(benchmark(), [*a, *b, *rows("c", [60.0, 61.5])])
    # 20 and 19.5
    assert "| a − c | 2 | **+19.75 (" in text and "| a − b |" not in text
    assert f"{said}a − b." in text
    assert said not in markdown(benchmark("a", "c"), [*a, *rows("c", [60.0])])
    # what was left out on purpose is not missed
    only = benchmark(only=["a", "c"])
    assert said not in markdown(only, [*a, *rows("c", [60.0])])


def test_a_noise_floor_without_a_common_seed_is_told_of() -> None:
    a, b = rows("a", [80.0, 81.0]), rows("b", [70.0, 71.0, 72.0])
    said = "## Noise floor\n\nNo seed has finished runs of both a and b: no noise floor is known."

    file = benchmark(noise_floor=["a", "b"])
    assert said in markdown(file, [*a, *b[2:]])
    assert said in markdown(file, a)
    assert said not in markdown(file, [*a, *b])
    # not asked for: without two such methods, or with one of them left out on purpose
    for other in (benchmark(), benchmark(noise_floor=["a", "b"], only=["a", "c"])):
        assert "## Noise floor" not in markdown(other, a)


def test_a_difference_needs_common_seeds() -> None:
    one, other = rows("a", [50.0, 60.0]), rows("b", [40.0, 41.0])

    assert compare([("a", "b")], {"a": one[:1], "b": other[1:]}, ["knn"]) == []
    (found,) = compare([("a", "b")], {"a": one, "b": other[1:]}, ["knn"])
    assert (found.mean, found.interval, found.p_value, found.detectable) == (19.0, None, None, None)
    assert not found.clear


def test_differences_without_spread() -> None:
    groups = group([*rows("a", [2.0, 4.0]), *rows("b", [1.0, 3.0]), *rows("c", [2.0, 4.0])])

    for found in compare([("a", "b"), ("a", "c")], groups, ["knn"]):
        # two equal differences are chance where accuracies are shares of few images: no evidence
        assert (found.interval, found.p_value, found.detectable) == (None, None, None)
        assert not found.clear

    # nor are two that differ by rounding alone: 90.3 - 90.1 and 80.5 - 80.3
    groups = group([*rows("a", [90.3, 80.5]), *rows("b", [90.1, 80.3])])
    (found,) = compare([("a", "b")], groups, ["knn"])
    assert found.interval is None and not found.clear and clear_winner(groups, "knn") is None
    assert "| a − b | 2 | +0.20 | – | – |" in markdown(benchmark(), sum(groups.values(), []))
    # and runs that do not differ at all are no noise to measure
    floor = noise_floor(groups["a"], groups["a"], "knn")
    assert floor is not None and (floor.size, floor.detectable) == (0.0, None)


HEAD = "method,setting,seed,status,knn,epochs\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a,,1,finished,nan,1", "line 3: knn nan"),
        ("a,,1,finished,inf,1", "line 3: knn inf"),
        ("a,,1,finished,250,1", "line 3: knn 250"),
        ("a,,1,finished", "line 3: has another number of cells"),
        ("a,,1,finished,50,1,2", "line 3: has another number of cells"),
        (",,1,finished,50,1", "line 3: has no method"),
        ("a,,,finished,50,1", "line 3: has no seed"),
        ("a,,1,Finished,50,1", "line 3: status Finished"),
        ("a,,0,finished,60,1", "a, seed 0: is there twice"),
        ("a,,1,finished,,1", "a, seed 1: has no knn"),
        ("a,,-1.5,finished,50,1", "rows.csv: cannot be read as a table"),
        (HEAD.strip(), "line 3: the names of the columns once more"),
    ],
)
def test_a_row_that_makes_no_report_is_named(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(f"{HEAD}a,,0,finished,50,1\n{line}\n")

    with pytest.raises(UserError, match=said):
        report_of_rows(benchmark(rows=str(file)))


def test_rows_without_a_digest_are_no_known_runs(tmp_path: Path) -> None:
    """Nobody could tell which run they are; and written anew, all but one would be gone."""
    file = tmp_path / "rows.csv"
    file.write_text(f"{HEAD}a,,0,finished,50,1\na,,1,finished,51,1\n")

    with pytest.raises(UserError, match="rows.csv: a, seed 0: has no digest"):
        known_rows(benchmark(rows=str(file)))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"metrics": {"knn": "high"}}', "metrics.knn=high: "),
        ('{"metrics": {}, "epochs": 1.5}', "epochs=1.5: "),
        ('{"metrics": {}', "Invalid JSON"),
        ("{}", "metrics={}: Field required"),
    ],
)
def test_a_result_that_is_none_is_named(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "result.json").write_text(content)

    with pytest.raises(UserError, match=f"result.json: {said}"):
        Result.read(tmp_path)


def test_a_result_of_an_older_version_is_read(tmp_path: Path) -> None:
    """Without what it did not hold yet, and with what is no more; a NaN stays one."""
    old = {"metrics": {"knn": 50}, "logged": {"loss": math.nan}, "curve": [[1, 2.5]], "gone": 3}
    (tmp_path / "result.json").write_text(json.dumps(old))

    found = Result.read(tmp_path)

    assert (found.metrics, found.chosen, found.curve) == ({"knn": 50.0}, {}, [(1, 2.5)])
    text = csv_table([Row(**dict(found), method="a", seed=0, status="finished")])
    (line,) = csv.DictReader(io.StringIO(text))
    assert (line["logged/loss"], line["curve"], line["parameters"]) == ("nan", "1:2.5", "")


def test_a_report_of_rows_is_that_of_the_benchmarks_own(tmp_path: Path) -> None:
    """Methods, seeds and epochs of the file alone, and a line on what is left out."""
    file, bench = tmp_path / "rows.csv", tmp_path / "bench.yaml"
    lines = [f"{m},,{s},finished,{40 + 7 * s + s * len(m)},1" for m in ("a", "bb") for s in (0, 1)]
    others = ["a,,0,finished,99,200", "a,,7,finished,99,1", "pixels,,5,finished,30,0"]
    file.write_text("\n".join(["\ufeff" + HEAD.strip(), *lines, *others, "a,,1,failed,,1"]) + "\n")
    bench.write_text(
        "name: t\nmethods: {a: {config: a.yaml}, bb: {config: b.yaml}}\nseeds: [0, 1]\nepochs: 1\n"
        f"references: [pixels]\nreference: bb\nevaluations: [knn]\nrows: {file}\n"
    )

    text = report_of_rows(read_file(bench, []))
    assert "| a | 2 | 44.00 ± 5.66 |" in text and "| raw pixels | 1 | 30.00 |" in text
    assert "Left out of rows.csv: 2 rows of other methods, seeds or epochs." in text
    assert "- a, seed 1: unknown" in text
    text = report_of_rows(read_file(bench, ["only=[bb]"]))
    assert "| bb | 2 |" in text and "| a |" not in text
    assert "| bb | 1 | 40.00 |" in report_of_rows(read_file(bench, ["seeds=[0]"]))
    assert "| a | 1 | 99.00 |" in report_of_rows(read_file(bench, ["epochs=200"]))


def _linear(tmp_path: Path, *lines: str) -> Path:
    file = tmp_path / "rows.csv"
    head = "method,setting,seed,status,knn,linear,linear_C,linear_measure,epochs"
    file.write_text("\n".join([head, *lines]) + "\n")
    return file


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("a,,1,finished,51,95,,,1", "a, seed 1: linear"),  # standardised features, no C
        ("b,,0,finished,51,95,,,1", "b, seed 0: linear"),  # the same, of another method
        ("a,,1,finished,51,95,0.1,1,1", "a, seed 1: linear"),
        ("a,,1,finished,51,95,0.1,3,1", "a, seed 1: linear"),
    ],
)
def test_a_linear_accuracy_of_another_probe_is_refused(
    tmp_path: Path, other: str, said: str
) -> None:
    """Beside rows of today's probe, or alone: the report describes that one."""
    today = "a,,0,finished,50,90,0.1,2,1"
    for lines in ([today, other], [other]):
        file = str(_linear(tmp_path, *lines))

        for evaluations, todo in (
            (["knn", "linear"], r"evaluations=\[knn\] leaves it out"),
            (["linear"], "choose others by evaluations="),
        ):
            with pytest.raises(UserError, match=f"rows.csv: {said} was measured in .*; {todo}"):
                report_of_rows(benchmark(rows=file, evaluations=evaluations))

        text = report_of_rows(benchmark(rows=file))  # by kNN alone
        assert "kNN %" in text and "linear" not in text


def test_rows_that_do_not_say_how_they_were_measured(tmp_path: Path) -> None:
    """A C tells of today's probe: older rows stand beside new ones; the failed have no result."""
    lines = ["a,,0,finished,50,90,0.1,,1", "a,,1,finished,52,92,10,2,1", "a,,2,failed,,,,,"]
    file = str(_linear(tmp_path, *lines))

    text = report_of_rows(benchmark(rows=file, evaluations=["knn", "linear"]))

    assert "| a | 2 | 51.00 ± 1.41 | 91.00 ± 1.41 |" in text


def test_runs_with_other_configs_are_no_runs_of_one_method(
    tmp_path: Path, benchmark_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """One file of rows, to which commands with other overrides add their seeds."""
    rows_file, out = tmp_path / "rows.csv", tmp_path / "out"
    file = benchmark_file(methods={"simclr": {"config": "simclr.yaml"}}, rows=str(rows_file))

    def command(*keys: str) -> int:
        return main(["benchmark", str(file), "evaluations=[knn]", *keys])

    def finish(*keys: str) -> None:
        for run in read_plan(file, ["evaluations=[knn]", *keys]).runs:
            run.folder.mkdir(parents=True)
            found = {"metrics": {"knn": 70 if run.seed == 0 else 90}, "epochs": 1}
            (run.folder / "result.json").write_text(json.dumps(found))
        assert command(*keys, "--tables-only") == 0

    one, other = "overrides=[optimizer.lr=0.25]", "overrides=[optimizer.lr=0.125]"
    finish("seeds=[0]", one)
    finish("seeds=[1,2]", other)
    capsys.readouterr()
    assert command("seeds=[0,1,2]", "--from-rows") == 2
    said = capsys.readouterr().err
    assert f"{rows_file}: simclr: seed 0 and seeds 1, 2 have different configs" in said
    assert said.count("\n") == 1
    # each alone is a method
    assert command("seeds=[1,2]", "--from-rows") == 0
    assert "| simclr | 2 | 90.00 ± 0.00 |" in capsys.readouterr().out
    shutil.rmtree(out)
    before = rows_file.read_text()
    assert command("seeds=[1,2]", other, "--tables-only") == 0
    assert "| simclr | 2 | 90.00 ± 0.00 |" in (out / "results.md").read_text()
    assert sorted(rows_file.read_text().splitlines()) == sorted(before.splitlines())
    before = rows_file.read_text()
    # a run whose place another config has taken is refused before any work, and that row stays
    for keys in (("--tables-only",), ()):
        assert command("seeds=[0,1,2]", other, *keys) == 2
        said = capsys.readouterr().err
        assert f"rows={rows_file}: simclr, seed 0 is there with another config" in said
        assert said.count("\n") == 1
    assert rows_file.read_text() == before

    # older rows do not say: they are not checked, and are known by the digest as ever
    with rows_file.open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    older = [
        {k: v for k, v in line.items() if "_digest" not in k and "_measure" not in k}
        for line in lines
    ]
    with rows_file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, older[0])
        writer.writeheader()
        writer.writerows(older)
    assert command("seeds=[0,1,2]", "--from-rows") == 0
    # 70, 90, 90
    assert "| simclr | 3 | 83.33 ± 11.55 |" in capsys.readouterr().out
    # a command adds the columns to those that are its runs; the file holds both kinds then
    assert command("seeds=[1,2]", other, "--tables-only") == 0
    with rows_file.open(newline="") as stream:
        said_now = [
            (line["seed"], bool(line["config_digest"]), line["knn_measure"])
            for line in csv.DictReader(stream)
        ]
    assert said_now == [("1", True, "1"), ("2", True, "1"), ("0", False, "")]
    capsys.readouterr()
    assert command("seeds=[0,1,2]", "--from-rows") == 2
    said = capsys.readouterr().err
    assert "simclr: seed 0 and seeds 1, 2 do not all say their config" in said


def test_pixels_are_the_same_with_every_seed() -> None:
    groups = group([*rows("a", [53.0, 53.5, 54.0]), *rows("pixels", [30.0])])

    assert clear_winner(groups, "knn") == "a"
    groups["pixels"] = rows("pixels", [53.9])
    assert clear_winner(groups, "knn") is None


@pytest.mark.slow
def test_bold_only_where_it_is_clear() -> None:
    a, b = rows("a", [53.0, 61.0, 72.0]), rows("b", [50.0, 58.0, 68.9])  # 3, 3, 3.1
    c = rows("c", [55.0, 58.0, 69.0])  # -2, 3, 3

    assert clear_winner(group([*a, *b]), "knn") == "a"
    assert clear_winner(group([*a, *b, *c]), "knn") is None
    assert clear_winner(group(a), "knn") is None
    # two that are one need not be told apart
    assert clear_winner(group([*a, *b, *c]), "knn", ("a", "c")) == "a"

    text = markdown(benchmark(), [*a, *b, *c])
    # means 62, 58.97, 60.67; deviations by hand
    assert "| a | 3 | 62.00 ± 9.54 | 3.0 | – | 100 | 11,000,000 |" in text
    # 3, 3, 3.1: mean 3.0333, deviation 0.05774, the quantile of 0.9875 is 6.2053
    assert "| a − b | 3 | **+3.03 (+2.83 to +3.24)** | <0.001 | 0.19 |" in text
    assert "| a − c | 3 | +1.33 (-9.01 to +11.68) | 0.508 | 9.42 |" in text
    assert "**62.00" not in text
    assert "| a | 3 | **62.00 ± 9.54** |" in markdown(benchmark(), [*a, *b])


def test_references_stand_beside_the_methods_and_are_not_compared() -> None:
    untrained = dict.fromkeys(("seconds_per_epoch", "seconds_per_step", "peak_memory_mib"))
    found = [
        *rows("random", [34.0, 35.0, 36.0], **untrained, epochs=0),
        *rows("pixels", [38.0], **untrained, epochs=0),
        *rows("a", [42.0, 43.0, 44.0]),
        *rows("b", [41.0, 43.0, 44.5]),
    ]

    text = markdown(benchmark(references=["random", "pixels"]), found)

    assert "| random backbone | 3 | 35.00 ± 1.00 | – |" in text
    assert "| raw pixels | 1 | 38.00 | – |" in text
    assert "epochs: 1." in text
    assert "− random" not in text and "− pixels" not in text


def test_a_failed_run_has_a_row_and_does_not_count() -> None:
    failed = Row(method="b", seed=1, status="failed", error="no | memory")
    finished = [*rows("a", [50.0, 60.0]), *rows("b", [40.0])]

    table = list(csv.DictReader(io.StringIO(csv_table([*finished, failed]))))
    text = markdown(benchmark(), [*finished, failed])

    assert [row["status"] for row in table] == ["finished", "finished", "finished", "failed"]
    assert table[3]["error"] == "no | memory" and table[3]["knn"] == ""
    assert "4 runs (3 finished, 1 failed)" in text
    assert "- b, seed 1: no | memory" in text
    assert "| a − b | 1 | +10.00 | – | – |" in text  # one common seed: no interval, not bold


def test_the_csv_has_every_number_unrounded() -> None:
    third = rows("a", [100 / 3], logged={"z": 1.0, "b": 1 / 7})

    (row,) = csv.DictReader(io.StringIO(csv_table(third)))

    assert float(row["knn"]) == 100 / 3
    assert float(row["logged/b"]) == 1 / 7
    assert list(row)[-3:] == ["logged/b", "logged/z", "error"]


def test_a_csv_is_read_as_what_was_written(tmp_path: Path) -> None:
    found = [
        *rows("a", [100 / 3, 1 / 7], "lr=1", commit="abc", curve=[(5, 41.25), (10, 1 / 3)]),
        *rows(
            "pixels",
            [1.5],
            metrics={"linear": 2.5},
            chosen={"linear": 0.01},
            measures={"knn": 1, "linear": 2},
            digest="0123456789ab",
            config_digest="281474976710655",
        ),
    ]
    file = tmp_path / "rows.csv"
    file.write_text(csv_table(found))

    assert read_csv(file) == found
    assert csv_table(read_csv(file)) == csv_table(found)  # once more, to the last character
    file.write_text(csv_table(found).replace("11000000", "1.5"))
    with pytest.raises(UserError, match="line 2: parameters=1.5: "):
        read_csv(file)

    for content in ("", "method,seed\na,1\n", "method,setting,seed,status,knn\na,,x,finished,1\n"):
        file.write_text(content)
        with pytest.raises(UserError, match="rows.csv"):
            read_csv(file)


def test_the_best_setting_of_each_method() -> None:
    found = [
        *rows("a", [50.0, 52.0], "lr=1"),
        *rows("a", [60.0, 40.0], "lr=2"),
        *rows("b", [10.0, 20.0], "lr=1"),
        *rows("b", [16.0, 16.0], "lr=2"),
    ]

    assert list(best_settings(found, ["knn", "linear"])) == ["a lr=1", "b lr=2"]

    text = markdown(benchmark(search={"lr": [1, 2]}), found)
    assert "| a | `lr=1` | 2 | 51.00 ± 1.41 |" in text
    assert "| b | `lr=2` | 2 | 16.00 ± 0.00 |" in text
    assert "Paired" not in text and "**" not in text
    assert "Left out" not in text and "same seeds" not in text


def _not_finished(status: str, seed: int, setting: str) -> Row:
    return Row(method="a", setting=setting, seed=seed, status=status)  # type: ignore[arg-type]


@pytest.mark.parametrize("lost", ["failed", "pending", None])
def test_a_setting_whose_runs_are_not_all_there_is_not_the_best(lost: str | None) -> None:
    """The seed that is left may be an easy one: on it, the other setting is better."""
    whole, one = [92.0, 80.0, 80.0], 90.0
    found = [*rows("a", whole, "lr=1"), *rows("a", [one], "lr=2")]
    found += [_not_finished(lost, seed, "lr=2") for seed in (1, 2)] if lost else []
    assert one > sum(whole) / 3 and one < whole[0]

    assert list(best_settings(found, ["knn"])) == ["a lr=1"]
    text = markdown(benchmark("a", search={"lr": [1, 2]}), found)
    assert "| a | `lr=1` | 3 | 84.00 ± 6.93 |" in text
    assert "Left out, with fewer finished runs than another setting of the method: a lr=2 (1 " in (
        text
    )
    assert "(1 instead of 3)." in text
    assert "means of different seeds are not to be compared directly." in text


def test_where_no_setting_is_whole_those_with_the_most_runs_take_part() -> None:
    found = [*rows("a", [50.0, 54.0], "lr=1"), *rows("a", [60.0, 40.0], "lr=2")]
    found += [_not_finished("failed", 2, f"lr={n}") for n in (1, 2)]
    found += [_not_finished("failed", seed, "lr=3") for seed in (0, 1, 2)]
    found += [*rows("b", [99.0], "lr=1")]  # the runs of another method do not count

    assert list(best_settings(found, ["knn"])) == ["a lr=1", "b lr=1"]
    text = markdown(benchmark(search={"lr": [1, 2, 3]}), found)
    assert "| a | `lr=1` | 2 | 52.00 ± 2.83 |" in text and "| b | `lr=1` | 1 | 99.00 |" in text
    assert "the method: a lr=3 (0 instead of 2)." in text


def test_of_equal_settings_the_next_measure_decides() -> None:
    found = [
        *rows("a", [50.0], "lr=1", metrics={"linear": 60.0}),
        *rows("a", [50.0], "lr=2", metrics={"linear": 61.0}),
    ]
    assert list(best_settings(found, ["knn", "linear"])) == ["a lr=2"]
    text = markdown(benchmark(search={"lr": [1, 2]}, evaluations=["knn", "linear"]), found)
    assert "| a | `lr=2` | 1 | 50.00 |" in text
    assert "of equal ones by linear %" in text


def test_the_bold_one_is_above_over_the_seeds_in_common() -> None:
    """Its best mean comes from seeds that the other has not run."""
    best = rows("a", [80.0, 80.1, 79.9, 99.0, 99.0, 99.0])
    other = rows("b", [85.0, 85.2, 84.9])
    assert clear_winner(group([*best, *other]), "knn") is None
    assert clear_winner(group([*rows("a", [90.0, 90.1, 89.9]), *other]), "knn") == "a"


def _table(tmp_path: Path, *lines: str) -> Any:
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    return read_csv(tmp_path / "rows.csv")


def test_columns_and_numbers_of_other_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="column knn is there twice"):
        _table(tmp_path, "method,setting,seed,status,knn,knn", "a,,0,finished,80,90")
    with pytest.raises(UserError, match="line 2: knn 8_0: must be a number"):
        _table(tmp_path, "method,setting,seed,status,knn", "a,,0,finished,8_0")
    with pytest.raises(UserError, match="line 2: note good: must be a number"):
        _table(tmp_path, "method,setting,seed,status,knn,note", "a,,0,finished,80,good")
