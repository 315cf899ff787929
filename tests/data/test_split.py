"""Splitting a folder of images by links."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from PIL import Image
from runs import write_images
from torchvision.datasets import ImageFolder

from metamask_solo.__main__ import main
from metamask_solo.data.datasets import read_folder
from metamask_solo.data.split import Split, split_folder
from metamask_solo.errors import UserError


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Three classes of 20, 10 and 2 images, and what lies about in folders of images."""
    root = tmp_path / "photographs"
    for name, count in (("ant", 20), ("bee", 10), ("cat", 2)):
        (root / name / "more").mkdir(parents=True)
        for i in range(count):
            file = root / name / ("more" if i % 2 else "") / f"{i}.JPG"
            Image.new("RGB", (8, 8), (i, ord(name[0]), 0)).save(file, format="JPEG", quality=100)
    (root / "ant" / "notes.heic").write_text("about ants")
    Image.new("RGB", (8, 8)).save(root / "beside.png")
    return root


def links(out: Path) -> dict[str, str]:
    """Image to train or val."""
    return {
        path.relative_to(out / side).as_posix(): side
        for side in ("train", "val")
        for path in (out / side).rglob("*")
        if path.is_symlink()
    }


def test_each_class_is_split_by_itself(photographs: Path, tmp_path: Path) -> None:
    made = split_folder(photographs, tmp_path / "out", 0.3)
    train, val = (ImageFolder(str(tmp_path / "out" / split)) for split in ("train", "val"))
    assert train.classes == val.classes == made.train.classes == ["ant", "bee", "cat"]
    originals = [os.path.realpath(path) for path, _ in train.samples + val.samples]
    assert len(set(originals)) == 32 == len(made.train) + len(made.val)
    assert all(Path(path).is_relative_to(photographs) for path in originals)
    assert len(list(photographs.rglob("*.JPG"))) == 32  # nothing was moved
    assert 2 <= val.targets.count(0) <= 10 and val.targets.count(2) == 1


