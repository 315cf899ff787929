"""The tables of docs are those of tools/tables.py, and speak of every method and setting."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import tables

from metamask_solo import hosts
from metamask_solo.method.settings import SETTINGS


def test_the_pages_hold_the_tables() -> None:
    for path, text in tables.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"run `make docs`: {path.name}"


def test_every_setting_says_what_it_does() -> None:
    assert [key for key, setting in SETTINGS.items() if not setting.description] == []


def test_every_method_of_this_release_was_run() -> None:
    outcome = json.loads((tables.DOCS / f"results/methods_{hosts.RELEASE}.json").read_text())
    assert set(outcome["methods"]) == set(hosts.trainable_methods())
    assert all(set(done) == set(tables.COLUMNS) for done in outcome["methods"].values())


def test_a_new_outcome_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = json.dumps({"commit": "abc", "versions": {}, "methods": {"metamask": {"fold": False}}})
    for release in tables.RELEASES:
        (tmp_path / "results").mkdir(exist_ok=True)
        (tmp_path / f"results/methods_{release}.json").write_text(old)
    (tmp_path / "matrix.json").write_text('{"byol": {"pretrain": true, "resume": false}}')
    monkeypatch.setattr(tables, "_outcome", lambda r: tmp_path / f"results/methods_{r}.json")
    tables.take(tmp_path / "matrix.json")

    rows = [[cell.strip() for cell in row.split("|")] for row in tables.methods_table().split("\n")]
    metamask, byol = rows[2][2:-1], rows[3][2:-1]
    here, there = (slice(4), slice(4, 8)) if hosts.RELEASE == "1.0.2" else (slice(4, 8), slice(4))
    assert metamask[here] == ["–"] * 4 and metamask[there] == ["not run"] * 3 + ["**no**"]
    assert byol[here] == ["yes", "**no**", "not run", ""] and byol[there] == ["–"] * 4


def test_nothing_of_the_picture_lies_outside_its_card() -> None:
    root = ElementTree.parse(tables.DOCS / "images/idea.svg").getroot()
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    boxes = [element.attrib for element in root.iter() if element.get("x")]
    assert len(boxes) > 20
    for box in boxes:
        assert 0 <= float(box["x"]) <= float(box["x"]) + float(box.get("width", 0)) <= width
        assert 0 <= float(box["y"]) <= float(box["y"]) + float(box.get("height", 0)) <= height
