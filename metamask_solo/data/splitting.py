"""Splits a folder of images into train/ and val/, by links: no image is copied or moved."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from metamask_solo.data.folders import find_images
from metamask_solo.errors import UserError

SPLITS = ("train", "val")


@dataclass(frozen=True)
class Split:
    """What :func:`split_folder` made.

    Attributes:
        out: the folder that holds train/ and val/.
        train, val: numbers of images.
        classes: names of the classes; empty where the images are flat, without labels.
        empty: names of class folders without an image, which were left out.
        beside: images beside the class folders, which were left out.
        written: False where all of it was there already.
    """

    out: Path
    train: int
    val: int
    classes: list[str]
    empty: list[str]
    beside: int
    written: bool


def split_folder(
    folder: str | Path,
    out: str | Path,
    share: float,
    seed: int = 0,
    flat: bool = False,
    force: bool = False,
) -> Split:
    """Links the images of a folder into ``out``/train and ``out``/val.

    Of each class the share is drawn by itself, one image at least for either side. Which images it
    gets is decided by a digest of seed and name, so it is the same on every machine, and an image
    that is added later moves no other.

    Args:
        folder: holds class folders, or images without labels, at any depth.
        out: new, or what an earlier call made; its links are brought up to date.
        share: of the images that go to val, above 0 and below 1.
        seed: another one draws other images.
        flat: take all images below as one set without labels, even from class folders.
        force: replace a split of another folder.

    Raises:
        UserError: a value is not allowed, a class has a single image, two files would have one
            name, or ``out`` holds something else, such as a split of another folder.
    """
    folder, out = Path(folder), Path(out)
    if not 0 < share < 1:
        raise UserError(f"--val={share}: must be above 0 and below 1")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    inside = out.resolve().is_relative_to(folder.resolve())
    if inside:
        raise UserError(f"--out={out}: lies in {folder}, and would be split the next time")
    if all((folder / split).is_dir() for split in SPLITS):
        raise UserError(f"{folder}: holds train/ and val/ already: it is split")
    groups, empty = _groups(folder, flat)
    beside = 0
    if "" not in groups:
        beside = sum(image.parent == folder for image in images_below(folder))
    links: dict[Path, Path] = {}
    counts = {split: 0 for split in SPLITS}
    for name, images in groups.items():
        for split, chosen in _draw(folder, name, images, share, seed).items():
            counts[split] += len(chosen)
            for image in chosen:
                links[_place(out / split, folder, name, image)] = image.resolve()
    if len(links) != sum(counts.values()):
        raise UserError(f"{folder}: two images would have one name; keep them in class folders")
    if not force:
        _check_own(out, folder.resolve())
    written = _write(out, links)
    names = [name for name in groups if name]
    return Split(out, counts["train"], counts["val"], names, empty, beside, written)


def _groups(folder: Path, flat: bool) -> tuple[dict[str, list[Path]], list[str]]:
    """The images of each class; of a set without labels, all of them under an empty name.

    Returns:
        The images, and the names of class folders that hold none.
    """
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    folders = [entry for entry in entries if entry.is_dir()]
    classes = {} if flat else {entry.name: images_below(entry) for entry in folders}
    empty = [name for name, images in classes.items() if not images]
    if len(empty) < len(classes):
        return {name: images for name, images in classes.items() if images}, empty
    images = images_below(folder)
    if not images:
        raise UserError(f"{folder}: holds no image")
    return {"": images}, []


def images_below(folder: Path) -> list[Path]:
    """The images of a folder at any depth, by the rule of :mod:`metamask_solo.data.folders`."""
    try:
        found = find_images(folder, "FOLDER", labels=False)
    except UserError as error:
        if "holds no image" in str(error):
            return []
        raise
    return [Path(path) for path, _ in found.samples]


def _draw(
    folder: Path, name: str, images: list[Path], share: float, seed: int
) -> dict[str, list[Path]]:
    if len(images) < 2:
        where = f"class folder {name}" if name else str(folder)
        raise UserError(f"{where}: has {len(images)} image; train and val need one each")
    count = min(max(1, round(share * len(images))), len(images) - 1)

    def place(image: Path) -> bytes:
        text = f"{seed}/{image.relative_to(folder).as_posix()}"
        return hashlib.sha256(text.encode(errors="surrogateescape")).digest()

    drawn = sorted(images, key=place)
    return {"train": drawn[count:], "val": drawn[:count]}


def _place(split: Path, folder: Path, name: str, image: Path) -> Path:
    """Where the link of an image goes; sets without labels are read from one folder."""
    inner = image.relative_to(folder / name if name else folder)
    return split / name / inner if name else split / "_".join(inner.parts)


def _check_own(out: Path, folder: Path) -> None:
    """Refuses to replace the split of another folder, which runs may have been trained on."""
    for path in (path for split in SPLITS for path in _files(out / split)):
        target = path.resolve()
        if path.is_symlink() and not target.is_relative_to(folder):
            raise UserError(
                f"--out={out}: holds the split of another folder (its links lead to "
                f"{target.parent}); give another --out, or --force to replace it"
            )


def _write(out: Path, links: dict[Path, Path]) -> bool:
    """Makes the links that lack, and takes away those of an earlier split."""
    there = {path for split in SPLITS for path in _files(out / split)}
    foreign = sorted(path for path in there if not path.is_symlink())
    if foreign:
        raise UserError(f"{out}: holds {foreign[0].relative_to(out)}, which is no link of a split")
    kept = {path for path in there if path in links and path.resolve() == links[path]}
    try:
        for path in there - kept:
            path.unlink()
        for path in links.keys() - kept:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(links[path])
        for split in SPLITS:
            _remove_empty(out / split)
    except OSError as error:
        raise UserError(f"{out}: no links can be made ({error.strerror or error})") from error
    return kept != links.keys()


def _files(folder: Path) -> list[Path]:
    return [Path(place, name) for place, _, names in os.walk(folder) for name in names]


def _remove_empty(folder: Path) -> None:
    for place, _, _ in os.walk(folder, topdown=False):
        if not any(Path(place).iterdir()):
            Path(place).rmdir()
