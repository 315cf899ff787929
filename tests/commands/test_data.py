"""The command ``metamask-solo data``; its ``split`` is tested with data/split.py."""

import shlex
from pathlib import Path

import pytest

from metamask_solo.__main__ import main
from metamask_solo.data import digits


def test_it_writes_a_set_once_and_says_what_trains_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for said in ("written", "already there"):
        assert main(["data", "digits"]) == 0
        made, following = capsys.readouterr().out.splitlines()
        assert made == f"datasets/digits: {said}"
    command = shlex.split(following.removeprefix("next: metamask-solo "))
    assert main([*command, "--cfg-check"]) == 0


def test_it_writes_where_it_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(digits, "write_dataset", lambda *call: calls.append(call) or True)
    assert main(["data", "digits", "textured-digits", "--out=there", "--force"]) == 0
    names = ("digits", "textured-digits")
    assert calls == [(name, Path("there"), True) for name in names]
    # the packaged files, which read another folder, are not named
    assert capsys.readouterr().out.splitlines() == [f"there/{name}: written" for name in names]
