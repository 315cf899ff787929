"""The command line: ``metamask-solo COMMAND …``, also ``python -m metamask_solo COMMAND …``."""

import importlib
import io
import os
import sys
import traceback

from metamask_solo.commands import COMMANDS

TRACEBACK, VERSION = "--traceback", "--version"
# the commands with Hydra's command line, which would show a config for --help
HYDRA = ("pretrain", "linear", "finetune")
HYDRA_HELP = "metamask_solo.commands.hydra_help"


def usage() -> str:
    """What ``metamask-solo --help`` prints: every command with a line."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: metamask-solo COMMAND [ARGUMENTS]",
            "",
            *lines,
            "",
            "metamask-solo COMMAND --help explains a command, metamask-solo --version says what is",
            "installed.",
            f"{TRACEBACK} anywhere shows where an error came from.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0; 2 for bad input; 1 for numerical trouble, or where the system refuses
        something else; 130 for Ctrl-C, 143 for SIGTERM, 138 for SIGUSR1, 141 for a closed pipe.
    """
    _print_anywhere()
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of `metamask-solo … | head` has seen enough
        # what is buffered still must not end in a message when Python exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + 13


def _run(arguments: list[str]) -> int:
    # what stands behind `run SCRIPT` is the script's
    ours = arguments[:1] if arguments[:1] == ["run"] else arguments
    show = TRACEBACK in ours
    if ours is arguments:
        arguments = [a for a in arguments if a != TRACEBACK]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if VERSION in arguments and name in (VERSION, *HYDRA):
        print(importlib.import_module(HYDRA_HELP).versions())
        return 0
    if name in HYDRA and {"-h", "--help"} & {*rest}:
        # at once: the command itself imports solo-learn, which takes seconds
        print(importlib.import_module(HYDRA_HELP).help_text(name))
        return 0
    if name not in COMMANDS:
        listed = ", ".join(COMMANDS)
        print(
            f"metamask-solo: error: unknown command {name}; allowed are {listed}", file=sys.stderr
        )
        return 2
    from metamask_solo.errors import RunStopped, UserError

    try:
        module = importlib.import_module(f"metamask_solo.commands.{name.replace('-', '_')}")
        return module.main(rest) or 0
    except BrokenPipeError:
        raise
    except (UserError, ImportError, RunStopped, OSError) as error:
        if show:
            traceback.print_exc()
        print(f"metamask-solo {name}: error: {_one_line(error)}", file=sys.stderr)
        if isinstance(error, RunStopped):
            return error.exit_code
        return 1 if isinstance(error, OSError) else 2
    except KeyboardInterrupt:
        print(f"metamask-solo {name}: interrupted", file=sys.stderr)
        return 130


def _print_anywhere() -> None:
    """Shows a letter that the terminal lacks as an escape, rather than ending in a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _one_line(error: BaseException) -> str:
    text = str(error).strip()
    if "Original Traceback" in text:  # from a worker of a loader: its last line is the reason
        text = text.splitlines()[-1].partition(": ")[2]
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main())
