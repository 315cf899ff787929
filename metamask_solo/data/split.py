"""Splits a folder of images into train/ and val/, by links: no image is copied or moved."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metamask_solo.atomic_files import atomic_write
from metamask_solo.data.datasets import (
    SPLIT_COMMAND,
    SPLIT_FILE,
    copies_notes,
    holds_classes,
    read_folder,
)
from metamask_solo.errors import UserError
from metamask_solo.paths import shown, user_path

SPLITS = ("train", "val")


@dataclass(frozen=True)
class Split:
    """What :func:`split_folder` made.

    Attributes:
        out: the folder that holds train/ and val/.
        train: number of images for training.
        val: number of images for validation.
        classes: names of the classes; empty where the images have no labels.
        notes: what was left out or is doubtful, in sentences.
        written: False where all of it was there already.
    """

    out: Path
    train: int
    val: int
    classes: list[str]
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
    an earlier call with the same share and seed made stays as it is.

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
    folder, out = user_path(folder), user_path(out)
    if not 0 < share < 1:
        raise UserError(f"--val={share}: must be above 0 and below 1")
    if out.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--out={out}: lies in {folder}, and would be split the next time")
    labels = not flat and holds_classes(folder, "")
    images = read_folder(folder, "", labels, allow_empty=True)
    top = os.path.abspath(folder)
    settings = {"made_by": SPLIT_COMMAND, "folder": top, "val": share, "seed": seed}
    there = _links(out)
    sides = _earlier_sides(out, there, settings, force)

    groups: dict[int, dict[Path, str]] = {}  # label to the link of an image, and where it leads
    for file, label in images.samples:
        target = os.path.abspath(file)  # not resolved: it may itself be a link into a cache
        inner = Path(os.path.relpath(target, top))
        link = inner if labels else Path("_".join(inner.parts))
        if link in groups.setdefault(label, {}):
            raise UserError(f"{folder}: two images would be {shown(link)}; use class folders")
        groups[label][link] = target
    wanted = {}
    for label, targets in groups.items():
        if len(targets) < 2:
            where = f"class folder {shown(images.classes[label])}" if labels else shown(folder)
            raise UserError(f"{where}: has 1 image; train and val need one each")
        for link, side in _sides(list(targets), share, seed, sides).items():
            wanted[out / side / link] = targets[link]
    written = there != wanted
    if written:
        _write(out, there, wanted, settings | {"notes": images.notes})
    train, val = ([path for path in wanted if path.is_relative_to(out / s)] for s in SPLITS)
    names = [images.classes[label] for label in groups] if labels else []
    notes = [*images.notes, *copies_notes(train, val, out)]
    return Split(out, len(train), len(val), names, notes, written)


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
    """The links of an earlier call, and where they lead.

    Raises:
        UserError: train/ or val/ holds something else.
    """
    files = [
        Path(folder, name)
        for side in SPLITS
        for folder, _, names in os.walk(out / side)
        for name in names
    ]
    for file in files:
        if not file.is_symlink():
            raise UserError(f"{out}: holds {file.relative_to(out)}, which is no link of a split")
    return {file: os.readlink(file) for file in files}


def _earlier_sides(
    out: Path, links: dict[Path, str], settings: dict[str, Any], force: bool
) -> dict[Path, str]:
    """Where an earlier call with the same settings put each image.

    Raises:
        UserError: it was a split of another folder, which runs may have been trained on.
    """
    try:
        earlier = json.loads((out / SPLIT_FILE).read_text())
    except (OSError, ValueError):
        earlier = {}
    folder = earlier.get("folder", "")
    if links and not force and os.path.realpath(folder) != os.path.realpath(settings["folder"]):
        other = f"the split of another folder ({folder})" if folder else "another program's links"
        raise UserError(f"--out={out}: holds {other}; give another --out, or --force to replace it")
    if any(earlier.get(key) != settings[key] for key in ("made_by", "folder", "val", "seed")):
        return {}
    return {
        link.relative_to(out / s): s
        for s in SPLITS
        for link in links
        if link.is_relative_to(out / s)
    }


def _write(
    out: Path, there: dict[Path, str], wanted: dict[Path, str], settings: dict[str, Any]
) -> None:
    """Makes the links that lack, and takes away those of an earlier split."""
    with atomic_write(out / SPLIT_FILE) as temporary:
        temporary.write_text(json.dumps(settings, indent=1) + "\n")
    try:
        for path in there:
            if there[path] != wanted.get(path):
                path.unlink()
        for path in wanted:
            if there.get(path) != wanted[path]:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.symlink_to(wanted[path])
        for side in SPLITS:
            for folder, _, _ in os.walk(out / side, topdown=False):
                if not os.listdir(folder):
                    os.rmdir(folder)
    except OSError as error:
        raise UserError(f"{out}: no links can be made ({error.strerror or error})") from error
