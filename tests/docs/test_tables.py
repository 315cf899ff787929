"""The tables of README and docs follow from the code and from the rows in docs/results."""

import json
from pathlib import Path

import pandas as pd
import pytest
import tables

from metamask_solo import hosts
from metamask_solo.method.settings import SETTINGS


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.stem)
def test_the_pages_hold_the_tables(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tables.ROOT)
    text = page.read_text()

    assert len(tables.BLOCK.findall(text)) == text.count("<!-- table: ")
    assert tables.renewed(text) == text  # else: make docs


def test_every_setting_says_what_it_does() -> None:
    assert [key for key, setting in SETTINGS.items() if not setting.description] == []


def test_every_method_of_this_release_was_run() -> None:
    outcome = json.loads((tables.DOCS / f"results/methods_{hosts.RELEASE}.json").read_text())
    assert not outcome["commit"].endswith("-dirty")
    assert set(outcome["methods"]) == set(hosts.trainable_methods())
    assert all(set(done) == set(tables.COLUMNS) for done in outcome["methods"].values())


def test_every_row_says_where_it_comes_from() -> None:
    for file in sorted((tables.DOCS / "results").glob("*.csv")):
        rows = pd.read_csv(file, dtype={"commit": str})
        assert len(rows) and (rows.status == "finished").all(), file
        assert rows.commit.notna().all() and not rows.commit.str.endswith("-dirty").any(), file
        assert rows.digest.is_unique, file
