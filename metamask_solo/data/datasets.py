"""Folders of images, and data sets of transformed images: what loaders hand to their workers.

All classes can be pickled, so workers may be started in any way; nothing here imports solo-learn,
so that they start quickly.
"""

import hashlib
import json
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from metamask_solo.atomic_files import atomic_write
from metamask_solo.data.read_image import DEFAULT_RULE, ENDINGS, KINDS, ReadingRule, read_image
from metamask_solo.data.seeds import Draw, generator_of, start_at, states_kept
from metamask_solo.errors import UserError
from metamask_solo.paths import as_text, user_path

PathLike = str | Path
NO_LABEL = -1
NAMES_OF_SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")
SPLIT_FILE, SPLIT_COMMAND = "split.json", "metamask-solo data split"
FINGERPRINTS = "images.npy"
MOST_COMPARED = 100_000  # images, by their content
BLOCK = 2**14  # bytes; three blocks of a file are compared, of up to three all of it


def say(*notes: str) -> None:
    """Prints what a reader leaves out or doubts on stderr, by the first process alone."""
    if is_first_process():
        for note in notes:
            print(f"note: {note}", file=sys.stderr)


def is_first_process() -> bool:
    """Whether this process is, as far as its environment tells, the first one of its run."""
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
    return all(os.environ.get(name, "0") == "0" for name in names)


@dataclass(eq=False)
class Images(Dataset[Any]):
    """Images of a folder or of one of torchvision's data sets, and what a transform makes of them.

    An item is (image, label), or (index, views, label) for pretraining. It is asked for by its
    index, or by its index and a seed: then the transform draws what that seed gives, whatever
    process or worker it runs in, and the process's own random numbers stay as they were.
    ``dataclasses.replace`` makes a selection, or another transform.

    Attributes:
        samples: path and label of each image, or its number where it has no file; −1 for no label.
        read: from a path or number to an 8-bit RGB image.
        root: the folder; empty for other data sets.
        notes: what was left out or is doubtful, in sentences.
        split: which images these are, for titles: ``train``, ``val`` or nothing.
        labelled: whether every image has a label.

    Raises:
        UserError: on access: names the image that cannot be read or transformed.
    """

    samples: list[tuple[Any, int]]
    read: Callable[[Any], Any]
    classes: list[str]
    root: str = ""
    notes: list[str] = field(default_factory=list)
    transform: Callable[..., Any] | None = None
    with_index: bool = False
    split: str = ""

    def __post_init__(self) -> None:
        self.labelled = NO_LABEL not in self.targets

    def __len__(self) -> int:
        return len(self.samples)

    def __str__(self) -> str:
        """How many images of which split, such as ``10 val images``."""
        return counted(len(self), f"{self.split} image".strip())

    @property
    def targets(self) -> list[int]:
        """The label of each image."""
        return [label for _, label in self.samples]

    @property
    def files(self) -> list[str]:
        """The file of each image; its number where it has none."""
        return [str(file) for file, _ in self.samples]

    @cached_property
    def fingerprints(self) -> NDArray[np.uint64]:
        """64 bits of the size and content of each file; of no files, or too many, none."""
        few = self.root and len(self) <= MOST_COMPARED
        digests = b"".join(map(_fingerprint, self.files if few else []))
        return np.frombuffer(digests, "<u8")

    def limited(self, limit: int | None, seed: int) -> "Images":
        """At most so many of the images, drawn by ``seed``, in their order; None for all."""
        if limit is None or limit >= len(self):
            return self
        order = torch.randperm(len(self), generator=generator_of(seed))
        return replace(self, samples=[self.samples[i] for i in sorted(order[:limit].tolist())])

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
        file, label = self.samples[index]
        views = self.read(file)
        if seed is not None:
            start_at(seed)
        try:
            if self.transform is not None:
                views = self.transform(views)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            name = as_text(file) if self.root else f"image {file}"
            raise UserError(f"{name}: was read, but its transform failed ({reason})") from error
        if self.with_index:  # the online classifier, which logs nothing then, takes no −1
            return index, views, label if self.labelled else 0
        return views, label


def check_folder(folder: PathLike, key: str, labels: bool = True) -> list[str]:
    """The names of the folders in a folder of images; the images are not looked at.

    Args:
        key: the setting that names the folder, for messages.
        labels: whether these must be classes.

    Raises:
        UserError: there is no such folder, it has no class folder, or its folders are splits.
    """
    names = _folders_in(folder, key)
    _refuse_splits(user_path(folder), key, names, least=1)
    if labels and not names:
        raise UserError(f"{_where(folder, key)}: holds no class folder")
    return names


