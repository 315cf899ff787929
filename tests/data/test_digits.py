"""The generated data sets: what they hold, what they must not share, and damage to them."""

import csv
import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metamask_solo.data import digits
from metamask_solo.data.digits import examples, render, write_dataset
from metamask_solo.errors import UserError


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five digits a class instead of 500, so that writing a set takes no time."""
    pixels, labels = digits._digits()
    keep = np.concatenate([np.flatnonzero(labels == label)[:5] for label in range(10)])
    monkeypatch.setattr(digits, "_digits", lambda: (pixels[keep], labels[keep]))
    monkeypatch.setattr(digits, "PART_SIZES", {"fit": 3, "select": 1, "test": 1})
    monkeypatch.setattr(digits, "_all_examples", digits._all_examples.__wrapped__)


def content(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


# of splits, examples and pixels, written by version 0.2.0: published results are on these images
PUBLISHED = {
    "textured-digits": "0abdb00f61827592829f8eb669e9010f91f629326d9e3614f5cf2e60bcc7c283",
    "digits": "8c89fc9211829212cd0abc2f10e8b525ee6a55b1eb36ab8d1d7093e45ef1b4c2",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_images_are_the_published_ones(name: str) -> None:
    digest = hashlib.sha256()
    for split, example in examples(name):
        pixels, _ = render(example, textured=name == "textured-digits")
        digest.update(f"{split} {example}".encode() + pixels.tobytes())
    assert digest.hexdigest() == PUBLISHED[name]


def test_a_search_has_the_training_images_alone() -> None:
    for name in ("digits", "textured-digits"):
        search = list(examples(f"{name}-search"))
        shares = {("train", label): 320 for label in range(10)}
        shares |= {("val", label): 80 for label in range(10)}
        assert Counter((split, e.label) for split, e in search) == shares
        assert {e for _, e in search} == {e for split, e in examples(name) if split == "train"}


def test_no_background_pixel_is_in_two_parts() -> None:
    owners: dict[tuple[int, int], set[str]] = {}
    for _, example in examples("textured-digits"):
        for column in range(example.column, example.column + 32):
            owners.setdefault((example.photograph, column), set()).add(example.part)
    assert {len(parts) for parts in owners.values()} == {1}
    assert len(owners) == 2 * 640


def test_the_files_fit_the_metadata(few: None, tmp_path: Path) -> None:
    assert write_dataset("textured-digits", tmp_path)
    folder = tmp_path / "textured-digits"
    with (folder / "metadata.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["file"] for row in rows} == {n for n in content(folder) if n.endswith(".png")}
    assert Counter(row["split"] for row in rows) == {"train": 40, "val": 10}
    for row in rows:
        split, label, _ = row["file"].split("/")
        assert (split, label) == (row["split"], row["label"])
        photograph = dict(digits._photographs())[row["photograph"]]
        top, left = int(row["row"]), int(row["column"])
        patch = photograph[top : top + 32, left : left + 32].astype(int) * 70 // 100
        means = [float(row[f"mean_{colour}"]) for colour in ("red", "green", "blue")]
        np.testing.assert_allclose(means, patch.mean(axis=(0, 1)) / 255, atol=1e-6)
        image = np.asarray(Image.open(folder / row["file"])).astype(int)
        np.testing.assert_array_equal(image[[0, 31]], patch[[0, 31]])  # no stroke at the border


def test_two_writes_agree_and_a_third_writes_nothing(few: None, tmp_path: Path) -> None:
    for name in digits.VARIANTS:
        assert write_dataset(name, tmp_path / "one") and write_dataset(name, tmp_path / "two")
    assert content(tmp_path / "one") == content(tmp_path / "two") != {}
    for name in digits.VARIANTS:
        (tmp_path / "one" / name / "train" / ".DS_Store").write_text("x")  # is no damage
        assert not write_dataset(name, tmp_path / "one")


def rename_recipe(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"version": 0}))


def test_damage_is_reported_and_force_mends_it(few: None, tmp_path: Path) -> None:
    write_dataset("textured-digits", tmp_path)
    folder = tmp_path / "textured-digits"
    intact, image = content(folder), sorted((folder / "train").rglob("*.png"))[0]
    for damage in (
        lambda: image.unlink(),
        lambda: image.write_bytes(b"edited"),
        lambda: image.rename(folder / "train" / "9" / image.name),
        lambda: rename_recipe(folder),
    ):
        damage()
        with pytest.raises(UserError, match=f"^{folder}: damaged, edited .*--force"):
            write_dataset("textured-digits", tmp_path)
        assert write_dataset("textured-digits", tmp_path, force=True)
        assert content(folder) == intact and [*tmp_path.iterdir()] == [folder]


def test_an_interrupted_write_leaves_nothing(
    few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(example: digits.Example, textured: bool) -> object:
        if example.index == 20:
            raise KeyboardInterrupt
        return render(example, textured)

    monkeypatch.setattr(digits, "render", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_dataset("digits", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_only_what_this_command_made_is_removed(tmp_path: Path) -> None:
    mine = tmp_path / "digits" / "train" / "a.png"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    for force in (False, True):
        with pytest.raises(UserError, match="has no manifest"):
            write_dataset("digits", tmp_path, force=force)
    assert mine.read_text() == "mine"
    with pytest.raises(UserError, match="allowed are digits, textured-digits, digits-search"):
        write_dataset("../digits", tmp_path / "out")
    assert [*tmp_path.iterdir()] == [tmp_path / "digits"]
