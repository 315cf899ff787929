"""Splitting a folder of images by links."""

import os
import subprocess
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from PIL import Image
from runs import write_images
from torchvision.datasets import ImageFolder

from metamask_solo.__main__ import main
from metamask_solo.data.splitting import split_folder
from metamask_solo.errors import UserError


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Three classes of 20, 10 and 2 images, and what lies about in folders of images."""
    root = tmp_path / "photographs"
    for name, count in (("ant", 20), ("bee", 10), ("cat", 2)):
        (root / name / "more").mkdir(parents=True)
        for i in range(count):
            place = root / name / ("more" if i % 2 else "") / f"{i}.JPG"
            Image.new("RGB", (8, 8), (i, 0, 0)).save(place, format="JPEG")
    (root / ".ipynb_checkpoints").mkdir()
    Image.new("RGB", (8, 8)).save(root / ".ipynb_checkpoints" / "0.png")
    (root / "ant" / "._0.JPG").write_bytes(b"resource fork")
    (root / "ant" / "notes.txt").write_text("about ants")
    (root / "empty").mkdir()
    return root


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_each_class_is_split_by_itself(photographs: Path, tmp_path: Path) -> None:
    made = split_folder(photographs, tmp_path / "out", 0.1)

    train, val = (ImageFolder(str(tmp_path / "out" / split)) for split in ("train", "val"))
    assert train.classes == val.classes == made.classes == ["ant", "bee", "cat"]
    assert [train.targets.count(label) for label in range(3)] == [18, 9, 1]
    assert [val.targets.count(label) for label in range(3)] == [2, 1, 1]
    originals = [os.path.realpath(path) for path, _ in train.samples + val.samples]
    assert len(set(originals)) == 32 == made.train + made.val
    assert all(Path(path).is_relative_to(photographs) for path in originals)
    assert all(os.path.islink(path) for path, _ in train.samples + val.samples)
    assert len(files(photographs)) == 35  # nothing was moved


def test_it_is_the_same_each_time_and_another_by_the_seed(
    photographs: Path, tmp_path: Path
) -> None:
    first, again, other = (
        split_folder(photographs, tmp_path / name, 0.3, seed)
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert files(first.out) == files(again.out) != files(other.out)
    assert split_folder(photographs, first.out, 0.3).written is False

    before = set(files(first.out / "val"))
    Image.new("RGB", (8, 8)).save(photographs / "bee" / "new.png")
    assert split_folder(photographs, first.out, 0.3).written is True
    after = set(files(first.out / "val"))
    assert len(before ^ after) <= 2  # one more image moves no more than the border


def test_a_flat_folder_has_no_classes(photographs: Path, tmp_path: Path) -> None:
    made = split_folder(photographs / "ant", tmp_path / "out", 0.25, flat=True)

    assert (made.train, made.val, made.classes) == (15, 5, [])
    names = files(tmp_path / "out" / "train") + files(tmp_path / "out" / "val")
    assert len(names) == 20 and all("/" not in name for name in names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "cat" / "0.JPG").unlink(), "cat: has 1 image"),
        (lambda root: [(root / s).mkdir() for s in ("train", "val")], "it is split"),
    ],
)
def test_what_cannot_be_split_is_said(
    photographs: Path, tmp_path: Path, change: object, message: str
) -> None:
    change(photographs)  # type: ignore[operator]
    with pytest.raises(UserError, match=message):
        split_folder(photographs, tmp_path / "out", 0.1)
    assert not (tmp_path / "out").exists()


def test_nothing_else_is_overwritten(photographs: Path, tmp_path: Path) -> None:
    own = tmp_path / "out" / "train" / "ant" / "mine.png"
    own.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(own)

    with pytest.raises(UserError, match="train/ant/mine.png, which is no link"):
        split_folder(photographs, tmp_path / "out", 0.1)
    for share in (0, 1, float("nan")):
        with pytest.raises(UserError, match="--val"):
            split_folder(photographs, tmp_path / "new", share)
    with pytest.raises(UserError, match="lies in"):
        split_folder(photographs, photographs / "split", 0.1)
    assert own.is_file()


def test_the_command_says_what_to_do_next(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["data", "split", str(photographs), "--val", "0.5", "--out", str(out)]) == 0
    made, after = capsys.readouterr().out.splitlines()
    assert made == (
        f"{out}: 16 training and 16 validation images, 3 classes; "
        "left out, without an image: 1 folder (empty)"
    )
    assert after.startswith("next: metamask-solo pretrain") and f"{out}/train" in after

    assert main(["data", "split", str(photographs), "--flat", "--out", str(out)]) == 0
    assert "data.no_labels=True" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["my photos, (2024)", "it's", 'a"b', "été", "a=b$HOME", "back\\slash", 'a\\"b']
)
def test_the_next_command_can_be_pasted_into_a_shell(
    name: str, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / name
    assert main(["data", "split", str(photographs), "--out", str(out)]) == 0
    command = capsys.readouterr().out.splitlines()[1].removeprefix("next: ")
    words = subprocess.run(
        ["sh", "-c", f'for word in {command}; do printf "%s\\0" "$word"; done'],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    parser = OverridesParser.create()
    read = [parser.parse_override(word).value() for word in words if word.startswith("data.")]
    texts = [value.text if isinstance(value, QuotedString) else value for value in read]
    assert texts == [f"{out}/train", f"{out}/val"]


def test_a_split_of_another_folder_is_not_replaced(tmp_path: Path) -> None:
    one, other = (write_images(tmp_path / name, classes=2) / "train" for name in ("one", "two"))
    out = tmp_path / "out"
    split_folder(one, out, 0.3)
    before = sorted(path.resolve() for path in out.rglob("*.png"))
    with pytest.raises(UserError, match="holds the split of another folder.*--force"):
        split_folder(other, out, 0.3)
    assert sorted(path.resolve() for path in out.rglob("*.png")) == before
    split_folder(one, out, 0.5)  # its own may change

    split_folder(other, out, 0.3, force=True)
    assert all(path.resolve().is_relative_to(other) for path in out.rglob("*.png"))