def test_the_share_is_that_of_many_images(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(1000):
        (photos / f"{i}.png").write_bytes(b"")
    made = split_folder(photos, tmp_path / "out", 0.2, seed=1)
    assert abs(len(made.val) - 200) <= 38  # three standard deviations


def test_an_image_stays_where_it_is(photographs: Path, tmp_path: Path) -> None:
    first = split_folder(photographs, tmp_path / "first", 0.1)
    before = links(first.out)
    (first.out / "train" / ".DS_Store").touch()  # the system's own
    assert split_folder(photographs, first.out, 0.1).written is False
    for name in ("ant", "bee", "cat"):
        for i in range(30):
            Image.new("RGB", (8, 8)).save(photographs / name / f"new{i}.png")
    assert split_folder(photographs, first.out, 0.1).written is True
    after = links(first.out)
    assert before.items() <= after.items() and len(after) == 32 + 90
    # on another machine, at once: only what had to be forced may differ
    elsewhere = links(split_folder(photographs, tmp_path / "elsewhere", 0.1).out)
    forced = [image for image in after if after[image] != elsewhere[image]]
    assert 1 <= len(forced) <= 3
    # from the same folder by another name, and from a copy
    (tmp_path / "link").symlink_to(photographs)
    shutil.copytree(photographs, tmp_path / "copy")
    for folder, force in (("link", False), ("copy", True)):
        split_folder(tmp_path / folder, first.out, 0.1, force=force)
        assert links(first.out) == after
    assert links(split_folder(photographs, tmp_path / "seed", 0.1, seed=1).out) != elsewhere


def test_a_flat_folder_has_no_classes(photographs: Path, tmp_path: Path) -> None:
    made = split_folder(photographs, tmp_path / "out", 0.25, flat=True)
    assert made.train.classes == [] and len(made.train) + len(made.val) == 33 and len(made.val) > 2
    assert all("/" not in name for name in links(made.out))
    (photographs / "ant_0.JPG").symlink_to("beside.png")
    with pytest.raises(UserError, match="two images would be ant_0.JPG"):
        split_folder(photographs, tmp_path / "new", 0.25, flat=True)


def test_what_is_left_out_is_said_by_the_split_and_by_its_readers(
    photographs: Path, tmp_path: Path
) -> None:
    first = sorted((photographs / "bee").rglob("*.JPG"))[0]
    for i in range(9):  # more copies than one part could hold
        shutil.copy(first, photographs / "bee" / f"again{i}.JPG")
    made = split_folder(photographs, tmp_path / "out", 0.5)
    text = "\n".join(made.notes)
    assert "1 image, such as beside.png, left out" in text and ".heic 1" in text
    assert "are copies of training images" in text
    assert read_folder(tmp_path / "out" / "val", "data").notes == made.notes[:-1]


def test_links_into_a_cache_are_compared_as_links(photographs: Path, tmp_path: Path) -> None:
    """As of dvc, git-annex and the hub: each image is a link to a file named by its content."""

    def into(cache: Path) -> None:
        for number, file in enumerate(sorted(photographs.rglob("*.JPG"))):
            content = file.read_bytes()
            file.unlink()
            cache.mkdir(exist_ok=True)
            (cache / str(number)).write_bytes(content)
            file.symlink_to(cache / str(number))

    into(tmp_path / "cache")
    out = split_folder(photographs, tmp_path / "out", 0.3).out
    assert split_folder(photographs, out, 0.3).written is False
    into(tmp_path / "moved")
    shutil.rmtree(tmp_path / "cache")
    assert split_folder(photographs, out, 0.3).written is False
    assert len(read_folder(out / "train", "data")) + len(read_folder(out / "val", "data")) == 32


def test_what_cannot_be_split_is_said(photographs: Path, tmp_path: Path) -> None:
    def split(out: Path, share: float = 0.1) -> Split:
        return split_folder(photographs, out, share)

    for share in (0, 1, float("nan")):
        with pytest.raises(UserError, match="--val"):
            split(tmp_path / "new", share)
    with pytest.raises(UserError, match="lies in"):
        split(photographs / "split")
    mine = tmp_path / "out" / "train" / "ant" / "mine.png"
    mine.parent.mkdir(parents=True)
    mine.write_text("")
    with pytest.raises(UserError, match="train/ant/mine.png, which is no link"):
        split(tmp_path / "out")
    (photographs / "cat" / "0.JPG").unlink()
    with pytest.raises(UserError, match="cat: has 1 image"):
        split(tmp_path / "new")
    (photographs / "test").mkdir()
    with pytest.raises(UserError, match="names of splits are no classes: test"):
        split(tmp_path / "new")
    assert not (tmp_path / "new").exists() and mine.is_file()


def test_a_split_of_another_folder_is_not_replaced(tmp_path: Path) -> None:
    one, two = (write_images(tmp_path / name, classes=2) / "train" for name in ("one", "two"))
    out = tmp_path / "out"
    split_folder(one, out, 0.3)
    before = sorted(path.resolve() for path in out.rglob("*.png"))
    with pytest.raises(UserError, match=f"holds the split of another folder .{one}.*--force"):
        split_folder(two, out, 0.3)
    assert sorted(path.resolve() for path in out.rglob("*.png")) == before
    for settings in ({"share": 0.5}, {"share": 0.3, "seed": 1}, {"share": 0.3, "flat": True}):
        old = {"share": "val=0.3", "seed": "seed=0", "flat": "flat=False"}[[*settings][-1]]
        with pytest.raises(UserError, match=f"holds a split with {old}; .*--force"):
            split_folder(one, out, **settings)  # type: ignore[arg-type]
    for link in (out / "train", *out.glob("train/class_0")):
        with pytest.raises(UserError, match=f"{link}: lies in the split that --out={out} holds"):
            split_folder(link, out, 0.3, force=True)
    assert sorted(path.resolve() for path in out.rglob("*.png")) == before
    (out / "split.json").write_text("[]")
    with pytest.raises(UserError, match="holds other links"):
        split_folder(one, out, 0.5)

    split_folder(two, out, 0.3, force=True)
    assert all(path.resolve().is_relative_to(two) for path in out.rglob("*.png"))


def test_the_command_says_what_can_be_pasted_into_a_shell(
    photographs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parser = OverridesParser.create()
    for name in ("my photos, (2024)", "it's é", "a=b$HOME", 'back\\slash\\"b'):
        out = tmp_path / name
        assert main(["data", "split", str(photographs), "--val", "0.5", f"--out={out}"]) == 0
        printed = capsys.readouterr()
        made, command = printed.out.splitlines()
        assert made.startswith(f"{out}: ") and made.endswith(" validation images, 3 classes")
        assert ".heic 1" in printed.err
        shell = ["sh", "-c", f'for word in {command[6:]}; do printf "%s\\0" "$word"; done']
        done = subprocess.run(shell, capture_output=True, text=True, check=True)
        words = [word for word in done.stdout.split("\0") if word.startswith("data.")]
        read = [parser.parse_override(word).value() for word in words]
        texts = [value.text if isinstance(value, QuotedString) else value for value in read]
        assert texts == [f"{out}/train", f"{out}/val"]

    monkeypatch.setenv("HOME", str(photographs.parent))
    assert main(["data", "split", "~/photographs", "--flat", "--out=~/out"]) == 0
    command = capsys.readouterr().out.splitlines()[1]
    assert f"data.train_path={photographs.parent}/out/train data.no_labels=True" in command
