"""``metamask-solo embed``: the features of a folder of images, in a file for other tools."""

import argparse
import zipfile
from pathlib import Path
from typing import Any

from metamask_solo.commands.options import (
    add_feature_options,
    add_loading_options,
    add_source_options,
    check_counts,
)

HELP = "write a checkpoint's features of a folder of images to a file"


def main(argv: list[str]) -> int:
    """Writes features, file names, and labels where there are any, to an .npz file.

    The features go to the disk batch by batch, so memory does not grow with the images.

    Raises:
        UserError: a setting, the checkpoint, the data or the output file cannot be used.
    """
    arguments = _parse(argv)

    from metamask_solo.data.images import folder_loader, split_loader
    from metamask_solo.errors import UserError
    from metamask_solo.evaluation.features import feature_extractor, pick_device
    from metamask_solo.training.resume import say_other_images

    check_counts(batch_size=arguments.batch_size, num_workers=arguments.num_workers)
    out: Path = arguments.out
    if out.suffix != ".npz":
        raise UserError(f"--out={out}: must end in .npz")
    if out.exists() and not arguments.force:
        raise UserError(f"--out={out}: exists already; --force overwrites it")
    device = pick_device(arguments.device)
    module, checkpoint = feature_extractor(
        arguments.checkpoint, arguments.features, arguments.masked
    )
    assert checkpoint.config is not None  # feature_extractor needs it
    batches = arguments.batch_size, arguments.num_workers
    if arguments.data is not None:
        loader = folder_loader(arguments.data, checkpoint.config, *batches)
    else:
        loader = split_loader(arguments.split, checkpoint.config, None, *batches, labelled=False)
        say_other_images(checkpoint.config)
    shape = write_features(module, loader, device, out)
    masked = checkpoint.mask is not None and arguments.masked is not False
    kind = f"{'masked' if masked else 'plain'} {arguments.features} features"
    print(f"{out}: {kind} of {shape[0]} images, {shape[1]} dimensions")
    print(f'next: data = numpy.load("{out}"); data["features"], data["files"]')
    return 0


def write_features(module: Any, loader: Any, device: str, out: Path) -> tuple[int, int]:
    """Writes the features of all images, in the order of their files.

    ``features`` (N × D, float32), ``files`` (N), and with labels ``labels`` (N) and ``classes``
    (names in the order of the labels).

    Raises:
        UserError: ``out`` cannot be written.
    """
    import numpy as np
    import torch
    from tqdm import tqdm

    from metamask_solo.atomic_files import atomic_write
    from metamask_solo.data.images import class_names
    from metamask_solo.data.unlabelled import is_labelled, sample_names

    module = module.to(device).eval()
    count, start = len(loader.dataset), 0
    labels = []
    with atomic_write(out) as temporary:
        rows: Any = None
        block = Path(f"{temporary}.npy")
        try:
            with torch.no_grad():
                for images, targets in tqdm(loader, desc="features", leave=False):
                    features = module(images.to(device)).float().cpu().numpy()
                    if rows is None:
                        shape = (count, features.shape[1])
                        rows = np.lib.format.open_memmap(block, "w+", np.float32, shape)
                    rows[start : start + len(features)] = features
                    start += len(features)
                    labels.append(targets)
            rows.flush()
            arrays = {"files": np.array(sample_names(loader))}
            known = torch.cat(labels)
            if is_labelled(known):
                arrays |= {"labels": known.numpy(), "classes": np.array(class_names(loader))}
            with zipfile.ZipFile(temporary, "w") as archive:
                archive.write(block, "features.npy")
                for name, array in arrays.items():
                    with archive.open(f"{name}.npy", "w") as file:
                        np.lib.format.write_array(file, array, allow_pickle=False)
        finally:
            block.unlink(missing_ok=True)
    return rows.shape


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="metamask-solo embed",
        description=HELP[0].upper() + HELP[1:] + ". The .npz file holds `features` (one row for "
        "each image), `files`, and where the images lie in class folders `labels` and `classes`.",
    )
    data = "class folders, or images without labels at any depth (default: the run's own data)"
    add_source_options(parser, data, split="of the run's own data ")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("features.npz"),
        metavar="FILE",
        help="an .npz file (default: features.npz)",
    )
    add_feature_options(parser)
    add_loading_options(parser)
    parser.add_argument("--force", action="store_true", help="overwrite FILE")
    return parser.parse_args(argv)
