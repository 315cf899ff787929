"""What the commands share: parsers, types of options, and the way to a checkpoint's features."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from metamask_solo.commands import COMMANDS
from metamask_solo.errors import UserError
from metamask_solo.paths import user_path

if TYPE_CHECKING:
    from metamask_solo.evaluation.features import FeatureReader

# options that are arguments of a FeatureReader, too
READER = ("checkpoint", "features", "masked", "data", "batch_size", "num_workers", "device")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are those of the commands: one line."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(f"{message}; see {self.prog} --help")


def command_parser(name: str, more: str = "", epilog: str | None = None) -> Parser:
    """A parser whose description is the command's line in ``metamask-solo --help``.

    Args:
        name: of the command.
        more: what follows on that line.
    """
    line = COMMANDS[name]
    return Parser(
        prog=f"metamask-solo {name}",
        description=line[0].upper() + line[1:] + more,
        epilog=epilog,
        formatter_class=Help,
    )


def count(least: int = 1) -> Callable[[str], int]:
    """The type of an option that is a whole number, at least ``least``."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {text}")
        return int(text)

    return number


def file(*endings: str) -> Callable[[str], Path]:
    """The type of an option that is a file with one of these endings."""

    def path(text: str) -> Path:
        if Path(text).suffix not in endings:
            raise argparse.ArgumentTypeError(f"{text} must end in {', '.join(endings)}")
        return user_path(text)

    return path


def add_data_options(parser: argparse.ArgumentParser, data: str) -> None:
    """How images are read, for :func:`feature_reader`.

    Args:
        data: what the folder of --data may hold.
    """
    add = parser.add_argument
    add("--data", type=user_path, metavar="FOLDER", help=f"{data} (default: the data of the run)")
    add("--batch-size", type=count(), default=256, metavar="N", help="images at a time")
    workers = "processes that read images"
    add("--num-workers", type=count(0), default=2, metavar="N", help=workers)
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of the network")


def add_feature_options(parser: argparse.ArgumentParser, data: str) -> None:
    """A checkpoint and its kind of features; ``data`` as in :func:`add_data_options`."""
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


def feature_reader(arguments: argparse.Namespace, **more: Any) -> "FeatureReader":
    """The network of a checkpoint, and the images of --data, as the options and ``more`` say.

    Raises:
        UserError: the checkpoint does not have such features, or there is no such device.
    """
    from metamask_solo.evaluation.features import FeatureReader

    options = {name: value for name, value in vars(arguments).items() if name in READER}
    return FeatureReader(**options | more)