def holds_split(folder: PathLike, key: str, split: str) -> bool:
    """Whether a folder holds that of a split, such as ``val``.

    Raises:
        UserError: there is no such folder, or class folders lie beside those of splits.
    """
    names = _folders_in(folder, key)
    if any(name.lower() not in NAMES_OF_SPLITS for name in names):
        _refuse_splits(user_path(folder), key, names, least=1)
    return split in names


def _folders_in(folder: PathLike, key: str) -> list[str]:
    where = _where(folder, key)
    try:
        with os.scandir(user_path(folder)) as entries:
            return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{where}: no such folder") from error
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}") from error


def read_folder(
    folder: PathLike,
    key: str,
    labels: bool | None = True,
    rule: ReadingRule = DEFAULT_RULE,
) -> Images:
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
    filled = {label for label, _, _ in files if label}
    beside = _such_as([name for label, _, name in files if not label])
    if labels or (labels is None and filled and not beside):
        if empty := [as_text(name) for name in classes if name not in filled]:
            raise UserError("; ".join([f"{where}: class folder {empty[0]} holds no image", *notes]))
        if beside:
            notes.insert(0, f"{beside}, left out: beside the class folders, and without a class")
        notes = [*_doubts_of_classes(root, files, classes), *notes]
        number = {name: label for label, name in enumerate(classes)}
        samples = [(os.path.join(*path), number[name]) for name, *path in sorted(files) if name]
    else:
        classes = []
        samples = [(os.path.join(*path), NO_LABEL) for path in sorted(file[1:] for file in files)]
        if labels is None and beside and filled:
            notes.insert(0, f"{beside}, beside folders of images: so no image gets a label")
    if not samples:
        raise UserError("; ".join([f"{where}: holds no image", *notes]))
    notes = [*_notes_of_split(user_path(folder)), *(as_text(f"{where}: {note}") for note in notes)]
    return Images(samples, partial(read_image, rule=rule), [*map(as_text, classes)], root, notes)


def holds_classes(folder: PathLike, key: str) -> bool:
    """Whether a folder holds folders with images, rather than images alone."""
    check_folder(folder, key, labels=False)
    return any(name for name, _, _ in _walk(str(user_path(folder)), key)[0])


def _walk(root: str, key: str) -> tuple[list[tuple[str, str, str]], list[str]]:
    """Class (empty beside the class folders), folder and name of each image; what is left out."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{_where(error.filename, key)}: {error.strerror}") from error

    images: list[tuple[str, str, str]] = []
    left_out: Counter[str] = Counter()  # by ending
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
                left_out[os.path.splitext(name)[1].lower() or "no ending"] += 1
            elif not os.path.isfile(path):
                raise UserError(f"{_where(path, key)}: the link leads to no file")
            else:
                images.append((label, folder, name))
    notes = []
    if again:
        links = counted(len(again), "link")
        notes.append(f"{links} left out, such as {again[0]}: the folder was read already")
    if left_out:
        counts = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
        kinds = ", ".join(f"{kind} {count}" for kind, count in counts[:8])
        notes.append(f"{counted(left_out.total(), 'file')} left out, no {KINDS}: {kinds}")
    return images, notes


def _such_as(names: list[str]) -> str:
    """How many images, and the first one's name; empty for none."""
    return f"{counted(len(names), 'image')}, such as {min(names)}" if names else ""


def _doubts_of_classes(
    root: str, images: list[tuple[str, str, str]], classes: list[str]
) -> list[str]:
    """What is doubtful of class folders."""
    notes = []
    if len(classes) == 1:
        notes.append(f"only 1 class ({classes[0]}), so every accuracy is 100 %")
    name, count = Counter(unicodedata.normalize("NFC", name) for name in classes).most_common(1)[0]
    if count > 1:
        notes.append(f"{name} is two classes, in two Unicode forms: put the images into one folder")
    # a class, or a class and a folder in it; one folder "images" in each is usual, several are not
    folders = {folder for label, folder, _ in images if label}
    tops = {tuple(os.path.relpath(folder, root).split(os.sep)[:2]) for folder in folders}
    several = [name for name, n in Counter(top[0] for top in tops).items() if n > 1]
    if several and all(len(top) == 2 for top in tops):
        notes.append(
            "all images lie in sub-folders of the class folders: is this folder one level too "
            f"high, and {root}/{min(several)} the folder of the classes? For images without "
            "labels, give data.no_labels=True"
        )
    return notes


def split_settings(folder: Path) -> dict[str, Any]:
    """What ``data split`` noted in a folder that it made; nothing of another folder."""
    with suppress(OSError, ValueError):
        noted = json.loads((folder / SPLIT_FILE).read_text())
        if isinstance(noted, dict) and noted.get("made_by") == SPLIT_COMMAND:
            return noted
    return {}


