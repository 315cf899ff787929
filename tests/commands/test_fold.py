"""The command ``metamask-solo fold``."""

from pathlib import Path

import pytest
from checkpoints_of_runs import write_backbone_run

from metamask_solo.__main__ import main


@pytest.mark.parametrize(
    ("options", "out", "lines"),
    [
        ([], "out", ["out/folded.ckpt: 512 dimensions folded, 1 of them floored to 0"]),
        (["--torchvision"], "m.pth", ["m.pth: 512 dimensions folded, 1 of them floored to 0"]),
        (
            ["--timm"],
            "v1.0/",
            ["v1.0: 512", "open it: import metamask_solo.checkpoints.timm_stems"],
        ),
    ],
)
def test_it_says_what_it_wrote(
    options: list[str],
    out: str,
    lines: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_backbone_run(tmp_path / "run", "resnet18", "cifar10")
    monkeypatch.chdir(tmp_path)
    assert main(["fold", "run", out, *options]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [p[: len(line)] for p, line in zip(printed, lines, strict=False)] == lines
    if not options:
        assert printed[1] == "next: metamask-solo knn out/folded.ckpt"
    assert main(["fold", "run", out, *options]) == 2
    assert main(["fold", "run", out, *options, "--force"]) == 0
