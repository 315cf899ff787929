"""Splits a folder of images into train/ and val/, by links: no image is copied or moved."""

import hashlib
import json
import os
import shutil
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from metamask_solo.atomic_files import atomic_write
from metamask_solo.data.datasets import (
    SPLIT_COMMAND,
    SPLIT_FILE,
    Images,
    holds_classes,
    pair_notes,
    read_folder,
    split_settings,
)
from metamask_solo.errors import UserError
from metamask_solo.paths import as_text, user_path

SPLITS = ("train", "val")


class Split(NamedTuple):
    """What :func:`split_folder` made: the images of out/train and out/val.

    ``notes`` says what was left out or is doubtful, ``written`` is False where all of it was there
    already.
    """

    out: Path
    train: Images
    val: Images
    notes: list[str]
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

    An image goes to val if a digest of seed and name, as a number in 0..1, is below the share. So
    the split is the same on every machine, and an image stays where it is when more come. Of a
    class whose images would all go to one side, the nearest to the share goes to the other; what
    an earlier call with the same share and seed made stays where it is.

    Args:
        folder: holds class folders, or images without labels, at any depth.
        out: new, or what an earlier call made; its links are brought up to date.
        share: of the images that go to val, above 0 and below 1.
        seed: another one draws other images.
        flat: take all images below as one set without labels, even from class folders.
        force: replace a split of another folder, or with another share, seed or ``flat``.

    Raises:
        UserError: a value is not allowed, a class has a single image, two files would have one
            name, one folder lies in the other, or ``out`` holds something else, such as another
            split.
    """
    folder, out = user_path(folder), user_path(out)
    if not 0 < share < 1:
        raise UserError(f"--val={share}: must be above 0 and below 1")
    if out.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--out={out}: lies in {folder}; choose a folder outside")
    if any(folder.resolve().is_relative_to((out / side).resolve()) for side in SPLITS):
        raise UserError(f"{folder}: lies in the split that --out={out} holds; choose another --out")
    labels = not flat and holds_classes(folder, "")
    images = read_folder(folder, "", labels)
    drawn = {"val": share, "seed": seed, "flat": not labels}
    settings = {"made_by": SPLIT_COMMAND, "folder": os.path.abspath(folder), **drawn}
    links = _links(out)
    earlier = split_settings(out)
    split_before = earlier.get("folder", "")
    old = [f"{key}={earlier[key]}" for key in drawn if earlier.get(key, drawn[key]) != drawn[key]]
    what = f"a split with {', '.join(old)}" if old else ""
    if not split_before:
        what = "other links"
    elif os.path.realpath(split_before) != os.path.realpath(folder):
        what = f"the split of another folder ({split_before})"
    if links and what and not force:
        raise UserError(
            f"out={out}: holds {what}; give another folder, or replace it (data split --force)"
        )
    same = all(earlier.get(key) == drawn[key] for key in ("val", "seed"))
    sides = {Path(*link.parts[1:]): link.parts[0] for link in links} if same else {}

    wanted: dict[Path, str] = {}
    for label, samples in groupby(images.samples, lambda sample: sample[1]):
        targets: dict[Path, str] = {}
        for file, _ in samples:
            link = Path(os.path.relpath(file, folder))
            link = link if labels else Path("_".join(link.parts))
            if link in targets:
                raise UserError(f"{folder}: two images would be {as_text(link)}; use class folders")
            targets[link] = os.path.abspath(file)  # not resolved: it may link into a cache
        if len(targets) < 2:
            where = f"class folder {images.classes[label]}" if labels else as_text(folder)
            raise UserError(f"{where}: has 1 image; train and val need one each")
        for link, side in _sides(list(targets), share, seed, sides).items():
            wanted[Path(side, link)] = targets[link]
    if links != wanted:
        _write(out, wanted, settings | {"notes": images.notes})
    train, val = (read_folder(out / side, "", labels) for side in SPLITS)
    return Split(out, train, val, [*images.notes, *pair_notes(train, val)], links != wanted)


def _sides(links: list[Path], share: float, seed: int, earlier: dict[Path, str]) -> dict[Path, str]:
    """Which of train and val each image of a class goes to, at least one to either."""
    positions = {}
    for link in links:
        text = f"{seed}/{link.as_posix()}".encode(errors="surrogateescape")
        positions[link] = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64
    drawn = {link: "val" if position < share else "train" for link, position in positions.items()}
    sides = {link: earlier.get(link, side) for link, side in drawn.items()}
    for side in SPLITS:
        if side not in sides.values():
            sides[min(links, key=lambda link: abs(positions[link] - share))] = side
    return sides


def _links(out: Path) -> dict[Path, str]:
    """The links of an earlier call, by their names below ``out``, and where they lead.

    Raises:
        UserError: train/ or val/ holds something else.
    """
    links = {}
    for path in (path for side in SPLITS for path in (out / side).rglob("*")):
        name = path.relative_to(out)
        if any(part.startswith(".") for part in name.parts):
            continue  # of the system's own, such as .DS_Store
        if path.is_symlink() and not path.is_dir():
            links[name] = os.readlink(path)
        elif path.is_symlink() or not path.is_dir():
            raise UserError(f"{out}: holds {name}, which is no link of a split")
    return links


def _write(out: Path, links: dict[Path, str], settings: dict[str, object]) -> None:
    """Makes the links in place of those that are there."""
    with atomic_write(out / SPLIT_FILE) as temporary:
        temporary.write_text(json.dumps(settings, indent=1) + "\n")
    try:
        for side in SPLITS:
            shutil.rmtree(out / side, ignore_errors=True)
        for link, target in links.items():
            (out / link).parent.mkdir(parents=True, exist_ok=True)
            (out / link).symlink_to(target)
    except OSError as error:
        raise UserError(f"{out}: no links can be made ({error.strerror or error})") from error
