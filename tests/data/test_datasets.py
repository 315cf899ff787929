"""What a folder of images holds, what is left out or doubted, and seeds by image."""

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import write_images
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from metamask_solo.data.datasets import (
    Images,
    check_folder,
    overlap_notes,
    pair_notes,
    read_folder,
    write_fingerprints,
)
from metamask_solo.data.seeds import image_seed
from metamask_solo.errors import UserError
from metamask_solo.training.sampling import EpochShuffle


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_images(tmp_path / "data", classes=3, train=4, val=2)


def test_an_ordinary_folder_is_read_as_torchvision_reads_it(data: Path) -> None:
    deeper = data / "train" / "class_1" / "b" / "c"
    deeper.mkdir(parents=True)
    (data / "train" / "class_1" / "b-c").mkdir()
    image = data / "train" / "class_0" / "0.png"
    for path in (deeper / "x.png", deeper / "A.PNG", deeper / "é.png", deeper / "../../b-c/1.png"):
        shutil.copy(image, path)
    expected = ImageFolder(str(data / "train"))
    for folder in (".ipynb_checkpoints", "class_1/.cache"):  # hidden entries do not count
        (data / "train" / folder).mkdir()
        shutil.copy(image, data / "train" / folder / "0.png")
    images = read_folder(data / "train", "data")
    assert images.samples == expected.samples and images.classes == expected.classes
    assert images.targets == expected.targets and not images.notes
    assert np.array_equal(np.asarray(images[3][0]), np.asarray(expected[3][0]))
    assert check_folder(data / "train", "data") == expected.classes


def test_links_are_followed_and_a_folder_is_read_once(data: Path) -> None:
    plain, linked = data / "train", data / "linked"
    (linked / "class_1").mkdir(parents=True)
    (linked / "class_0").symlink_to(plain / "class_0")
    for path in (plain / "class_1").iterdir():
        (linked / "class_1" / path.name).symlink_to(path)
    (linked / "class_2").mkdir()
    (linked / "class_2" / "deeper").symlink_to(plain / "class_2")
    (linked / "class_1" / "loop").symlink_to("../..")
    (linked / "class_1" / "of another class").symlink_to(linked / "class_2")
    images = read_folder(linked, "data")
    samples = [(os.path.realpath(path), label) for path, label in images.samples]
    assert samples == read_folder(plain, "data").samples
    assert "2 links left out, such as class_1/loop: the folder was read" in images.notes[0]


