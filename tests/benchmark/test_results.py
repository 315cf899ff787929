"""One DataFrame from the runs' files to the report, and the file of rows."""

import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from renew_digests import ROOT, ROWS, renewed

from metamask_solo.__main__ import main
from metamask_solo.benchmark import results
from metamask_solo.benchmark.plan import read_plan
from metamask_solo.benchmark.results import best_settings, csv_text, read_csv, read_results
from metamask_solo.errors import UserError
from metamask_solo.hosts import RELEASE

pytestmark = pytest.mark.usefixtures("small_backbone")
SIMCLR, METAMASK = {"config": "simclr.yaml"}, {"config": "metamask.yaml"}


def finish(file: Path, *overrides: str, **result: Any) -> None:
    """Puts made-up results into the folders of a benchmark's runs."""
    for run in read_plan(file, list(overrides)).runs:
        run.folder.mkdir(parents=True, exist_ok=True)
        knn = 40.0 + 10 * (run.method == "metamask") + run.seed
        content = {"knn": knn, "linear": knn + 5, "epochs": 1, **result}
        (run.folder / "result.json").write_text(json.dumps(content))


def command(file: Path, *arguments: str) -> int:
    return main(["benchmark", str(file), *arguments])


def test_a_file_is_read_as_what_was_written(
    benchmark_file: Callable[..., Path], tmp_path: Path
) -> None:
    file = benchmark_file(untrained=["pixels"])
    more = {"knn": 100 / 3, "logged/loss": float("nan"), "curve": "1:2.5", "commit": "0123e4"}
    finish(file, **more, notes='kNN: "low", 3 %; collapsed')
    rows = read_results(read_plan(file, []), {})
    path = tmp_path / "rows.csv"
    path.write_text(csv_text(rows))

    again = read_csv(path)
    pd.testing.assert_frame_equal(again[rows.columns], rows, check_dtype=False)
    assert csv_text(again) == path.read_text()
    assert list(rows.method) == ["pixels", "simclr", "simclr", "metamask", "metamask"]
    path.write_text("a;b\n1;2\n")
    with pytest.raises(UserError, match=r"rows.csv: is no table of a benchmark \(no column method"):
        read_csv(path)