def _notes_of_split(folder: Path) -> list[str]:
    """What ``data split`` left out when it made a folder, and what lies beside that of a split."""
    notes: list[str] = list(split_settings(folder.parent).get("notes", ()))
    if folder.name.lower() in NAMES_OF_SPLITS:
        with suppress(OSError):
            names = [name for name in os.listdir(folder.parent) if name.lower().endswith(ENDINGS)]
            if beside := _such_as([name for name in names if not name.startswith(".")]):
                notes.append(as_text(f"{folder.parent}: {beside}, left out: beside {folder.name}/"))
    return notes


def _where(folder: PathLike, key: str) -> str:
    return (f"{key}=" if key else "") + as_text(user_path(folder))


def _refuse_splits(path: PathLike, key: str, names: list[str], least: int) -> None:
    """Of the folder itself one such name is too many; a class below it may have one."""
    splits = [name for name in names if name.lower() in NAMES_OF_SPLITS]
    if len(splits) < least:
        return
    splits.sort(key=lambda name: NAMES_OF_SPLITS.index(name.lower()))
    first, name = splits[0], os.path.basename(path)
    otherwise = f"or, if they split one class, make {first}/{name}/ of {name}/{first}/"
    raise UserError(
        f"{_where(path, key)}: names of splits are no classes: {', '.join(splits[:4])}; give "
        f"{_where(os.path.join(path, first), key)} "
        f"({'or rename the class' if least == 1 else as_text(otherwise)})"
    )


def _identity(path: PathLike) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def counted(number: int, noun: str) -> str:
    """``1 image``, ``2 images``, ``2 classes``."""
    plural = "es" if noun.endswith("s") else "s"
    return f"{number} {noun}{'' if number == 1 else plural}"


def check_same_classes(train: list[str], val: list[str]) -> None:
    """A class that one of both lacks would shift the labels of all that follow, without a word.

    Raises:
        UserError: names a class that is in one of the two only.
    """
    if odd := sorted({*train} ^ {*val}):
        composed = [{unicodedata.normalize("NFC", name) for name in s} for s in (train, val)]
        form = (
            "; the other has it in another Unicode form: rename it"
            if composed[0] == composed[1]
            else ""
        )
        raise UserError(
            f"data: {len(train)} classes in train and {len(val)} in val must be the same; class "
            f"{as_text(odd[0])} is in {'train' if odd[0] in train else 'val'} only{form}"
        )


def pair_notes(train: Images, val: Images | None) -> list[str]:
    """A sentence on validation images whose files are copies of training images, if any."""
    if val is None or not is_first_process():
        return []
    return _known(val, train.fingerprints, "validation image", "are copies of training images")


def overlap_notes(images: Images, run_folder: PathLike) -> list[str]:
    """A sentence on images to evaluate on that the run of a folder was trained on, if any."""
    trained = _read_fingerprints(run_folder)
    text = f"to evaluate on were training images of {run_folder}"
    return [] if trained is None else _known(images, trained, "image", text)


def _known(images: Images, known: NDArray[np.uint64], noun: str, text: str) -> list[str]:
    if not (count := np.isin(images.fingerprints, known).sum()):
        return []
    share = as_text(f"{images.root}: {count} of {counted(len(images), noun)}")
    return [f"{share} {text}; accuracies are too high"]


def write_fingerprints(images: Any, run_folder: PathLike, *sources: PathLike) -> None:
    """Notes beside a checkpoint which images it was trained on, for :func:`overlap_notes`.

    8 bytes for each file, in ``images.npy``; without any, no such file.

    Args:
        images: :class:`Images` to train on, or None; more than ``MOST_COMPARED`` are left out.
        run_folder: where the checkpoint lies, or will lie.
        sources: folders of the checkpoints that its weights come from; what is noted there counts.
    """
    known = [array for folder in sources if (array := _read_fingerprints(folder)) is not None]
    if images is not None:
        known.append(images.fingerprints)
    file = Path(run_folder) / FINGERPRINTS
    if not any(map(len, known)):
        file.unlink(missing_ok=True)
        return
    with atomic_write(file) as temporary, temporary.open("wb") as stream:
        np.save(stream, np.unique(np.concatenate(known)))


def _read_fingerprints(run_folder: PathLike) -> NDArray[np.uint64] | None:
    file = Path(run_folder) / FINGERPRINTS
    if not file.is_file():
        return None
    try:
        return np.lib.format.open_memmap(file, mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{file}: damaged ({error}); without it, nothing is compared") from error


def _fingerprint(file: PathLike) -> bytes:
    with open(file, "rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        digest = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=8)
        starts = (0, size // 2, size - BLOCK) if size > 3 * BLOCK else range(0, size, BLOCK)
        for start in starts:
            stream.seek(start)
            digest.update(stream.read(BLOCK))
    return digest.digest()