BROKEN: dict[str, Callable[[Path], Any]] = {
    ": no such folder": shutil.rmtree,
    "/class_0/9.png: the link leads to no file": lambda train: (
        train / "class_0" / "9.png"
    ).symlink_to("/nowhere"),
    ": holds no class folder": lambda train: (
        [shutil.rmtree(path) for path in train.iterdir()],
        Image.new("RGB", (8, 8)).save(train / "0.png"),
    ),
    ": class folder class_1 holds no image; 1 file left out": lambda train: (
        [path.unlink() for path in (train / "class_1").iterdir()],
        (train / "class_1" / "notes.txt").touch(),
    ),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_folder_that_cannot_be_used_is_refused(message: str, data: Path) -> None:
    BROKEN[message](data / "train")
    with pytest.raises(UserError, match=f"^data.train_path={data}/train{message}"):
        read_folder(data / "train", "data.train_path")


@pytest.mark.parametrize("names", [("train", "test"), ("Test", "cat")])
def test_names_of_splits_are_no_classes(names: tuple[str, str], data: Path) -> None:
    root = data / "products" / "bottle"
    for source, name in zip(("class_0", "class_1"), names, strict=True):
        shutil.copytree(data / "train" / source, root / name / "inner")
    for labels in (True, False, None):
        with pytest.raises(UserError, match=f"--data={root}: names of .*{root}/{names[0]} .or ren"):
            read_folder(root, "--data", labels)
        if "cat" not in names:  # splits in a class: these are named with their class
            with pytest.raises(UserError, match=f"{root}: names .* make {names[0]}/bottle/ of"):
                read_folder(root.parent, "--data", labels)


def test_what_is_left_out_and_doubted_is_noted(data: Path) -> None:
    folder = data / "train"
    for name in ("class_2/a.heic", "class_2/b.HEIC", "class_0/notes.txt", "class_0/raw", "x.csv"):
        (folder / name).write_bytes(b"something else")
    for path in (folder, data):
        shutil.copy(folder / "class_0" / "0.png", path / "beside.png")
    split, beside, left_out = read_folder(folder, "data.train_path").notes
    assert split == f"{data}: 1 image, such as beside.png, left out: beside train/"
    assert beside.startswith(f"data.train_path={folder}: 1 image, such as beside.png, left out")
    assert "5 files left out" in left_out
    assert left_out.endswith(": .heic 2, .csv 1, .txt 1, no ending 1")


def test_a_folder_one_level_too_high_is_doubted_and_folders_of_images_are_not(data: Path) -> None:
    for path in list((data / "train").iterdir()):
        shutil.copytree(path, data / "images in each class" / path.name / "images")
    assert not read_folder(data / "images in each class", "data").notes
    shutil.copytree(data / "train", data / "too high" / "photos")
    one_class, level = read_folder(data / "too high", "--data").notes
    assert "only 1 class (photos), so every accuracy is 100 %" in one_class
    assert f"one level too high, and {data}/too high/photos the folder of the classes?" in level


def test_without_labels_images_of_any_depth_are_read(data: Path) -> None:
    folder = data / "train"
    assert read_folder(folder, "data", labels=None).classes == ["class_0", "class_1", "class_2"]
    shutil.copy(folder / "class_0" / "0.png", folder / "beside.png")
    for labels in (False, None):
        images = read_folder(folder, "data", labels)
        assert len(images) == 13 and {*images.targets} == {-1} and images.classes == []
        assert not images.labelled
    (data / "empty").mkdir()
    with pytest.raises(UserError, match="holds no image"):
        read_folder(data / "empty", "data", labels=False)


@pytest.mark.parametrize("file_size", [100, 200_000])  # of large files only blocks are compared
def test_copies_of_training_images_are_counted_by_content(
    file_size: int, data: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    for path in data.rglob("*.png"):
        path.write_bytes(rng.bytes(file_size))
    train = read_folder(data / "train", "data")
    write_fingerprints(train, tmp_path / "run")
    val = read_folder(data / "val", "data")
    assert pair_notes(train, val) == overlap_notes(val, tmp_path / "run") == []
    for number in (0, 1):
        source = data / "train" / "class_0" / f"{number}.png"
        shutil.copy(source, data / "val" / "class_1" / f"again{number}.png")
    # of the same size, with the same beginning, and yet another file
    content = source.read_bytes()
    altered = content[:-20] + bytes([content[-20] ^ 1]) + content[-19:]
    (data / "val" / "class_2" / "other.png").write_bytes(altered)
    val = read_folder(data / "val", "data")
    (note,) = pair_notes(train, val)
    assert note.startswith(f"{data}/val: 2 of 9 validation images are copies of training images")
    (note,) = overlap_notes(val, tmp_path / "run")
    assert note.startswith(f"{data}/val: 2 of 9 images to evaluate on were training images of")
    assert overlap_notes(val, data) == []  # a folder without a run


def images_of(folder: Path, transform: Callable[..., Any]) -> Images:
    return replace(read_folder(folder, "data"), transform=transform, with_index=True)


def draws(image: Any) -> Any:
    """What a transform would draw from each of the three generators."""
    return torch.tensor([torch.rand(1).item(), random.random(), np.random.random()])


def drawn_by(loader: Any) -> Any:
    """Image index to what was drawn for it."""
    return {
        int(index): drawn
        for indices, draws, _ in loader
        for index, drawn in zip(indices, draws.tolist(), strict=True)
    }


def one_epoch(dataset: Any, epoch: int, skip: int = 0, workers: int = 0, **options: Any) -> Any:
    sampler = EpochShuffle(dataset, seed=3)
    sampler.start_at(epoch, skip)
    return drawn_by(DataLoader(dataset, 2, sampler=sampler, num_workers=workers, **options))


def test_draws_depend_on_seed_epoch_and_image_alone(data: Path) -> None:
    def state() -> Any:
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    dataset = images_of(data / "train", draws)
    torch.manual_seed(0)
    first, second = one_epoch(dataset, 0), one_epoch(dataset, 1)
    torch.manual_seed(1)
    assert one_epoch(dataset, 0) == first
    before = state()
    dataset.__getitems__([(0, 5), (1, 6)])
    assert state() == before
    sampler = EpochShuffle(dataset, seed=3)
    loader = DataLoader(dataset, 2, sampler=sampler, num_workers=2, persistent_workers=True)
    for epoch, expected in enumerate((first, second)):
        sampler.start_at(epoch, 0)
        assert drawn_by(loader) == expected
    rest = one_epoch(dataset, 0, skip=6, workers=2)
    assert len(rest) == 6 and rest.items() <= first.items()
    assert second.keys() == first.keys()
    drawn = [tuple(values) for values in (*first.values(), *second.values())]
    for generator in range(3):
        assert len({values[generator] for values in drawn}) == 24


@pytest.mark.slow
def test_a_spawned_worker_draws_alike(data: Path) -> None:
    transform = transforms.Compose([transforms.RandomResizedCrop(8), transforms.ToTensor()])
    dataset = images_of(data / "train", transform)
    spawned = one_epoch(dataset, 2, workers=1, multiprocessing_context="spawn")
    assert spawned == one_epoch(dataset, 2)


def test_seeds_of_different_images_differ() -> None:
    seeds = {
        image_seed(seed, epoch, index)
        for seed in (0, 1, 5)
        for epoch in range(20)
        for index in range(500)
    }
    assert len(seeds) == 3 * 20 * 500
    bits = np.unpackbits(np.array(sorted(seeds), np.uint64).view(np.uint8)).reshape(-1, 64)
    assert np.abs(bits.mean(0) - 0.5).max() < 0.02


def test_a_failing_transform_is_no_unreadable_image(data: Path) -> None:
    def fail(image: Any) -> Any:
        raise ValueError("bits must be at least 1")

    with pytest.raises(UserError, match=r"0\.png: was read, but its transform failed \(ValueError"):
        images_of(data / "train", fail)[0]


def test_a_limit_draws_the_images_by_the_seed(data: Path) -> None:
    images = images_of(data / "train", transforms.ToTensor())
    limited = [images.limited(5, seed) for seed in (0, 0, 1)]
    assert limited[0].files == limited[1].files == sorted(limited[0].files) != limited[2].files
    assert len(limited[0]) == 5 and images.limited(None, 0) is images
    position = images.files.index(limited[0].files[3])
    assert torch.equal(limited[0][3][1], images[position][1])
    assert limited[0][-1][2] == limited[0].targets[4]
