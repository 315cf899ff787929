"""The command ``metamask-solo fold``."""

from pathlib import Path

import pytest
from checkpoints_of_runs import write_backbone_run

from metamask_solo.__main__ import main


@pytest.mark.parametrize(
    ("out", "lines"),
    [
        ("out", ["out/folded.ckpt: ", "next: metamask-solo knn out/folded.ckpt"]),
        (
            "m.pth --timm",
            ["m.pth: ", "its model: import metamask_solo.checkpoints.timm_stems"],
        ),
        ("v1.0/ --timm", ["v1.0: ", "open it: import metamask_solo.checkpoints.timm_stems"]),
    ],
)
def test_it_says_what_it_wrote(
    out: str,
    lines: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_backbone_run(tmp_path / "run", "resnet18", "cifar10")
    monkeypatch.chdir(tmp_path)
    command = ["fold", "run", *out.split()]
    assert main(command) == 0
    lines[0] += "512 dimensions folded, 1 of them as 0 (weights below 2^-60)"
    printed = capsys.readouterr().out.splitlines()
    assert [p[: len(line)] for p, line in zip(printed, lines, strict=True)] == lines
    assert main(command) == 2
    assert main([*command, "--force"]) == 0
