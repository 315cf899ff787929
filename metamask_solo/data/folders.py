"""One rule of what a folder of images holds, for every reader and every check.

Links to images and folders are followed; one that leads back to a folder above it is refused, and
so is a folder that is reached under two class names. Names that begin with a dot are ignored. An
image is a file with an ending that Pillow reads, or one whose ending says nothing (none, or an
unknown one) and that begins as a PNG, JPEG, GIF, WebP, AVIF or JPEG 2000 file does. What else is
there is counted, and said in one line.
"""

import functools
import hashlib
import mimetypes
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from metamask_solo.data.reading import shown
from metamask_solo.errors import UserError

# Pillow knows these, but opens them only with the help of other programs
NEEDS_MORE = ("BUFR", "GRIB", "HDF5", "MPEG", "WMF", "FPX", "MIC")
MOST_COMPARED = 100_000  # files, in the search for validation images among the training images
BESIDE = "beside the class folders"


@dataclass
class Found:
    """The images of a folder: paths with labels, the names of the classes, what was left out."""

    samples: list[tuple[str, int]] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def find_images(folder: str | Path, key: str, labels: bool = True) -> Found:
    """The images of a folder, in the order of torchvision's ImageFolder.

    Args:
        folder: holds one folder for each class, or with ``labels=False`` images at any depth.
        key: the setting that names the folder, for errors.
        labels: False for all images below, with the label −1.

    Raises:
        UserError: there is no such folder, it holds no image, a class is empty, a link leads back,
            leads nowhere, or gives the same folder to two classes.
    """
    walk = _Walk(folder, key)
    found = Found(left_out=walk.left_out)
    if not labels:
        found.samples = [(path, -1) for path in walk.images(str(folder), None)]
        if not found.samples:
            raise UserError(f"{walk.where}: holds no image{walk.instead()}")
        return found
    found.classes = walk.classes()
    for label, name in enumerate(found.classes):
        files = walk.images(os.path.join(folder, name), name)
        if not files:
            raise walk.no_image_of(name)
        found.samples += [(path, label) for path in files]
    walk.count_beside()
    return found


def class_folders(folder: str | Path, key: str) -> list[str]:
    """The names of the classes of a folder.

    Raises:
        UserError: there is no such folder, or it holds no class folder.
    """
    return _Walk(folder, key).classes()


def check_class_folders(folder: str | Path, key: str) -> list[str]:
    """Refuses what :func:`find_images` would, but looks only for the first image of each class.

    Returns:
        The names of the classes.
    """
    walk = _Walk(folder, key)
    names = walk.classes()
    for name in names:
        if next(walk.files(os.path.join(folder, name), name), None) is None:
            raise walk.no_image_of(name)
    return names


def check_any_image(folder: str | Path, key: str) -> None:
    """Refuses a folder without labels that holds no image at any depth."""
    walk = _Walk(folder, key)
    if next(walk.files(str(folder), None), None) is None:
        raise UserError(f"{walk.where}: holds no image{walk.instead()}")


def check_same_classes(
    train: str | Path, val: str | Path, train_key: str, val_key: str
) -> list[str]:
    """A class that one of both lacks would shift the labels of all that follow, without a word.

    Raises:
        UserError: names a class that is in one folder only.
    """
    names = class_folders(train, train_key)
    others = class_folders(val, val_key)
    if odd := sorted(set(names) ^ set(others)):
        here, key, folder = (
            ("train", val_key, val) if odd[0] in names else ("val", train_key, train)
        )
        raise UserError(
            f"{key}={shown(folder)}: has no class folder {shown(odd[0])}; {len(names)} classes "
            f"in train and {len(others)} in val must be the same; class {shown(odd[0])} is in "
            f"{here} only"
        )
    return names


def say_left_out(found: Found, folder: str | Path, key: str) -> None:
    """One line with the number of files that are no images, and their endings."""
    if found.left_out:
        kinds = ", ".join(f"{kind} {count}" for kind, count in found.left_out.most_common(8))
        more = ", …" if len(found.left_out) > 8 else ""
        total = sum(found.left_out.values())
        say(f"{key}={shown(folder)}: {total} files left out, no images: {kinds}{more}")


def say_doubtful(
    classes: list[str], train: list[tuple[str, int]], val: list[tuple[str, int]]
) -> None:
    """One line each for a single class, and for validation images that are training images too."""
    if len(classes) == 1:
        say(f"data: only 1 class ({shown(classes[0])}); every accuracy will be 100 %")
    if same := count_shared(train, val):
        say(
            f"data: {same} of {len(val)} validation images are, byte for byte, among the training "
            "images; accuracies will be too high"
        )


def say(line: str) -> None:
    """A line about the data, on the error stream of the first process alone."""
    if all(os.environ.get(name, "0") in ("", "0") for name in ("RANK", "LOCAL_RANK")):
        print(f"note: {line}", file=sys.stderr)


def count_shared(train: list[tuple[str, int]], val: list[tuple[str, int]]) -> int:
    """The number of validation files whose bytes are those of a training file.

    Only files of one size and with one beginning are read whole. More than ``MOST_COMPARED`` files
    are not compared.
    """
    if len(train) + len(val) > MOST_COMPARED:
        return 0
    sizes: dict[int, list[str]] = {}
    for path, _ in train:
        sizes.setdefault(_size(path), []).append(path)
    candidates = [path for path, _ in val if _size(path) in sizes]
    wanted = {_size(path) for path in candidates}
    beginnings: dict[bytes, list[str]] = {}
    for size in wanted:
        for path in sizes[size]:
            beginnings.setdefault(_digest(path, 1024), []).append(path)
    whole: dict[str, bytes] = {}
    shared = 0
    for path in candidates:
        others = beginnings.get(_digest(path, 1024), [])
        own = _digest(path) if others else b""
        for other in others:
            if other not in whole:
                whole[other] = _digest(other)
        shared += any(whole[other] == own for other in others)
    return shared


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def _digest(path: str, most: int = -1) -> bytes:
    try:
        with open(path, "rb") as stream:
            return hashlib.blake2b(stream.read(most), digest_size=16).digest()
    except OSError:  # the reader will name it
        return b""


