"""The command ``metamask-solo fold``; what it writes: tests/checkpoints/test_exporting.py."""

from pathlib import Path

import pytest
from checkpoints_of_runs import write_backbone_run

from metamask_solo.__main__ import main


def test_it_says_what_it_wrote_and_what_comes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_backbone_run(tmp_path / "run", "resnet18", "cifar10")
    monkeypatch.chdir(tmp_path)
    timm = "import metamask_solo.checkpoints.timm_stems"
    for arguments, made, following in (
        ("out", "out/folded.ckpt", "next: metamask-solo knn out/folded.ckpt"),
        ("m.pth --timm", "m.pth", f"its model: {timm}"),
        ("v1.0/ --timm", "v1.0", f"open it: {timm}"),
    ):
        assert main(["fold", "run", *arguments.split()]) == 0
        first, second = capsys.readouterr().out.splitlines()
        assert first == f"{made}: 512 dimensions folded, 1 of them as 0 (weights below 2^-60)"
        assert second.startswith(following)
    assert main(["fold", "run", "out"]) == 2
    assert main(["fold", "run", "out", "--force"]) == 0
