"""Options that several commands share."""

import argparse
from pathlib import Path

from metamask_solo.errors import UserError


def check_counts(**values: int) -> None:
    """Refuses an option below its least value: 0 for workers and seeds, 1 for all others."""
    for name, value in values.items():
        least = 0 if name in ("num_workers", "seed") else 1
        if value < least:
            raise UserError(f"--{name.replace('_', '-')}={value}: must be at least {least}")


def add_loading_options(parser: argparse.ArgumentParser) -> None:
    """The options of every command that reads images through a backbone."""
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="(default: 256)")
    parser.add_argument(
        "--num-workers", type=int, default=2, metavar="N", help="that read images (default: 2)"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)"
    )


def add_source_options(parser: argparse.ArgumentParser, data: str, split: str = "") -> None:
    """A checkpoint, and which images its features are to be of.

    Args:
        data: what the folder of --data may hold.
        split: what --split is of.
    """
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=".ckpt file or folder of a run")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help=data)
    parser.add_argument(
        "--split", choices=("train", "val"), default="val", help=f"{split}(default: val)"
    )


def add_feature_options(parser: argparse.ArgumentParser) -> None:
    """--features, and with or without the mask."""
    parser.add_argument(
        "--features",
        choices=("backbone", "projector"),
        default="backbone",
        help="(default: backbone)",
    )
    add_mask_options(parser)


def add_mask_options(parser: argparse.ArgumentParser) -> None:
    """--masked and --plain; the default, None, is masked where the checkpoint has a mask."""
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--masked",
        action="store_true",
        default=None,
        help="masked features (default where the checkpoint has a mask)",
    )
    kind.add_argument(
        "--plain", dest="masked", action="store_false", default=None, help="features without mask"
    )
