"""The generated data sets: what they hold, what they must not share, and damage to them."""

import csv
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metamask_solo.data import digits
from metamask_solo.data.digits import examples, render, write_dataset
from metamask_solo.errors import UserError


@pytest.fixture(scope="module")
def textured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole textured set, written once for all the tests that read it."""
    out = tmp_path_factory.mktemp("datasets")
    assert write_dataset("textured-digits", out)
    return out / "textured-digits"


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five digits a class instead of 500, so that writing a set takes no time."""
    pixels, labels = digits._digits()
    keep = np.concatenate([np.flatnonzero(labels == label)[:5] for label in range(10)])
    monkeypatch.setattr(digits, "_digits", lambda: (pixels[keep], labels[keep]))
    monkeypatch.setattr(digits, "PART_SIZES", {"fit": 3, "select": 1, "test": 1})
    monkeypatch.setattr(digits, "_all_examples", digits._all_examples.__wrapped__)


def pngs(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*.png")
    }


def metadata(folder: Path) -> list[dict[str, str]]:
    with (folder / "metadata.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "train", "val"),
    [
        ("digits", 400, 100),
        ("textured-digits", 400, 100),
        ("digits-search", 320, 80),
        ("textured-digits-search", 320, 80),
    ],
)
def test_every_class_has_its_share(name: str, train: int, val: int) -> None:
    found = Counter((split, example.label) for split, example in examples(name))

    expected = {("train", label): train for label in range(10)}
    assert found == expected | {("val", label): val for label in range(10)}
    assert len({example.index for _, example in examples(name)}) == 10 * (train + val)


@pytest.mark.parametrize("name", ["digits", "textured-digits"])
def test_the_search_set_divides_the_training_images(name: str) -> None:
    training = {example for split, example in examples(name) if split == "train"}

    assert {example for _, example in examples(f"{name}-search")} == training


def test_no_background_pixel_is_in_two_parts() -> None:
    owners: dict[tuple[int, int], set[str]] = {}
    for _, example in examples("textured-digits"):
        for column in range(example.column, example.column + 32):
            owners.setdefault((example.photograph, column), set()).add(example.part)

    assert {len(parts) for parts in owners.values()} == {1}
    assert len(owners) == 2 * 640


@pytest.mark.slow
def test_the_background_tells_nothing_about_the_label(textured: Path) -> None:
    rows = metadata(textured)
    labels = np.array([int(row["label"]) for row in rows])
    cues = [
        [float(row["mean_red"]), float(row["mean_blue"]), row["photograph"] == "china.jpg"]
        for row in rows
    ]
    cues = (np.array(cues, dtype=float) - np.mean(cues, axis=0)) / np.std(cues, axis=0)
    means = np.array([cues[labels == label].mean(axis=0) for label in range(10)])

    # the mean of 500 independent standardised values has a standard deviation of 0.045
    assert np.abs(means).max() < 4 * 500**-0.5


def test_the_folders_fit_the_metadata(textured: Path) -> None:
    rows = metadata(textured)
    files = pngs(textured)

    assert {row["file"] for row in rows} == set(files)
    assert Counter(row["split"] for row in rows) == {"train": 4000, "val": 1000}
    for row in rows[::97]:
        split, label, _ = row["file"].split("/")
        assert (split, label) == (row["split"], row["label"])
        photograph = dict(digits._photographs())[row["photograph"]]
        top, left = int(row["row"]), int(row["column"])
        patch = photograph[top : top + 32, left : left + 32].astype(int) * 70 // 100
        means = [float(row[f"mean_{colour}"]) for colour in ("red", "green", "blue")]
        np.testing.assert_allclose(means, patch.mean(axis=(0, 1)) / 255, atol=1e-6)

        image = np.asarray(Image.open(textured / row["file"])).astype(int)
        assert image.shape == (32, 32, 3)
        np.testing.assert_array_equal(image[[0, 31]], patch[[0, 31]])  # no stroke at the border


def test_a_digit_lies_over_its_background() -> None:
    _, example = next(examples("textured-digits"))
    plain, black = render(example, textured=False)
    image, _ = render(example, textured=True)

    assert black.tolist() == [0, 0, 0]
    assert plain.max() == 255
    stroke = plain == 255
    assert (image[stroke] == 255).all()
    assert (image >= plain).all()


DIGEST = """
import hashlib
from metamask_solo.data.digits import examples, render

digest = hashlib.sha256()
for split, example in examples("textured-digits"):
    digest.update(f"{split} {example}".encode() + render(example, True)[0].tobytes())
print(digest.hexdigest())
"""


@pytest.mark.slow
def test_another_process_draws_the_same_images(textured: Path) -> None:
    digest = hashlib.sha256()
    for split, example in examples("textured-digits"):
        file = textured / split / str(example.label) / f"{example.index:04d}.png"
        digest.update(f"{split} {example}".encode() + Image.open(file).tobytes())

    command = [sys.executable, "-c", DIGEST]
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    other = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    assert other.stdout.split() == [digest.hexdigest()]


