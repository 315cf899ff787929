"""Folders of images, and data sets of transformed images: what loaders hand to their workers.

All classes can be pickled, so workers may be started in any way; nothing here imports solo-learn,
so that they start quickly.
"""

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
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


@dataclass
class ImageFolder(Dataset[tuple[Image.Image, int]]):
    """The images of a folder, made by :func:`read_folder`: items are (8-bit RGB image, label).

    Attributes:
        root: the folder.
        samples: path and label of each image, −1 without labels.
        classes: names of the classes; none without labels.
        notes: what was left out, and what is doubtful, in sentences.
        rule: how an image is read.
    """

    root: str
    samples: list[tuple[str, int]]
    classes: list[str]
    notes: list[str]
    rule: ReadingRule = DEFAULT_RULE

    @property
    def targets(self) -> list[int]:
        """All labels."""
        return [label for _, label in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return read_image(path, self.rule), label


def check_folder(folder: PathLike, key: str, labels: bool = True) -> list[str]:
    """The names of the class folders in a folder; the images are not looked at.

    Args:
        key: the setting that names the folder, for messages.
        labels: False for a folder of images, which has no classes.

    Raises:
        UserError: there is no such folder, it has no class folder, or its folders are splits.
    """
    where = _where(folder, key)
    try:
        with os.scandir(user_path(folder)) as entries:
            names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{where}: no such folder") from error
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}") from error
    _refuse_splits(user_path(folder), key, names, least=1)
    if labels and not names:
        raise UserError(f"{where}: holds no class folder")
    return names if labels else []


