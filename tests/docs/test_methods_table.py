"""The page of methods says what the matrix found, for every method of the release that is here."""

import json
from pathlib import Path

import methods_table
import pytest
from marked import with_table
from methods_table import PAGE, read_results, table

from metamask_solo import hosts
from metamask_solo.training.config_checks import NOT_TRAINABLE


def test_the_table_is_that_of_the_outcome() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_table(page, "methods", table(read_results())), (
        "run `python tools/methods_table.py`"
    )


def test_every_method_of_this_release_is_in_it_and_was_run() -> None:
    outcome = read_results()[hosts.RELEASE]["methods"]
    assert set(outcome) == set(hosts.METHODS) - set(NOT_TRAINABLE)
    assert all(set(done) == {"pretrain", "resume", "knn", "fold"} for done in outcome.values())


def test_what_fails_and_what_is_not_there_is_said() -> None:
    good = {"pretrain": True, "resume": True, "knn": True, "fold": True}
    about = {"commit": "abc", "versions": {"torch": "2"}}
    results = {
        "old": {
            **about,
            "methods": {"metamask": good, "byol": {"pretrain": True, "resume": False}},
        },
        "new": {**about, "methods": {"metamask": {**good, "fold": False}}},
    }
    rows = {line.split("|")[1].strip(" `"): line for line in table(results).splitlines()[2:4]}
    cells = {name: [c.strip() for c in line.split("|")[2:-1]] for name, line in rows.items()}
    assert cells["metamask"] == ["yes"] * 7 + ["**no**"]
    assert cells["byol"] == ["yes", "**no**", "not run", ""] + ["–"] * 4


def test_an_outcome_is_kept_with_what_it_was_run_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods_table, "RESULTS", {hosts.RELEASE: tmp_path / "kept.json"})
    (tmp_path / "matrix.json").write_text('{"byol": {"pretrain": true}}')
    kept = json.loads(methods_table.take(tmp_path / "matrix.json").read_text())
    assert kept["methods"] == {"byol": {"pretrain": True}} and kept["versions"]["torch"]
    assert "| `byol` | yes | not run | not run |  |" in table(read_results())
