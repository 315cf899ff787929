"""What the commands that evaluate features share: options, and the way to the features."""

import argparse
from typing import TYPE_CHECKING

from metamask_solo.commands import COMMANDS
from metamask_solo.errors import UserError
from metamask_solo.paths import user_path

if TYPE_CHECKING:
    from metamask_solo.evaluation.features import FeatureReader


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def command_parser(name: str, more: str = "", epilog: str | None = None) -> argparse.ArgumentParser:
    """A parser whose description is the command's line in ``metamask-solo --help``.

    Args:
        name: of the command.
        more: what follows on that line.
    """
    line = COMMANDS[name]
    return argparse.ArgumentParser(
        prog=f"metamask-solo {name}",
        description=line[0].upper() + line[1:] + more,
        epilog=epilog,
        formatter_class=Help,
    )


def add_feature_options(
    parser: argparse.ArgumentParser, data: str, split: bool = True, several: bool = False
) -> None:
    """The options of :func:`feature_reader`.

    Args:
        data: what the folder of --data may hold.
        split: whether the command reads one split, that of --split.
        several: whether --features takes more than one.
    """
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help=".ckpt file or folder of a run")
    add("--data", type=user_path, metavar="FOLDER", help=f"{data} (default: the data of the run)")
    if split:
        add("--split", choices=("train", "val"), default="val", help="which images")
    parts = ("backbone", "projector")
    if several:
        add("--features", choices=parts, nargs="+", default=["backbone"], help="whose output")
    else:
        add("--features", choices=parts, default="backbone", help="whose output")
    kind = parser.add_mutually_exclusive_group()
    masked = "masked features (default where the checkpoint has a mask)"
    kind.add_argument("--masked", action="store_true", default=None, help=masked)
    plain = "features without mask"
    kind.add_argument("--plain", dest="masked", action="store_false", default=None, help=plain)
    add("--batch-size", type=int, default=256, metavar="N", help="images at a time")
    add("--num-workers", type=int, default=2, metavar="N", help="processes that read images")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of the network")


def feature_reader(arguments: argparse.Namespace, features: str) -> "FeatureReader":
    """The network of a checkpoint, and the images of --data, as the options say.

    Raises:
        UserError: an option or the checkpoint cannot be used.
    """
    from metamask_solo.evaluation.features import FeatureReader

    check_counts(batch_size=arguments.batch_size, num_workers=arguments.num_workers)
    return FeatureReader(
        arguments.checkpoint,
        features,
        arguments.masked,
        arguments.data,
        arguments.batch_size,
        arguments.num_workers,
        arguments.device,
    )


def check_counts(**values: int) -> None:
    """Refuses an option below its least value: 0 for workers and seeds, 1 for all others."""
    for name, value in values.items():
        least = 0 if name in ("num_workers", "seed") else 1
        if value < least:
            raise UserError(f"--{name.replace('_', '-')}={value}: must be at least {least}")