def read_folder(
    folder: PathLike,
    key: str,
    labels: bool | None = True,
    rule: ReadingRule = DEFAULT_RULE,
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

    Raises:
        UserError: there is no such folder, it holds no image, a class is empty, its folders are
            splits, or a link leads nowhere.
    """
    where = _where(folder, key)
    classes = check_folder(folder, key, labels is True)
    root = str(user_path(folder))
    files, notes = _walk(root, key)
    filled = {name for name, _, _ in files}
    beside = _images_such_as([name for label, _, name in files if not label])
    if labels or (labels is None and filled and not beside):
        classes = check_folder(folder, key)
        if empty := [shown(name) for name in classes if name not in filled]:
            raise UserError("; ".join([f"{where}: class folder {empty[0]} holds no image", *notes]))
        if beside:
            notes.insert(0, f"{beside}, left out: beside the class folders, so of no class")
        notes = [*_doubts_of_classes(root, files, classes), *notes]
        number = {name: label for label, name in enumerate(classes)}
        samples = [(os.path.join(*path), number[name]) for name, *path in sorted(files) if name]
    else:
        samples = [(os.path.join(*path), NO_LABEL) for path in sorted(file[1:] for file in files)]
        if labels is None and beside and len(filled) > 1:
            notes.insert(0, f"{beside}, beside folders of images: so no image gets a label")
    if not samples:
        raise UserError("; ".join([f"{where}: holds no image", *notes]))
    notes = [*_notes_of_split(root), *(shown(f"{where}: {note}") for note in notes)]
    return ImageFolder(root, samples, classes, notes, rule)


def holds_classes(folder: PathLike, key: str) -> bool:
    """Whether a folder holds folders with images, rather than images alone."""
    check_folder(folder, key, labels=False)
    return any(name for name, _, _ in _walk(str(user_path(folder)), key)[0])


def _walk(root: str, key: str) -> tuple[list[tuple[str, str, str]], list[str]]:
    """All that lies below a folder.

    Returns:
        Class (empty beside the class folders), folder and name of each image, in any order; and
        what was left out, in words.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{_where(error.filename, key)}: {error.strerror}") from error

    images: list[tuple[str, str, str]] = []
    others: Counter[str] = Counter()  # by ending
    again: list[str] = []  # links to folders that were read already
    real = Path(os.path.realpath(root))
    met = {_identity(folder) for folder in (real, *real.parents)}
    for folder, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        inner = os.path.relpath(folder, root)
        label = "" if inner == "." else inner.split(os.sep)[0]
        visible = sorted(name for name in folders if not name.startswith("."))
        folders.clear()
        _refuse_splits(folder, key, visible, least=2)
        for name in visible:
            identity = _identity(path := os.path.join(folder, name))
            if identity in met:
                again.append(os.path.relpath(path, root))
            else:
                folders.append(name)
            met.add(identity)
        for name in names:
            path = os.path.join(folder, name)
            if name.startswith("."):
                continue
            if not name.lower().endswith(ENDINGS):
                others[os.path.splitext(name)[1].lower() or "no ending"] += 1
            elif not os.path.isfile(path):
                raise UserError(f"{_where(path, key)}: the link leads to no file")
            else:
                images.append((label, folder, name))
    notes = []
    if again:
        links = _count(len(again), "link")
        notes.append(f"{links} left out, such as {again[0]}: the folder was read already")
    if others:
        counts = sorted(others.items(), key=lambda item: (-item[1], item[0]))
        kinds = ", ".join(f"{kind} {count}" for kind, count in counts[:8])
        notes.append(f"{_count(others.total(), 'file')} left out, no {KINDS}: {kinds}")
    return images, notes


def split_notes(folder: PathLike, split: str) -> list[str]:
    """A sentence on images that lie beside the folder of a split, and so are not read."""
    names = [name for name in os.listdir(folder) if name.lower().endswith(ENDINGS)]
    beside = _images_such_as([name for name in names if not name.startswith(".")])
    return [shown(f"{folder}: {beside}, left out: beside {split}/")] if beside else []


def _images_such_as(names: list[str]) -> str:
    """How many images, and the first one's name; empty for none."""
    return f"{_count(len(names), 'image')}, such as {min(names)}" if names else ""


def _doubts_of_classes(
    root: str, images: list[tuple[str, str, str]], classes: list[str]
) -> list[str]:
    """What is doubtful of class folders."""
    notes = []
    if len(classes) == 1:
        notes.append(f"only 1 class ({classes[0]}), so every accuracy is 100 %")
    # a class, or a class and a folder in it; one folder "images" in each is usual, several are not
    folders_of = {folder: label for label, folder, _ in images if label}
    tops = {tuple(os.path.relpath(folder, root).split(os.sep)[:2]) for folder in folders_of}
    several = [top[0] for top, n in Counter(top[:1] for top in tops).items() if n > 1]
    if several and all(len(top) == 2 for top in tops):
        notes.append(
            "no class folder holds an image itself, all lie in folders below: is this one level "
            f"too high, and {root}/{min(several)} the folder of the classes? For images without "
            "labels, give data.no_labels=True"
        )
    return notes


def _where(folder: PathLike, key: str) -> str:
    return (f"{key}=" if key else "") + shown(user_path(folder))


def _refuse_splits(path: PathLike, key: str, names: list[str], least: int) -> None:
    splits = [name for name in names if name.lower() in SPLITS]
    if len(splits) >= least:
        splits.sort(key=lambda name: SPLITS.index(name.lower()))
        raise UserError(
            f"{_where(path, key)}: names of splits are no classes: {', '.join(splits[:4])}; give "
            f"{_where(os.path.join(path, splits[0]), key)} (or rename the class)"
        )


def _identity(path: PathLike) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _notes_of_split(folder: PathLike) -> list[str]:
    """What ``data split`` left out when it made the links of a folder."""
    try:
        split = json.loads((Path(folder).parent / SPLIT_FILE).read_text())
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
        root: the folder; empty for other data sets.
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
        self.root: str = source.root if isinstance(source, ImageFolder) else ""
        self.samples = [source.samples[i] for i in self.indices] if self.root else None

    def __len__(self) -> int:
        return len(self.indices)

    def __str__(self) -> str:
        """How many images of which split, such as ``10 val images``."""
        return _count(len(self), f"{self.split} image".strip())

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


def pair_notes(train: Any, val: Any) -> list[str]:
    """A sentence on validation images whose files are copies of training images, if any.

    Args:
        train: an :class:`ImageFolder` or :class:`Images`; more than ``MOST_COMPARED`` images, and
            those of no folder, are not compared.
        val: likewise, or None.
    """
    if not (val and val.samples and train.samples) or not _is_first_process():
        return []
    if len(train) + len(val) > MOST_COMPARED:
        return []
    files, candidates = ([path for path, _ in images.samples] for images in (train, val))
    sizes = {*map(os.path.getsize, files)}
    candidates = [file for file in candidates if os.path.getsize(file) in sizes]
    sizes = {*map(os.path.getsize, candidates)}
    files = [file for file in files if os.path.getsize(file) in sizes]
    copies = np.isin(_fingerprints(candidates), _fingerprints(files)).sum()
    count = f"{shown(val.root)}: {copies} of {_count(len(val), 'validation image')}"
    return [f"{count} are copies of training images; accuracies are too high"] if copies else []


def write_fingerprints(dataset: Any, run_folder: PathLike, *sources: PathLike) -> None:
    """Notes beside a checkpoint which images it was trained on, for :func:`overlap_notes`.

    8 bytes for each file, in ``images.npy``; without any, no such file.

    Args:
        dataset: :class:`Images` to train on, or None; more than ``MOST_COMPARED``, and those of no
            folder, are left out.
        run_folder: where the checkpoint lies, or will lie.
        sources: folders of the checkpoints that its weights come from; what is noted there counts.
    """
    known = [array for folder in sources if (array := _read_fingerprints(folder)) is not None]
    if getattr(dataset, "samples", None) and len(dataset) <= MOST_COMPARED:
        known.append(_fingerprints(dataset.files))
    file = Path(run_folder) / FINGERPRINTS
    if not known:
        file.unlink(missing_ok=True)
        return
    with atomic_write(file) as temporary, temporary.open("wb") as stream:
        np.save(stream, np.unique(np.concatenate(known)))


def overlap_notes(dataset: Images, run_folder: PathLike) -> list[str]:
    """A sentence on images to evaluate on that a run was trained on, by the content of their files.

    Args:
        run_folder: that of the run's checkpoint.

    Returns:
        Nothing where there are none, or where it cannot be known: more than ``MOST_COMPARED``
        images, no files, or a run that noted none.
    """
    trained = _read_fingerprints(run_folder)
    if trained is None or not dataset.samples or len(dataset) > MOST_COMPARED:
        return []
    overlap = np.isin(_fingerprints(dataset.files), trained).sum()
    where = shown(f"{dataset.root}: {overlap} of {_count(len(dataset), 'image')}")
    note = f"{where} to evaluate on were training images of {run_folder}; accuracies are too high"
    return [note] if overlap else []


def _read_fingerprints(run_folder: PathLike) -> NDArray[np.uint64] | None:
    file = Path(run_folder) / FINGERPRINTS
    if not file.is_file():
        return None
    try:
        return np.lib.format.open_memmap(file, mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{file}: damaged ({error}); without it, nothing is compared") from error


def _fingerprints(files: Sequence[PathLike]) -> NDArray[np.uint64]:
    """A number of 64 bits for each file, from its size and its content."""
    digests = []
    for file in files:
        with open(file, "rb", buffering=0) as stream:
            size = os.fstat(stream.fileno()).st_size
            digest = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=8)
            starts = (0, size // 2, size - BLOCK) if size > 3 * BLOCK else range(0, size, BLOCK)
            for start in starts:
                stream.seek(start)
                digest.update(stream.read(BLOCK))
        digests.append(digest.digest())
    return np.frombuffer(b"".join(digests), "<u8")
