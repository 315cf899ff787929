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


def test_one_form_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["fold", "run", str(tmp_path / "out.pth"), "--timm", "--torchvision"])
    assert caught.value.code == 2
    assert "not allowed with" in capsys.readouterr().err
    assert main(["fold", str(tmp_path / "nowhere.ckpt"), str(tmp_path / "out")]) == 2
    assert "nowhere.ckpt: no such checkpoint" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
