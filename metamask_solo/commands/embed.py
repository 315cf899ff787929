"""``metamask-solo embed``: the features of a folder of images, in files for other tools."""

import argparse
import csv
from pathlib import Path
from typing import Any

from metamask_solo.commands.options import (
    add_feature_options,
    add_split_option,
    command_parser,
    feature_reader,
)
from metamask_solo.paths import user_path


def main(argv: list[str]) -> int:
    """Writes features to an .npy file, and file names and labels to a .csv file beside it.

    Raises:
        UserError: a setting, the checkpoint, the data or an output file cannot be used.
    """
    arguments = _parse(argv)

    from metamask_solo.errors import UserError

    out: Path = arguments.out
    table = out.with_suffix(".csv")
    if out.suffix != ".npy":
        raise UserError(f"--out={out}: must end in .npy; names and labels go to a .csv beside it")
    for file in (out, table):
        if file.exists() and not arguments.force:
            raise UserError(f"--out={out}: {file} exists already; --force overwrites it")
    reader = feature_reader(arguments)
    loader = reader.loader(arguments.split, labels=None)
    dims = _write_features(reader, loader, out, table)
    print(f"{out}: {reader.kind} of {loader.dataset}, {dims} dimensions; names in {table}")
    print(
        f'next: features = numpy.load("{out}", mmap_mode="r"); names = pandas.read_csv("{table}")'
    )
    return 0


def _write_features(reader: Any, loader: Any, out: Path, table: Path) -> int:
    """Writes N × D features in single precision, and their files, labels and classes; returns D.

    The features go to the disk batch by batch, so memory does not grow with the images.
    """
    import numpy as np
    import torch

    from metamask_solo.atomic_files import atomic_write
    from metamask_solo.evaluation.features import feature_batches, say_collapse

    images, label, start = loader.dataset, str(reader.checkpoint.path), 0
    files = images.files
    array: Any = None
    with (
        atomic_write(out) as array_file,
        atomic_write(table) as table_file,
        # a name's bytes that are no text are written as they are
        table_file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as stream,
    ):
        rows = csv.writer(stream)
        rows.writerow(("file", "label", "class") if images.labelled else ("file",))
        for features, labels in feature_batches(reader.module, loader, reader.device, label):
            if array is None:
                shape = len(images), features.shape[1]
                array = np.lib.format.open_memmap(array_file, "w+", np.float32, shape)
            end = start + len(features)
            array[start:end] = features.numpy()
            for name, number in zip(files[start:end], labels.tolist(), strict=True):
                rows.writerow(
                    (name, number, images.classes[number]) if images.labelled else (name,)
                )
            start = end
        array.flush()
        say_collapse(torch.from_numpy(array), label)
    return int(array.shape[1])


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = command_parser(
        "embed",
        ": FILE holds an array with one row for each image, and a .csv file of the same name "
        "the images' files, and their labels and classes where they lie in class folders.",
    )
    add_feature_options(parser, "train/ and val/, class folders, or images at any depth")
    add_split_option(parser)
    add = parser.add_argument
    add("--out", type=user_path, default=Path("features.npy"), metavar="FILE", help="an .npy file")
    add("--force", action="store_true", help="overwrite FILE and the .csv file")
    return parser.parse_args(argv)