def test_the_search_set_holds_the_same_files(few: None, tmp_path: Path) -> None:
    for name in ("textured-digits", "textured-digits-search"):
        write_dataset(name, tmp_path)
    whole = pngs(tmp_path / "textured-digits" / "train")
    parts = pngs(tmp_path / "textured-digits-search")

    assert {file.split("/", 1)[1]: content for file, content in parts.items()} == whole
    assert len(parts) == 40


def test_two_writes_of_every_file_agree(few: None, tmp_path: Path) -> None:
    for name in digits.VARIANTS:
        for out in ("one", "two"):
            write_dataset(name, tmp_path / out)
        everything = [
            {
                file.relative_to(tmp_path / out): file.read_bytes()
                for file in (tmp_path / out).rglob("*")
                if file.is_file()
            }
            for out in ("one", "two")
        ]
        assert everything[0] == everything[1]
        assert everything[0]


def test_a_second_call_writes_nothing(few: None, tmp_path: Path) -> None:
    assert write_dataset("textured-digits", tmp_path)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}

    assert not write_dataset("textured-digits", tmp_path)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before


def test_hidden_files_do_not_count_as_damage(few: None, tmp_path: Path) -> None:
    write_dataset("digits", tmp_path)
    (tmp_path / "digits" / "train" / ".DS_Store").write_text("x")

    assert not write_dataset("digits", tmp_path)


def an_image(folder: Path) -> Path:
    return sorted((folder / "train").rglob("*.png"))[0]


def edit(folder: Path) -> None:
    an_image(folder).write_bytes(b"not an image")


def swap(folder: Path) -> None:
    image = an_image(folder)
    image.rename(folder / "train" / "9" / image.name)


def rename_recipe(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"version": 0}))


DAMAGES = {
    "an image is gone": (lambda folder: an_image(folder).unlink(), "it has 39 in train"),
    "an image is more": (
        lambda folder: (folder / "val" / "0" / "new.png").write_bytes(b"x"),
        "it has 40 in train, 11 in val",
    ),
    "an image is edited": (edit, "do not match its manifest"),
    "an image changed its class": (swap, "do not match its manifest"),
    "the metadata are gone": (lambda folder: (folder / "metadata.csv").unlink(), "do not match"),
    "it is an older recipe's": (rename_recipe, "made by recipe 0, not"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_reported_and_force_mends_it(few: None, tmp_path: Path, damage: str) -> None:
    write_dataset("textured-digits", tmp_path / "intact")
    write_dataset("textured-digits", tmp_path)
    folder = tmp_path / "textured-digits"
    breaks, message = DAMAGES[damage]
    breaks(folder)

    with pytest.raises(UserError, match=message) as caught:
        write_dataset("textured-digits", tmp_path)
    assert str(caught.value).startswith(str(folder))
    assert "--force" in str(caught.value)
    assert "\n" not in str(caught.value)

    assert write_dataset("textured-digits", tmp_path, force=True)
    assert pngs(folder) == pngs(tmp_path / "intact" / "textured-digits")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["intact", "textured-digits"]


def test_an_interrupted_write_leaves_nothing(
    few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def interrupted(example: digits.Example, textured: bool) -> object:
        drawn.append(example)
        if len(drawn) == 20:
            raise KeyboardInterrupt
        return render(example, textured)

    with monkeypatch.context() as patch:
        patch.setattr(digits, "render", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_dataset("digits", tmp_path)
    assert list(tmp_path.iterdir()) == []

    assert write_dataset("digits", tmp_path)


def test_somebody_elses_folder_is_never_removed(few: None, tmp_path: Path) -> None:
    own = tmp_path / "digits" / "train" / "a.png"
    own.parent.mkdir(parents=True)
    own.write_text("mine")

    for force in (False, True):
        with pytest.raises(UserError, match="has no manifest"):
            write_dataset("digits", tmp_path, force=force)
    assert own.read_text() == "mine"


def test_a_link_is_read_but_not_removed(few: None, tmp_path: Path) -> None:
    write_dataset("digits", tmp_path / "elsewhere")
    (tmp_path / "digits").symlink_to(tmp_path / "elsewhere" / "digits")

    assert not write_dataset("digits", tmp_path)
    with pytest.raises(UserError, match="is a link"):
        write_dataset("digits", tmp_path, force=True)
    assert (tmp_path / "elsewhere" / "digits" / "manifest.json").exists()


@pytest.mark.parametrize("name", ["../digits", "/tmp/digits", "digits/../..", "", "mnist"])
def test_an_unknown_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="allowed are digits, textured-digits, digits-search"):
        write_dataset(name, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_reported(few: None, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(UserError, match="file/digits: cannot be written"):
        write_dataset("digits", tmp_path / "file")
