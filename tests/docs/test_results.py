"""The tables of docs/results.md are those of the rows that are committed beside it."""

import csv

from update_results import BLOCK, PAGE, ROOT, renewed


def test_the_tables_follow_from_the_rows() -> None:
    text = PAGE.read_text()

    assert len(BLOCK.findall(text)) == text.count("--from-rows -->") >= 2
    assert renewed(text) == text  # else: python tools/update_results.py


def test_every_row_says_where_it_comes_from() -> None:
    for file in sorted((ROOT / "docs" / "results").glob("*.csv")):
        with file.open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        assert rows
        for row in rows:
            assert row["status"] == "finished" and row["seed"], file
            assert row["commit"] and not row["commit"].endswith("-dirty"), file
        digests = [row["digest"] for row in rows]
        assert len(set(digests)) == len(digests), file
