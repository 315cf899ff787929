"""What a folder of images holds: links, loops, hidden entries, endings, and who must agree."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from runs import pretrain_config, write_images
from torchvision.datasets import ImageFolder

from metamask_solo.data.folders import (
    check_class_folders,
    check_same_classes,
    count_shared,
    find_images,
    image_endings,
    say_left_out,
)
from metamask_solo.errors import UserError
from metamask_solo.training.pretraining import prepare_pretraining


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_images(tmp_path / "data", classes=3, train=4, val=2)


def test_an_ordinary_folder_is_read_as_torchvision_reads_it(data: Path) -> None:
    deeper = data / "train" / "class_1" / "b" / "c"
    deeper.mkdir(parents=True)
    for name in ("x.png", "A.PNG", "é.png"):
        shutil.copy(data / "train" / "class_0" / "0.png", deeper / name)
    found, expected = find_images(data / "train", "data"), ImageFolder(str(data / "train"))
    assert found.samples == expected.samples and found.classes == expected.classes
    assert not found.left_out


@pytest.mark.parametrize("target", ["..", ".", "../..", "../../.."])
def test_a_link_back_is_refused_by_name(target: str, data: Path) -> None:
    (data / "train" / "class_1" / "up").symlink_to(target)
    with pytest.raises(UserError, match=r"data.train_path=.*class_1/up leads back"):
        find_images(data / "train", "data.train_path")
    with pytest.raises(UserError, match="leads back"):
        prepare_pretraining(pretrain_config(data, data / "runs"))


def test_a_folder_in_two_classes_is_refused_by_name(data: Path) -> None:
    (data / "train" / "class_0" / "more").symlink_to(data / "train" / "class_2")
    with pytest.raises(UserError, match=r"class_0/more and class_2 are the same folder"):
        find_images(data / "train", "data.train_path")


def test_links_to_images_and_folders_work(data: Path) -> None:
    plain = find_images(data / "train", "data")
    linked = data / "linked"
    linked.mkdir()
    (linked / "class_0").symlink_to(data / "train" / "class_0")
    (linked / "class_1").mkdir()
    for path in (data / "train" / "class_1").iterdir():
        (linked / "class_1" / path.name).symlink_to(path)
    (linked / "class_2").mkdir()
    (linked / "class_2" / "deeper").symlink_to(data / "train" / "class_2")
    found = find_images(linked, "data")
    assert found.classes == plain.classes
    resolved = [(os.path.realpath(path), label) for path, label in found.samples]
    assert sorted(resolved) == sorted(plain.samples)
    assert check_class_folders(linked, "data") == plain.classes


def test_a_folder_that_is_linked_twice_in_a_class_counts_once(data: Path) -> None:
    (data / "train" / "class_0" / "deep").mkdir()
    shutil.copy(data / "val" / "class_0" / "0.png", data / "train" / "class_0" / "deep")
    (data / "train" / "class_0" / "latest").symlink_to("deep")
    assert len(find_images(data / "train", "data").samples) == 13
    assert len(find_images(data / "train", "data", labels=False).samples) == 13


def test_a_link_to_nothing_is_refused_by_name(data: Path) -> None:
    (data / "train" / "class_0" / "9.png").symlink_to("/nowhere/9.png")
    with pytest.raises(UserError, match=r"class_0/9.png leads to no file"):
        find_images(data / "train", "data.train_path")


def test_hidden_entries_do_not_count(data: Path) -> None:
    plain = find_images(data / "train", "data").samples
    hidden = data / "train" / ".ipynb_checkpoints"
    hidden.mkdir()
    shutil.copy(data / "train" / "class_0" / "0.png", hidden / "0.png")
    for name in (".DS_Store", "._0.png"):
        (data / "train" / "class_1" / name).write_bytes(b"no image")
    (data / "train" / "class_1" / ".cache").mkdir()
    shutil.copy(data / "train" / "class_0" / "0.png", data / "train" / "class_1" / ".cache")
    found = find_images(data / "train", "data")
    assert found.samples == plain and not found.left_out
    _, cfg, loader, _ = prepare_pretraining(pretrain_config(data, data / "runs"))
    assert cfg.data.num_classes == 3 and len(loader.dataset) == 12


def test_what_pillow_reads_is_read_and_the_rest_is_said(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = data / "train" / "class_2"
    image = Image.new("RGB", (8, 8))
    for ending in ("gif", "jfif", "jp2", "tga", "pcx", "JPEG", "webp", "avif"):
        if f".{ending.lower()}" in image_endings():
            image.save(folder / f"x.{ending}", **({} if ending != "jfif" else {"format": "JPEG"}))
    image.save(folder / "no_ending", format="PNG")
    image.save(folder / "photo.jpg_large", format="JPEG")
    more = len(list(folder.iterdir())) - 4
    for name in ("notes.txt", "list.txt", "box.xml", "video.mp4", "raw"):
        (folder / name).write_bytes(b"something else")
    (data / "train" / "labels.csv").write_text("")
    found = find_images(data / "train", "data.train_path")
    assert len(found.samples) == 12 + more and more >= 9
    say_left_out(found, data / "train", "data.train_path")
    line = capsys.readouterr().err
    assert line.startswith("note: data.train_path=") and line.count("\n") == 1
    assert "6 files left out" in line and ".txt 2" in line and "no ending 1" in line
    assert "beside the class folders 1" in line


def test_all_images_below_count_without_labels(data: Path) -> None:
    shutil.copy(data / "train" / "class_0" / "0.png", data / "train" / "beside.png")
    found = find_images(data / "train", "data", labels=False)
    assert len(found.samples) == 13 and {label for _, label in found.samples} == {-1}
    cfg = pretrain_config(data, data / "runs", data__no_labels=True, data__val_path=None)
    _, cfg, loader, validation = prepare_pretraining(cfg)
    assert len(loader.dataset) == 13 and validation is None
    assert loader.dataset[0][2] == -1 and cfg.data.num_classes == 1


EMPTY: dict[str, Callable[[Path], Any]] = {
    "no such folder": lambda folder: shutil.rmtree(folder),
    "holds no class folder": lambda folder: [shutil.rmtree(p) for p in folder.iterdir()],
    "class folder class_1 is empty": lambda folder: [
        p.unlink() for p in (folder / "class_1").iterdir()
    ],
    "class folder class_1 holds no image": lambda folder: [
        p.rename(p.with_suffix(".txt")).write_text("")
        for p in sorted((folder / "class_1").iterdir())
    ],
}


@pytest.mark.parametrize("message", EMPTY)
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("dataset", ["custom", "imagenet100"])
def test_a_folder_without_images_is_refused(
    message: str, split: str, dataset: str, data: Path
) -> None:
    EMPTY[message](data / split)
    cfg = pretrain_config(data, data / "runs", data__dataset=dataset)
    with pytest.raises(UserError, match=f"data.{split}_path=.*{message}"):
        prepare_pretraining(cfg)


def test_a_folder_without_labels_and_images_is_refused(data: Path) -> None:
    shutil.rmtree(data / "train")
    (data / "train").mkdir()
    (data / "train" / "notes.txt").write_text("")
    cfg = pretrain_config(data, data / "runs", data__no_labels=True, data__val_path=None)
    with pytest.raises(UserError, match=r"data.train_path=.*holds no image, only other files"):
        prepare_pretraining(cfg)


@pytest.mark.parametrize("value", ["imagefolder", "image-folder", "dali", "h5"])
def test_a_misspelt_format_is_refused(value: str, data: Path) -> None:
    cfg = pretrain_config(data, data / "runs", data__format=value)
    with pytest.raises(UserError, match=f"data.format={value}: must be image_folder"):
        prepare_pretraining(cfg)


def test_classes_of_one_split_only_are_named(data: Path) -> None:
    shutil.rmtree(data / "val" / "class_1")
    with pytest.raises(
        UserError, match="val=.*has no class folder class_1; 3 classes in train and 2"
    ):
        check_same_classes(data / "train", data / "val", "train", "val")


def test_more_classes_than_the_data_set_has_are_refused(tmp_path: Path) -> None:
    data = write_images(tmp_path, classes=101, train=1, val=1)
    cfg = pretrain_config(data, data / "runs", data__dataset="imagenet100")
    with pytest.raises(UserError, match="101 class folders, but data.dataset=imagenet100 has 100"):
        prepare_pretraining(cfg)


def test_validation_images_among_the_training_images_are_counted(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = find_images(data / "train", "data").samples
    assert count_shared(train, find_images(data / "val", "data").samples) == 0
    for number in (0, 1, 2):
        source = data / "train" / "class_0" / f"{number}.png"
        shutil.copy(source, data / "val" / "class_1" / f"again{number}.png")
    # of the same size, with the same beginning, and yet another file
    content = (data / "train" / "class_2" / "0.png").read_bytes()
    other = content[:-20] + bytes([content[-20] ^ 1]) + content[-19:]
    (data / "val" / "class_2" / "other.png").write_bytes(other)
    assert count_shared(train, find_images(data / "val", "data").samples) == 3
    prepare_pretraining(pretrain_config(data, data / "runs"))
    assert "3 of 10 validation images are, byte for byte" in capsys.readouterr().err


def test_a_single_class_gets_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_images(tmp_path, classes=1, train=12)
    prepare_pretraining(pretrain_config(data, data / "runs"))
    assert "only 1 class (class_0)" in capsys.readouterr().err


def test_names_that_are_no_utf8_are_read_and_shown(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val"):
        odd = os.fsencode(data / split) + b"/caf\xe9"
        try:
            os.mkdir(odd)
        except OSError:
            pytest.skip("this file system takes UTF-8 only")
        shutil.copy(data / split / "class_0" / "0.png", os.fsdecode(odd + b"/\xff.png"))
    _, _, loader, _ = prepare_pretraining(pretrain_config(data, data / "runs"))
    assert len(loader.dataset) == 13
    shutil.rmtree(os.fsdecode(os.fsencode(data / "val") + b"/caf\xe9"))
    with pytest.raises(UserError) as caught:
        prepare_pretraining(pretrain_config(data, data / "runs"))
    assert "has no class folder caf\ufffd" in str(caught.value)
    str(caught.value).encode()  # can be printed anywhere
