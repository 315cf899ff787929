"""``metamask-solo embed``: the features of a folder of images, in files for other tools."""

from typing import Any

from metamask_solo.commands.options import (
    add_feature_options,
    command_parser,
    feature_reader,
    file,
)


def main(argv: list[str]) -> int:
    """Writes features to an .npy file, and file names and labels to a .csv file beside it.

    The features are N × D in single precision. They go to the disk batch by batch, so memory does
    not grow with the images.

    Raises:
        UserError: a setting, the checkpoint, the data or an output file cannot be used.
    """
    parser = command_parser(
        "embed",
        ": FILE holds an array with one row for each image, and a .csv file of the same name "
        "the images' files, and their labels and classes where they lie in class folders.",
    )
    add_feature_options(parser, "train/ and val/, class folders, or images at any depth")
    add = parser.add_argument
    add("--split", choices=("train", "val"), default="val", help="which images")
    add("--out", type=file(".npy"), default="features.npy", metavar="FILE", help="an .npy file")
    add("--force", action="store_true", help="overwrite FILE and the .csv file")
    arguments = parser.parse_args(argv)

    import numpy as np
    import pandas as pd
    import torch

    from metamask_solo.atomic_files import atomic_write
    from metamask_solo.errors import UserError
    from metamask_solo.evaluation.features import feature_batches, say_collapse

    out = arguments.out
    names = out.with_suffix(".csv")
    for path in (out, names):
        if path.exists() and not arguments.force:
            raise UserError(f"--out={out}: {path} exists already; --force overwrites it")
    reader = feature_reader(arguments)
    loader = reader.loader(arguments.split, labels=None)
    images: Any = loader.dataset
    checkpoint = str(reader.checkpoint.path)
    table = pd.DataFrame({"file": images.files}, dtype=object)
    labels: list[int] = []
    with atomic_write(out) as array_file, atomic_write(names) as table_file:
        # written rather than mapped: on a full disk, a map ends the process without a line
        with array_file.open("wb") as stream:
            for features, of in feature_batches(reader.module, loader, reader.device, checkpoint):
                if not labels:
                    shape = len(images), features.shape[1]
                    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(stream, header)
                stream.write(features.numpy().astype("<f4").tobytes())
                labels += of.tolist()
        array = np.load(array_file, mmap_mode="c")  # torch takes no other
        say_collapse(torch.from_numpy(array), checkpoint)
        if images.labelled:
            table = table.assign(label=labels, **{"class": [images.classes[i] for i in labels]})
        # a name's bytes that are no text are written as they are
        table.to_csv(table_file, index=False, encoding="utf-8", errors="surrogateescape")
    print(f"{out}: {reader.kind} of {images}, {array.shape[1]} dimensions; names in {names}")
    # a class such as NA or 007 stays what it is
    read = f'pandas.read_csv("{names}", keep_default_na=False, dtype={{"class": str}})'
    print(f'next: features = numpy.load("{out}", mmap_mode="r"); names = {read}')
    return 0
