"""The command ``metamask-solo fold``."""

from pathlib import Path

import pytest

from metamask_solo.checkpoints import folding
from metamask_solo.commands import fold
from metamask_solo.errors import UserError


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str, bool]]:
    """Replaces the folding, and lists the calls."""
    calls: list[tuple[str, str, str, bool]] = []

    def record(checkpoint: str, out: str, form: str, force: bool) -> folding.Folded:
        calls.append((checkpoint, out, form, force))
        return folding.Folded(Path(out) / "folded.ckpt", 512, 3)

    monkeypatch.setattr(folding, "fold_checkpoint", record)
    return calls


def test_it_tells_what_it_wrote(
    calls: list[tuple[str, str, str, bool]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert fold.main(["run", "out"]) == 0

    assert calls == [("run", "out", "host", False)]
    assert capsys.readouterr().out.splitlines() == [
        "out/folded.ckpt: 512 dimensions folded, 3 of them floored to 0",
        "next: metamask-solo knn out/folded.ckpt",
    ]


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_it_passes_form_and_force_on(calls: list[tuple[str, str, str, bool]], library: str) -> None:
    fold.main(["run", "out.pth", f"--{library}", "--force"])

    assert calls == [("run", "out.pth", library, True)]


def test_one_form_at_a_time(
    calls: list[tuple[str, str, str, bool]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        fold.main(["run", "out.pth", "--timm", "--torchvision"])

    assert caught.value.code == 2
    assert "not allowed with" in capsys.readouterr().err
    assert calls == []


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        fold.main(["--help"])

    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "usage: metamask-solo fold" in text
    assert all(word in text for word in ("CHECKPOINT", "OUT", "--timm", "--torchvision", "--force"))


def test_a_checkpoint_that_is_not_there_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        fold.main([str(tmp_path / "nowhere.ckpt"), str(tmp_path / "out")])

    assert list(tmp_path.iterdir()) == []