def test_failed_and_pending_runs_have_a_row(
    benchmark_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = benchmark_file()
    assert command(file, "--tables-only") == 1
    assert "nothing is finished yet" in capsys.readouterr().out
    finish(file, "seeds=[0]", notes="linear probe: not converged")
    failed = read_plan(file, []).runs[-1].folder
    results.write_json(failed / "failed.json", {"error": "no | memory"})

    rows = read_results(read_plan(file, []), {})
    assert list(rows.status) == ["finished", "pending", "finished", "failed"]
    assert command(file, "--tables-only") == 1
    printed = capsys.readouterr().out
    assert "4 runs (2 finished, 1 failed)" in printed
    assert "- metamask, seed 1: no | memory" in printed
    assert printed.count("- metamask, seed 0: linear probe: not converged") == 1


def test_rows_stand_for_runs_elsewhere_and_are_added_to(
    benchmark_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = tmp_path / "rows.csv"
    file = benchmark_file(seeds=[0, 1, 2], rows=str(shared))
    finish(file)
    assert command(file) == 0
    report = capsys.readouterr().out
    shutil.rmtree(tmp_path / "out")

    # without the runs' folders nothing is run again, and the report is the same
    assert command(file) == 0
    again = capsys.readouterr().out
    assert "6 runs, 6 finished before" in again and again == report
    before = shared.read_text()
    assert command(file, "--from-rows") == 0
    printed = capsys.readouterr().out
    assert all(line in printed for line in report.splitlines() if line.startswith(("|", "-")))
    assert shared.read_text() == before
    # a further seed is added; the others stay
    finish(file, "seeds=[3]")
    assert command(file, "seeds=[3]", "--tables-only") == 0
    assert sorted(read_csv(shared).seed.unique()) == [0, 1, 2, 3]
    # another name of the same run has lines of its own, and takes its results from those
    assert command(file, "methods.copy.config=simclr.yaml", "only=[copy]", "--tables-only") == 0
    lines = read_csv(shared).method.value_counts().to_dict()
    assert lines == {"simclr": 4, "metamask": 4, "copy": 3}
    # a line that another config has taken is refused before any work
    assert command(file, "overrides=[optimizer.lr=0.125]", "--tables-only") == 2
    said = capsys.readouterr().err
    assert f"rows={shared}: simclr, seed 0 is there with other settings" in said
    assert said.count("\n") == 1


def test_methods_are_the_same_by_their_settings(benchmark_file: Callable[..., Path]) -> None:
    """Not by their names: settings can be changed."""
    methods = {"simclr": SIMCLR, "heads": METAMASK}
    for name, kind in (("joint", "linear"), ("fixed_mask", "sigmoid")):
        changes = [f"method_kwargs.{key}" for key in ("meta.enabled=False", f"mask.kind={kind}")]
        methods[name] = {**METAMASK, "overrides": changes}
    file = benchmark_file(methods=methods, seeds=[0])
    rows = read_results(read_plan(file, []), {})
    assert results.same_methods(rows) == ("joint", "fixed_mask")
    assert results.learned_masks(rows) == {"heads"}
    assert results.same_but_for_the_mask(rows, ("heads", "joint"))
    assert not results.same_but_for_the_mask(rows, ("heads", "simclr"))
    tuned = ["methods.joint.overrides+=[optimizer.lr=0.125]"]
    rows = read_results(read_plan(file, tuned), {})
    assert results.same_methods(rows) == ()
    assert not results.same_but_for_the_mask(rows, ("heads", "joint"))


def test_benchmarks_that_end_at_once_add_to_one_file(
    benchmark_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "rows.csv"
    file = benchmark_file(rows=str(shared))
    finish(file)
    plan = read_plan(file, [])
    rows = read_results(plan, {})
    results.add_to_file(plan.file, rows[:1])

    def slow(path: Path) -> pd.DataFrame:
        read = read_csv(path)
        time.sleep(0.2)
        return read

    monkeypatch.setattr(results, "read_csv", slow)
    with ThreadPoolExecutor() as pool:
        [*pool.map(lambda n: results.add_to_file(plan.file, rows[n : n + 1]), range(1, 4))]
    assert len(read_csv(shared)) == 4


def test_an_earlier_table_of_other_settings_is_kept(
    benchmark_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = benchmark_file()
    finish(file)
    assert command(file) == 0
    (table,) = tmp_path.rglob("results.csv")
    before = table.read_bytes()
    figure = table.with_name("differences.png")
    figure.touch()
    assert command(file, "--tables-only") == 0  # the same runs
    assert not figure.exists()  # of two seeds there is none
    assert command(file, "--tables-only", "methods.simclr.overrides=[optimizer.lr=0.125]") == 1
    aside = table.with_name("results-1.csv")
    assert f"{aside}: the earlier results, of other settings" in capsys.readouterr().out
    assert aside.read_bytes() == before and table.read_bytes() != before


def test_rows_that_are_no_runs_of_one_benchmark_are_refused(
    benchmark_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = tmp_path / "rows.csv"
    file = benchmark_file(rows=str(shared))
    finish(file)
    whole = read_results(read_plan(file, []), {})
    first = whole.index == 0
    other_seed = whole.assign(config_digest=whole.config_digest.mask(first, "other"))
    other_images = whole.assign(data_digest=whole.data_digest.mask(whole.method == "simclr", ""))
    for rows, override, words in (
        (pd.concat([whole, whole[:1]]), "name=a", "two lines"),
        (other_seed, "name=a", "simclr: its seeds have different settings"),
        (other_images, "name=a", "different images or evaluations"),
        (whole.drop(columns="linear"), "name=a", "some runs have no linear"),
        (whole, "epochs=9", "no finished run of these methods"),
        (whole, "overrides=[optimizer.lr=1]", "changes no rows"),
        (whole, "data=digits", "changes no rows"),
    ):
        shared.write_text(csv_text(rows))
        assert command(file, "--from-rows", override) == 2
        assert words in capsys.readouterr().err


@pytest.mark.skipif(RELEASE != "1.0.2", reason="the rows were made with 1.0.2")
@pytest.mark.parametrize("name", list(ROWS))
def test_the_rows_of_the_pages_are_known_by_the_shipped_files(name: str) -> None:
    """So that their runs are not run again; ``tools/renew_digests.py`` renews them."""
    rows = read_csv(ROOT / "docs" / "results" / f"{name}.csv")
    expected = renewed(rows, *ROWS[name])
    pd.testing.assert_frame_equal(rows, expected)


def test_the_best_setting_of_each_method() -> None:
    def lines(method: str, setting: str, *knn: float, linear: float = 0.0) -> list[dict[str, Any]]:
        line = {"method": method, "setting": setting, "variant": f"{method} {setting}"}
        line |= {"status": "finished", "linear": linear}
        return [{**line, "seed": seed, "knn": value} for seed, value in enumerate(knn)]

    table = [*lines("a", "lr=1", 50, 52), *lines("a", "lr=2", 60, 40), *lines("a", "lr=3", 99)]
    table += [*lines("b", "lr=1", 16, 16), *lines("b", "lr=2", 16, 16, linear=1.0)]
    best = best_settings(pd.DataFrame(table), ["knn", "linear"])

    assert list(best.variant) == ["a lr=1", "b lr=2"]  # fewer seeds are no match; then the next
    assert list(best.knn) == [51, 16] and list(best.runs) == [2, 2]
