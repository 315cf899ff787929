"""What the commands that evaluate features share: options, and the way to the features."""

import argparse
from typing import TYPE_CHECKING, Any

from metamask_solo.commands import COMMANDS
from metamask_solo.errors import UserError
from metamask_solo.paths import user_path

if TYPE_CHECKING:
    from metamask_solo.evaluation.features import FeatureReader

DATA_SETTINGS = ("data", "batch_size", "num_workers", "device")


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


def add_data_options(parser: argparse.ArgumentParser, data: str) -> None:
    """How images are read, for :func:`data_settings`.

    Args:
        data: what the folder of --data may hold.
    """
    add = parser.add_argument
    add("--data", type=user_path, metavar="FOLDER", help=f"{data} (default: the data of the run)")
    add("--batch-size", type=int, default=256, metavar="N", help="images at a time")
    add("--num-workers", type=int, default=2, metavar="N", help="processes that read images")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of the network")


def add_feature_options(parser: argparse.ArgumentParser, data: str) -> None:
    """The options of :func:`feature_reader`; ``data`` as in :func:`add_data_options`."""
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help=".ckpt file or folder of a run")
    parts = ("backbone", "projector")
    add("--features", choices=parts, default="backbone", help="whose output")
    kind = parser.add_mutually_exclusive_group()
    masked = "masked features (default where the checkpoint has a mask)"
    kind.add_argument("--masked", action="store_true", default=None, help=masked)
    plain = "features without mask"
    kind.add_argument("--plain", dest="masked", action="store_false", default=None, help=plain)
    add_data_options(parser, data)


def add_split_option(parser: argparse.ArgumentParser) -> None:
    """For commands that read one split."""
    split = "which images"
    parser.add_argument("--split", choices=("train", "val"), default="val", help=split)


def data_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Settings of a :class:`FeatureReader`; refuses a number that is too small."""
    check_counts(batch_size=arguments.batch_size, num_workers=arguments.num_workers)
    return {name: getattr(arguments, name) for name in DATA_SETTINGS}


def feature_reader(arguments: argparse.Namespace) -> "FeatureReader":
    """The network of a checkpoint, and the images of --data, as the options say.

    Raises:
        UserError: an option or the checkpoint cannot be used.
    """
    from metamask_solo.evaluation.features import FeatureReader

    settings = data_settings(arguments)
    return FeatureReader(arguments.checkpoint, arguments.features, arguments.masked, **settings)


def check_counts(**values: int) -> None:
    """Refuses an option below its least value: 0 for workers and seeds, 1 for all others."""
    for name, value in values.items():
        least = 0 if name in ("num_workers", "seed") else 1
        if value < least:
            raise UserError(f"--{name.replace('_', '-')}={value}: must be at least {least}")
