"""Aggregation against numbers computed by hand."""

import csv
import io
import math
from pathlib import Path
from typing import Any

import pytest

from metamask_solo.benchmark.plan import Plan
from metamask_solo.benchmark.tables import (
    best_settings,
    clear_winner,
    csv_table,
    group,
    markdown,
    mean_and_deviation,
    paired_difference,
)

# of Student's distribution with 2 degrees of freedom, from a printed table
T_975_2 = 4.302653


def rows(method: str, knn: list[float], setting: str = "", **more: Any) -> list[dict[str, Any]]:
    return [
        {
            "method": method,
            "setting": setting,
            "seed": seed,
            "status": "finished",
            "knn": value,
            "seconds_per_epoch": 2.0 + seed,
            "seconds_per_step": None,
            "peak_memory_mib": 100.0,
            "parameters": 11_000_000,
            "epochs": 1,
            "device": "cpu",
            "commit": None,
            "curve": [],
            **dict.fromkeys(("metamask-solo", "solo-learn", "torch", "lightning", "python"), "1"),
            **more,
        }
        for seed, value in enumerate(knn)
    ]


def plan(**keys: Any) -> Plan:
    content: dict[str, Any] = {
        "name": "t",
        "out": Path("out"),
        "data": "digits",
        "methods": ["a", "b", "c"],
        "evaluations": ["knn"],
        "launcher": {"name": "basic"},
        "reference": "a",
        "keep_checkpoints": True,
        "searched": False,
        "runs": [],
        **keys,
    }
    return Plan(**content)


def test_mean_and_deviation() -> None:
    # deviations from 4: -2, 0, 2; their squares by n - 1: 8 / 2
    assert mean_and_deviation([2.0, 4.0, 6.0]) == (4.0, 2.0)
    assert mean_and_deviation([5.0]) == (5.0, None)


def test_the_difference_is_paired_by_the_seed() -> None:
    one = rows("a", [50.0, 60.0, 70.0])
    other = list(reversed(rows("b", [49.0, 58.0, 67.0])))  # the order must not count

    mean, interval = paired_difference(one, other, "knn") or (None, None)

    # differences 1, 2, 3: mean 2, deviation 1
    assert mean == pytest.approx(2.0)
    assert interval == pytest.approx([2 - T_975_2 / math.sqrt(3), 2 + T_975_2 / math.sqrt(3)])


def test_a_difference_needs_common_seeds() -> None:
    one, other = rows("a", [50.0, 60.0]), rows("b", [40.0, 41.0])

    assert paired_difference(one[:1], other[1:], "knn") is None
    assert paired_difference(one, other[1:], "knn") == (19.0, None)


def test_bold_only_where_it_is_clear() -> None:
    a, b = rows("a", [53.0, 61.0, 72.0]), rows("b", [50.0, 58.0, 69.5])  # 3, 3, 2.5
    c = rows("c", [55.0, 58.0, 69.0])  # -2, 3, 3

    assert clear_winner(group([*a, *b]), "knn") == "a"
    assert clear_winner(group([*a, *b, *c]), "knn") is None
    assert clear_winner(group(a), "knn") is None

    text = markdown(plan(), [*a, *b, *c], [])
    # means 62, 59.17, 60.67; deviations by hand
    assert "| a | 3 | 62.00 ± 9.54 | 3.0 | – | 100 | 11,000,000 |" in text
    # 3, 3, 2.5: mean 2.8333, deviation 0.2887, half an interval 0.7171
    assert "| b | **+2.83 (+2.12 to +3.55)** |" in text
    assert "| c | +1.33 (-5.84 to +8.50) |" in text
    assert "**62.00" not in text
    assert "| a | 3 | **62.00 ± 9.54** |" in markdown(plan(), [*a, *b], [])


def test_a_failed_run_has_a_row_and_does_not_count() -> None:
    failed = {"method": "b", "setting": "", "seed": 1, "status": "failed", "error": "no | memory"}
    finished = [*rows("a", [50.0, 60.0]), *rows("b", [40.0])]

    table = list(csv.DictReader(io.StringIO(csv_table([*finished, failed]))))
    text = markdown(plan(), [*finished, failed], [])

    assert [row["status"] for row in table] == ["finished", "finished", "finished", "failed"]
    assert table[3]["error"] == "no | memory" and table[3]["knn"] == ""
    assert "4 runs (3 finished, 1 failed)" in text
    assert "- b, seed 1: no | memory" in text
    assert "| b | +10.00 |" in text  # one common seed: no interval, not bold


def test_the_csv_has_every_number_unrounded() -> None:
    third = rows("a", [100 / 3], **{"logged/z": 1.0, "logged/b": 1 / 7})

    (row,) = csv.DictReader(io.StringIO(csv_table(third)))

    assert float(row["knn"]) == 100 / 3
    assert float(row["logged/b"]) == 1 / 7
    assert list(row)[-3:] == ["logged/b", "logged/z", "error"]
    assert "curve" not in row


def test_the_best_setting_of_each_method() -> None:
    found = [
        *rows("a", [50.0, 52.0], "lr=1"),
        *rows("a", [60.0, 40.0], "lr=2"),
        *rows("b", [10.0, 20.0], "lr=1"),
        *rows("b", [16.0, 16.0], "lr=2"),
    ]

    assert list(best_settings(found, "knn")) == ["a lr=1", "b lr=2"]

    text = markdown(plan(searched=True), found, [])
    assert "| a | `lr=1` | 51.00 ± 1.41 |" in text
    assert "| b | `lr=2` | 16.00 ± 0.00 |" in text
    assert "Paired" not in text and "**" not in text