@functools.cache
def image_endings() -> frozenset[str]:
    """The endings, in lower case, of the files that Pillow can read here."""
    Image.init()
    unreadable = set(NEEDS_MORE) | (set() if shutil.which("gs") else {"EPS"})
    readable = set(Image.OPEN) - unreadable
    return frozenset(end for end, name in Image.registered_extensions().items() if name in readable)


@functools.cache
def _is_known_otherwise(ending: str) -> bool:
    """Whether an ending, such as .txt, says that a file is no image, whatever it holds."""
    kind, packing = mimetypes.MimeTypes(()).guess_type(f"name{ending}")
    return packing is not None or (kind is not None and not kind.startswith("image/"))


def _begins_as_image(path: str) -> bool:
    try:
        with open(path, "rb") as stream:
            head = stream.read(16)
    except OSError:
        return False
    return (
        head.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a"))
        or head.startswith(b"\0\0\0\x0cjP  \r\n")
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or (
            head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis") and ".avif" in image_endings()
        )
    )


class _Walk:
    """One walk over a folder: which folders were seen under which class, and what was left out."""

    def __init__(self, folder: str | Path, key: str):
        self.folder = str(folder)
        self.where = f"{key}={shown(folder)}"
        self.left_out: Counter[str] = Counter()
        # a folder's identity to the class and path under which it was met first
        self.seen: dict[tuple[int, int], tuple[str | None, str]] = {}
        if not os.path.isdir(self.folder):
            raise UserError(f"{self.where}: no such folder")
        root = Path(os.path.realpath(self.folder))
        self.above = {_identity(str(path)) for path in (root, *root.parents)}

    def classes(self) -> list[str]:
        names = sorted(e.name for e in self._entries(self.folder) if self._is_folder(e, self.above))
        if not names:
            raise UserError(f"{self.where}: holds no class folder")
        return names

    def images(self, folder: str, label: str | None) -> list[str]:
        """The images at any depth of a folder, sorted by folder and then by name."""
        return [os.path.join(*pair) for pair in sorted(self.files(folder, label))]

    def files(self, folder: str, label: str | None) -> Iterator[tuple[str, str]]:
        """The images at any depth of a folder, as pairs of folder and name, in any order."""
        pending = [(folder, self.above | {_identity(folder)})]
        while pending:
            current, above = pending.pop()
            if self._met_before(current, label):
                continue
            for entry in self._entries(current):
                if self._is_folder(entry, above):
                    pending.append((entry.path, above | {_identity(entry.path)}))
                elif self._is_image(entry):
                    yield current, entry.name

    def count_beside(self) -> None:
        """Files that lie beside the class folders belong to no class."""
        for entry in self._entries(self.folder):
            if not self._is_folder(entry, self.above):
                self.left_out[BESIDE] += 1

    def no_image_of(self, name: str) -> UserError:
        holds = f"holds no image{self.instead()}" if self.left_out else "is empty"
        return UserError(f"{self.where}: class folder {shown(name)} {holds}")

    def instead(self) -> str:
        if not self.left_out:
            return ""
        kinds = ", ".join(f"{kind} {count}" for kind, count in self.left_out.most_common(4))
        return f", only other files ({kinds})"

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                return sorted(
                    (e for e in entries if not e.name.startswith(".")), key=lambda e: e.name
                )
        except OSError as error:
            raise UserError(f"{self.where}: {shown(folder)}: {error.strerror}") from error

    def _is_folder(self, entry: os.DirEntry[str], above: set[tuple[int, int]]) -> bool:
        try:
            if not entry.is_dir():
                return False
        except OSError:  # a link to itself
            return False
        if entry.is_symlink() and _identity(entry.path) in above:
            raise UserError(
                f"{self.where}: the link {shown(os.path.relpath(entry.path, self.folder))} leads "
                "back to a folder that holds it"
            )
        return True

    def _met_before(self, folder: str, label: str | None) -> bool:
        """Whether a link brought us to this folder before; its images count once."""
        first, path = self.seen.setdefault(_identity(folder), (label, folder))
        if path == folder:
            return False
        if first != label:
            one, two = (shown(os.path.relpath(p, self.folder)) for p in (path, folder))
            raise UserError(f"{self.where}: {one} and {two} are the same folder, in two classes")
        return True

    def _is_image(self, entry: os.DirEntry[str]) -> bool:
        ending = os.path.splitext(entry.name)[1].lower()
        if not os.path.isfile(entry.path):
            nowhere = entry.is_symlink() and not os.path.exists(entry.path)
            if nowhere and ending in image_endings():
                raise UserError(
                    f"{self.where}: the link {shown(os.path.relpath(entry.path, self.folder))} "
                    "leads to no file"
                )
            self.left_out["links to nothing" if nowhere else "no files"] += 1
            return False
        if ending in image_endings():
            return True
        if not _is_known_otherwise(ending) and _begins_as_image(entry.path):
            return True
        self.left_out[shown(ending) or "no ending"] += 1
        return False


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino
