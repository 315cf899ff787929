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
from metamask_solo.data.split import split_folder
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


def test_a_flat_folder_has_no_classes_and_its_share_in_val(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for i in range(1000):
        file = photos / str(i % 2) / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    made = split_folder(photos, tmp_path / "out", 0.2, seed=1, flat=True)
    assert made.train.classes == [] and all("/" not in name for name in links(made.out))
    assert len(made.train) + len(made.val) == 1000
    assert abs(len(made.val) - 200) <= 38  # three standard deviations
    (photos / "0_0.png").touch()
    with pytest.raises(UserError, match="two images would be 0_0.png"):
        split_folder(photos, tmp_path / "new", 0.2, flat=True)


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


def test_images_in_a_cache_are_linked_by_their_names(photographs: Path, tmp_path: Path) -> None:
    """As of dvc, git-annex and the hub: each image is a link to a file named by its content."""
    (tmp_path / "cache").mkdir()
    for number, file in enumerate(photographs.rglob("*.JPG")):
        file.symlink_to(shutil.move(file, tmp_path / "cache" / str(number)))
    out = split_folder(photographs, tmp_path / "out", 0.3).out
    made = [path for path in out.rglob("*.JPG")]
    assert len(made) == 32
    assert all(path.readlink().is_relative_to(photographs) for path in made)


def test_what_is_left_out_is_said_by_the_split_and_by_its_readers(
    photographs: Path, tmp_path: Path
) -> None:
    first = sorted((photographs / "bee").rglob("*.JPG"))[0]
    for i in range(9):  # more copies than one part could hold
        shutil.copy(first, photographs / "bee" / f"again{i}.JPG")
    made = split_folder(photographs, tmp_path / "out", 0.5)
    beside, left_out, copies = made.notes
    assert "such as beside.png, left out" in beside and ".heic 1" in left_out
    assert "are copies of training images" in copies
    assert read_folder(tmp_path / "out" / "val", "data").notes == made.notes[:-1]


def test_what_cannot_be_split_is_refused(photographs: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine" / "train" / "ant" / "mine.png"
    mine.parent.mkdir(parents=True)
    mine.touch()
    (photographs / "cat" / "0.JPG").unlink()
    for out, share, reason in (
        ("new", 0, "--val=0"),
        ("new", float("nan"), "--val=nan"),
        ("photographs/split", 0.1, "lies in"),
        ("mine", 0.1, "train/ant/mine.png, which is no link"),
        ("new", 0.1, "cat: has 1 image"),
    ):
        with pytest.raises(UserError, match=reason):
            split_folder(photographs, tmp_path / out, share)
    assert not (tmp_path / "new").exists() and mine.is_file()


def test_another_split_is_replaced_by_force_alone(tmp_path: Path) -> None:
    one, two = (write_images(tmp_path / name, classes=2) / "train" for name in ("one", "two"))
    out = tmp_path / "out"
    split_folder(one, out, 0.3)
    before = sorted(path.resolve() for path in out.rglob("*.png"))
    for folder, settings, reason in (
        (two, {"share": 0.3}, f"the split of another folder .{one}"),
        (one, {"share": 0.5}, "a split with val=0.3"),
        (one, {"share": 0.3, "seed": 1}, "a split with seed=0"),
        (one, {"share": 0.3, "flat": True}, "a split with flat=False"),
    ):
        with pytest.raises(UserError, match=f"holds {reason}.*--force"):
            split_folder(folder, out, **settings)  # type: ignore[arg-type]
    for link in (out / "train", *out.glob("train/class_0")):
        with pytest.raises(UserError, match=f"{link}: lies in the split that --out={out} holds"):
            split_folder(link, out, 0.3, force=True)
    assert sorted(path.resolve() for path in out.rglob("*.png")) == before

    split_folder(two, out, 0.3, force=True)
    assert all(path.resolve().is_relative_to(two) for path in out.rglob("*.png"))


def test_the_command_says_what_can_be_pasted_into_a_shell(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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

    out = tmp_path / "flat"
    assert main(["data", "split", str(photographs), "--flat", f"--out={out}"]) == 0
    assert f"data.train_path={out}/train data.no_labels=True" in capsys.readouterr().out
