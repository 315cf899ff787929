"""The tables of README and docs/results.md are those of the rows that are committed beside them."""

from pathlib import Path

import pandas as pd
import pytest
from update_results import BLOCK, PAGES, ROOT, renewed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tables_follow_from_the_rows(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = page.read_text()

    assert len(BLOCK.findall(text)) == text.count("<!-- rows: ") >= 1
    assert renewed(text) == text  # else: python tools/update_results.py


def test_every_row_says_where_it_comes_from() -> None:
    for file in sorted((ROOT / "docs" / "results").glob("*.csv")):
        rows = pd.read_csv(file, dtype={"commit": str})
        assert len(rows) and (rows.status == "finished").all(), file
        assert rows.commit.notna().all() and not rows.commit.str.endswith("-dirty").any(), file
        assert rows.digest.is_unique, file


def test_the_words_of_the_page_are_few() -> None:
    words = (ROOT / "docs" / "results.md").read_text().split()
    assert sum(any(map(str.isalpha, word)) for word in words) <= 1200
