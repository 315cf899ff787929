"""Folders of images, and data sets of transformed images: what loaders hand to their workers.

All classes can be pickled, so workers may be started in any way; nothing here imports solo-learn,
so that they start quickly.
"""

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from metamask_solo.atomic_files import atomic_write
from metamask_solo.data.read_image import DEFAULT_RULE, ENDINGS, KINDS, ReadingRule, read_image
from metamask_solo.data.seeds import Draw, generator_of, start_at, states_kept
from metamask_solo.errors import UserError
from metamask_solo.paths import shown, user_path

PathLike = str | Path
NO_LABEL = -1
SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")
SPLIT_FILE, SPLIT_COMMAND = "split.json", "metamask-solo data split"
FINGERPRINTS = "images.npy"
MOST_COMPARED = 100_000  # images, by their content
BLOCK = 2**14  # bytes; three blocks of a file are compared, of up to three all of it


def say(*notes: str) -> None:
    """Prints what a reader leaves out or doubts on stderr, by the first process alone."""
    if _is_first_process():
        for note in notes:
            print(f"note: {note}", file=sys.stderr)


def _is_first_process() -> bool:
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK"))


class ImageFolder(Dataset[tuple[Image.Image, int]]):
    """The images of a folder, made by :func:`read_folder`: items are (8-bit RGB image, label).

    Attributes:
        root: the folder.
        samples: path and label of each image, −1 without labels.
        classes: names of the classes; none without labels.
        notes: what was left out, and what is doubtful, in sentences.
    """

    def __init__(self, walk: "_Walk", labels: bool, rule: ReadingRule, allow_empty: bool = False):
        self.root = walk.folder
        self.rule = rule
        self.classes = walk.classes() if labels else []
        self.samples: list[tuple[str, int]] = []
        tops = {name: label for label, name in enumerate(self.classes)} or {"": NO_LABEL}
        for name, label in tops.items():
            images = sorted(walk.images(name))  # the order of torchvision's ImageFolder
            if not images and not allow_empty:
                raise walk.nothing_in(name)
            self.samples += [(os.path.join(*image), label) for image in images]
        if not self.samples:
            raise walk.nothing_in("")
        self.notes = [*_notes_of_split(Path(self.root)), *walk.notes(self.classes)]

    @property
    def targets(self) -> list[int]:
        """All labels."""
        return [label for _, label in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return read_image(path, self.rule), label


def read_folder(
    folder: PathLike,
    key: str,
    labels: bool | None = True,
    rule: ReadingRule = DEFAULT_RULE,
    allow_empty: bool = False,
) -> ImageFolder:
    """The images of a folder: the one reader of folders, for every command.

    Links to images and folders are followed, and a folder is read once however many links lead to
    it. Names that begin with a dot are left out. Order and labels are those of torchvision's
    ImageFolder.

    Args:
        key: the setting that names the folder, for messages.
        labels: True for class folders, False for all images at any depth, None for class folders
            where there are any and no image lies beside them.
        rule: how an image is read.
        allow_empty: whether a class may have no image.

    Raises:
        UserError: there is no such folder, it holds no image, a class is empty, its folders are
            splits, a link leads nowhere, or one folder is in two classes.
    """
    walk = _Walk(folder, key)
    if labels is None:
        labels = not any(map(_is_image, walk.files)) and holds_classes(folder, key)
    return ImageFolder(walk, labels, rule, allow_empty)


def holds_classes(folder: PathLike, key: str) -> bool:
    """Whether a folder holds folders with images, rather than images alone."""
    walk = _Walk(folder, key)
    return any(any(walk.images(name)) for name in walk.folders)


def check_folder(folder: PathLike, key: str, labels: bool = True) -> list[str]:
    """Refuses what :func:`read_folder` would, but looks only for the first image of each class.

    Returns:
        The names of the classes; none without labels.
    """
    walk = _Walk(folder, key)
    names = walk.classes() if labels else []
    for name in names if labels else [""]:
        if not any(walk.images(name)):
            raise walk.nothing_in(name)
    return names


class _Walk:
    """A walk over one folder, and what it leaves out and doubts."""

    def __init__(self, folder: PathLike, key: str):
        self.folder = str(user_path(folder))
        self.prefix = f"{key}=" if key else ""
        self.where = f"{self.prefix}{shown(self.folder)}"
        if not os.path.isdir(self.folder):
            raise UserError(f"{self.where}: no such folder")
        _, folders, files = next(os.walk(self.folder, onerror=self._refuse))
        self.folders, self.files = _visible(folders), _visible(files)  # in the folder itself
        self._refuse_splits(self.folder, self.folders, least=1)
        self.left_out: Counter[str] = Counter()
        # class to the folders in it that hold images, at any depth; "." where it holds some itself
        self.filled: dict[str, set[str]] = {}
        # a folder's identity to the class that it was met in; the folders above are in none
        root = Path(os.path.realpath(self.folder))
        self.met = {_identity(path): "" for path in (root, *root.parents)}

    def classes(self) -> list[str]:
        """The names of the class folders; refuses a folder without any."""
        if not self.folders:
            images = sum(map(_is_image, self.files))
            beside = f" ({_count(images, 'image')} without labels)" if images else ""
            raise UserError(f"{self.where}: holds no class folder{beside}")
        return self.folders

    def images(self, name: str) -> Iterator[tuple[str, str]]:
        """Folder and name of each image at any depth of a class, in any order.

        Args:
            name: of the class; empty for the folder itself.
        """
        top = os.path.join(self.folder, name) if name else self.folder
        if name and not self._is_new(top, name):
            return
        for path, folders, files in os.walk(top, followlinks=True, onerror=self._refuse):
            below = _visible(folders)
            self._refuse_splits(path, below, least=2)
            folders[:] = [f for f in below if self._is_new(os.path.join(path, f), name)]
            for file in _visible(files):
                if not _is_image(file):
                    self._leave_out(file)
                    continue
                if not os.path.isfile(os.path.join(path, file)):
                    link = shown(os.path.relpath(os.path.join(path, file), self.folder))
                    raise UserError(f"{self.where}: the link {link} leads to no file")
                yield path, file
            if any(map(_is_image, files)):
                first = os.path.relpath(path, top).split(os.sep)[0]
                self.filled.setdefault(name, set()).add(first)

    def nothing_in(self, name: str) -> UserError:
        """The error of a class, or with no name of the folder itself, that holds no image."""
        what = f"class folder {shown(name)} holds" if name else "holds"
        others = f", only other files ({self._kinds()})" if self.left_out else ""
        return UserError(f"{self.where}: {what} no image{others}")

    def notes(self, classes: list[str]) -> list[str]:
        """What was left out, and what is doubtful, after all images were met."""
        notes = []
        if classes:
            beside = [name for name in self.files if _is_image(name)]
            if beside:
                images = f"{_count(len(beside), 'image')}, such as {beside[0]}"
                notes.append(f"{images}, left out: beside the class folders, so of no class")
            if empty := [name for name in classes if name not in self.filled]:
                folders = _count(len(empty), "class folder")
                notes.append(f"{folders} left out, without an image: {', '.join(empty[:5])}")
            if len(classes) == 1:
                notes.append(f"only 1 class ({classes[0]}), so every accuracy is 100 %")
            # a folder "images" in each class is usual, several are not
            deep = next((name for name in self.filled if len(self.filled[name]) > 1), None)
            if deep and not any("." in inside for inside in self.filled.values()):
                notes.append(
                    "no class folder holds an image itself, all lie in folders below: is this one "
                    f"level too high, and {self.folder}/{deep} the folder of the classes?"
                )
            for name in self.files:
                if not _is_image(name):
                    self._leave_out(name)
        if self.left_out:
            total = _count(sum(self.left_out.values()), "file")
            notes.append(f"{total} left out, no {KINDS}: {self._kinds()}")
        return [shown(f"{self.where}: {note}") for note in notes]

    def _is_new(self, folder: str, name: str) -> bool:
        """Whether a folder is met for the first time; refuses one that is in another class."""
        identity = _identity(folder)
        if identity not in self.met:
            self.met[identity] = name
            return True
        if (first := self.met[identity]) != name:
            link = shown(os.path.relpath(folder, self.folder))
            other = f"is a folder of class {shown(first)}, too" if first else "leads back up"
            raise UserError(f"{self.where}: {link} {other}")
        return False

    def _refuse_splits(self, path: str, names: list[str], least: int) -> None:
        splits = [name for name in names if name.lower() in SPLITS]
        splits.sort(key=lambda name: SPLITS.index(name.lower()))
        if len(splits) >= least:
            one = shown(os.path.join(path, splits[0]))
            raise UserError(
                f"{self.prefix}{shown(path)}: names of splits are no classes: "
                f"{', '.join(splits[:4])}; give {self.prefix}{one} (or rename the class)"
            )

    def _refuse(self, error: OSError) -> None:
        raise UserError(f"{self.where}: {shown(error.filename)}: {error.strerror}") from error

    def _leave_out(self, name: str) -> None:
        self.left_out[os.path.splitext(name)[1].lower() or "no ending"] += 1

    def _kinds(self) -> str:
        counts = sorted(self.left_out.items(), key=lambda item: (-item[1], item[0]))
        kinds = ", ".join(f"{shown(kind)} {count}" for kind, count in counts[:8])
        return kinds + (", …" if len(counts) > 8 else "")


def _visible(names: list[str]) -> list[str]:
    return sorted(name for name in names if not name.startswith("."))


def _is_image(name: str) -> bool:
    return name.lower().endswith(ENDINGS)


def _identity(path: PathLike) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _notes_of_split(folder: Path) -> list[str]:
    """What ``data split`` left out when it made the links of a folder."""
    try:
        split = json.loads((folder.parent / SPLIT_FILE).read_text())
        return list(split["notes"]) if split["made_by"] == SPLIT_COMMAND else []
    except (OSError, ValueError, TypeError, KeyError):
        return []


class Images(Dataset[Any]):
    """Transformed images of one of torchvision's data sets, or of an :class:`ImageFolder`.

    An item is (image, label), or (index, views, label) for pretraining. It is asked for by its
    index, or by its index and a seed: then the transform draws what that seed gives, whatever
    process or worker it runs in, and the process's own random numbers stay as they were.

    Args:
        source: without a transform of its own; its items are (PIL image, label).
        transform: of an image.
        with_index: for pretraining.
        chosen: indices of the images that are used; None for all.
        split: which images these are, for titles: ``train``, ``val`` or nothing.

    Attributes:
        classes: names of the classes, printable.
        targets: the label of each image; −1 where it has none.
        labelled: whether every image has a label.
        samples: path and label of each image of a folder; None for other data sets.
        notes: what was left out or is doubtful, in sentences.

    Raises:
        UserError: on access: names the image that cannot be read or transformed.
    """

    def __init__(
        self,
        source: Any,
        transform: Callable[..., Any],
        with_index: bool = False,
        chosen: Sequence[int] | None = None,
        split: str = "",
    ):
        self.source = source
        self.transform = transform
        self.with_index = with_index
        self.split = split
        self.indices = range(len(source)) if chosen is None else list(chosen)
        self.classes = [shown(name) for name in getattr(source, "classes", [])]
        self.notes: list[str] = list(getattr(source, "notes", []))
        labels = source.targets if hasattr(source, "targets") else source.labels
        self.targets = [int(labels[i]) for i in self.indices]
        self.labelled = NO_LABEL not in self.targets
        samples = getattr(source, "samples", None)
        self.samples = None if samples is None else [samples[i] for i in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def files(self) -> list[str]:
        """The file of each image; its number where it has none."""
        return [s[0] for s in self.samples] if self.samples else [str(i) for i in self.indices]

    def limited(self, limit: int | None, seed: int) -> "Images":
        """At most so many of the images, drawn by ``seed``, in their order; None for all."""
        if limit is None or limit >= len(self):
            return self
        order = torch.randperm(len(self), generator=generator_of(seed))
        chosen = [self.indices[i] for i in sorted(order[:limit].tolist())]
        return Images(self.source, self.transform, self.with_index, chosen, self.split)

    def __getitem__(self, key: int | Draw) -> Any:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[int | Draw]) -> list[Any]:
        """A batch at once: the random states are kept and put back once, not for each image."""
        seeded = any(isinstance(key, tuple) for key in keys)
        with states_kept() if seeded else nullcontext():
            return [self._item(key) for key in keys]

    def _item(self, key: int | Draw) -> Any:
        index, seed = key if isinstance(key, tuple) else (int(key), None)
        index = range(len(self))[index]  # counts from the end if negative; IndexError beyond
        image, label = self.source[self.indices[index]]
        if seed is not None:
            start_at(seed)
        try:
            views = self.transform(image)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            name = self.files[index] if self.samples else f"image {index}"
            raise UserError(
                f"{shown(name)}: was read, but its transform failed ({reason})"
            ) from error
        if self.with_index:  # the online classifier, which logs nothing then, takes no −1
            return index, views, int(label) if self.labelled else 0
        return views, int(label)


def check_same_classes(train: list[str], val: list[str]) -> None:
    """A class that one of both lacks would shift the labels of all that follow, without a word.

    Raises:
        UserError: names a class that is in one of the two only.
    """
    if odd := sorted({*train} ^ {*val}):
        raise UserError(
            f"data: {len(train)} classes in train and {len(val)} in val must be the same; class "
            f"{shown(odd[0])} is in {'train' if odd[0] in train else 'val'} only"
        )


def pair_notes(train: Images, val: Images | None) -> list[str]:
    """A sentence on validation images whose files are copies of training images, if any."""
    if val is None or not train.samples or not val.samples:
        return []
    return copies_notes(train.files, val.files, val.source.root)


def copies_notes(train: Sequence[PathLike], val: Sequence[PathLike], where: PathLike) -> list[str]:
    """:func:`pair_notes` of files; more than ``MOST_COMPARED`` are not compared."""
    if len(train) + len(val) > MOST_COMPARED or not _is_first_process():
        return []
    sizes = {*map(os.path.getsize, train)}
    candidates = [file for file in val if os.path.getsize(file) in sizes]
    sizes = {*map(os.path.getsize, candidates)}
    alike = [file for file in train if os.path.getsize(file) in sizes]
    copies = np.isin(_fingerprints(candidates), _fingerprints(alike)).sum()
    images = f"{copies} of {_count(len(val), 'validation image')}"
    note = f"{shown(where)}: {images} are copies of training images; accuracies are too high"
    return [note] if copies else []


def write_fingerprints(dataset: Images, run_folder: PathLike) -> None:
    """Notes in a run's folder which images it was trained on, for :func:`overlap_notes`.

    Of at most ``MOST_COMPARED`` files, 8 bytes each in ``images.npy``; of others, nothing.
    """
    if dataset.samples and len(dataset) <= MOST_COMPARED:
        with atomic_write(Path(run_folder) / FINGERPRINTS) as temporary, temporary.open("wb") as f:
            np.save(f, _fingerprints(dataset.files))


def overlap_notes(dataset: Images, run_folder: PathLike) -> list[str]:
    """A sentence on images to evaluate on that a run was trained on, by the content of their files.

    Args:
        run_folder: that of the run's checkpoint, or a folder in it.

    Returns:
        Nothing where there are none, or where it cannot be known: more than ``MOST_COMPARED``
        images, no files, or a run that noted none.
    """
    file = Path(run_folder) / FINGERPRINTS
    file = file if file.is_file() else Path(run_folder).parent / FINGERPRINTS
    if not file.is_file() or not dataset.samples or len(dataset) > MOST_COMPARED:
        return []
    try:
        trained = np.lib.format.open_memmap(file, mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{file}: damaged ({error}); without it, nothing is compared") from error
    overlap = np.isin(_fingerprints(dataset.files), trained).sum()
    where = shown(f"{dataset.source.root}: {overlap} of {_count(len(dataset), 'image')}")
    note = f"{where} to evaluate on were training images of {run_folder}; accuracies are too high"
    return [note] if overlap else []


def _fingerprints(files: Sequence[PathLike]) -> NDArray[np.uint64]:
    """A number of 64 bits for each file, from its size and its content."""
    return np.fromiter(map(_fingerprint, files), np.uint64, len(files))


def _fingerprint(file: PathLike) -> int:
    with open(file, "rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        digest = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=8)
        starts = (0, size // 2, size - BLOCK) if size > 3 * BLOCK else range(0, size, BLOCK)
        for start in starts:
            stream.seek(start)
            digest.update(stream.read(BLOCK))
    return int.from_bytes(digest.digest(), "little")
