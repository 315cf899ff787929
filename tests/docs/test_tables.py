"""The tables of docs are those of tools/tables.py, and speak of every method and setting."""

import json

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
