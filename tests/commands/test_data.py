"""The command ``metamask-solo data``; its ``split`` is tested with data/split.py."""

from pathlib import Path

import pytest

from metamask_solo.commands import data
from metamask_solo.data import digits


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path, bool]]:
    """Replaces the writing, and lists the calls."""
    calls: list[tuple[str, Path, bool]] = []

    def record(name: str, out: Path, force: bool) -> bool:
        calls.append((name, out, force))
        return name != "digits"

    monkeypatch.setattr(digits, "write_dataset", record)
    return calls


def test_it_writes_the_named_sets(
    written: list[tuple[str, Path, bool]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert data.main(["digits", "textured-digits"]) == 0
    out = Path("datasets")
    assert written == [("digits", out, False), ("textured-digits", out, False)]
    printed = capsys.readouterr().out.splitlines()
    assert printed[::2] == ["datasets/digits: already there", "datasets/textured-digits: written"]
    for line, name in zip(printed[1::2], ("digits", "textured-digits"), strict=True):
        assert line.startswith("next: metamask-solo pretrain") and line.count(f"/{name} ") == 1
    data.main(["digits", "--out=~/elsewhere", "--force"])
    assert written[-1] == ("digits", Path.home() / "elsewhere", True)
