"""``metamask-solo run``: a script of the user's own solo-learn clone, with MetaMask registered."""

import argparse
import builtins
import importlib.machinery
import os
import runpy
import sys
import types
from pathlib import Path
from typing import Any

from wrapt import when_imported

from metamask_solo.commands.options import command_parser

MODULE = "metamask_solo.commands.run"
SCRIPT = "METAMASK_SOLO_SCRIPT"  # tells the processes that the script starts what to run


def main(argv: list[str]) -> int:
    """Runs SCRIPT as ``python SCRIPT ARGS`` would; METHODS has MetaMask once it imports solo.

    The ``solo`` beside the script comes first, as for a script that is run directly. A run of
    MetaMask ends with the command that folds it, and a script that would drop a mask ends with 2.

    Returns:
        0, or 1 after an exception; what the script gives to ``sys.exit`` is passed on.

    Raises:
        UserError: there is no such script.
    """
    parser = command_parser(
        "run",
        ", as `python SCRIPT ARGS` would.",
        epilog="Example, in the clone: metamask-solo run main_pretrain.py --config-path "
        "pkg://metamask_solo.scripts.pretrain.cifar --config-name metamask.yaml",
    )
    parser.add_argument("script", metavar="SCRIPT", help="such as main_pretrain.py")
    parser.add_argument("arguments", metavar="ARGS", nargs=argparse.REMAINDER, help="its own")
    options = parser.parse_args(argv)

    from metamask_solo.errors import UserError

    if not os.path.isfile(options.script):
        raise UserError(f"{options.script}: no such script")
    path = os.path.join(os.getcwd(), options.script)  # as Python sets __file__, not normalised
    module = types.ModuleType("__main__")
    # processes that the script starts in its own image (Lightning's DDP, multiprocessing) run
    # what __spec__ names, hence this module, which knows MetaMask
    module.__spec__ = importlib.machinery.ModuleSpec(MODULE, None, origin=path)
    module.__loader__ = importlib.machinery.SourceFileLoader("__main__", path)
    module.__file__ = path
    module.__dict__["__builtins__"] = builtins
    sys.argv = [options.script, *options.arguments]
    if not getattr(sys.flags, "safe_path", False):  # the script's folder first, as Python does it
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    sys.modules["__main__"] = module
    os.environ[SCRIPT] = path
    when_imported("metamask_solo.method.metamask")(_say_what_to_fold)
    source = Path(path).read_bytes()
    if b"pretrained_feature_extractor" in source:  # as main_linear.py, by whatever name
        _refuse_masks(options.script)
    try:
        exec(compile(source, path, "exec"), module.__dict__)
    except Exception as error:
        # without the frame of this function: what a script that is run directly shows
        trace = error.__traceback__ and error.__traceback__.tb_next
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        return 1
    return 0


def _say_what_to_fold(module: Any) -> None:
    """Lets a run of MetaMask that solo-learn's Checkpointer saves end with what comes next."""

    def on_fit_end(self: Any) -> None:
        from metamask_solo.training.endings import print_ending

        for callback in self.trainer.callbacks if self.trainer.is_global_zero else ():
            if getattr(callback, "last_ckpt", None):
                folder = Path(callback.path)
                print_ending(f"folder: {folder}", ["fold", folder, folder / "folded"])

    module.MetaMask.on_fit_end = on_fit_end


def _refuse_masks(script: str) -> None:
    """Ends a probe that reads a mask: it would train on the backbone without it."""
    import torch

    load = torch.load

    def load_without_mask(file: Any, *args: Any, **kwargs: Any) -> Any:
        content = load(file, *args, **kwargs)
        state = content if isinstance(content, dict) else {}
        folded = (state.get("metamask") or {}).get("folded", False)
        masks = [name for name in state.get("state_dict", ()) if name.endswith("mask.logits")]
        if masks and not folded:
            print(
                f"metamask-solo run: error: {file}: {script} would train without its mask; fold "
                f"first: metamask-solo fold {file} {Path(file).parent / 'folded'}",
                file=sys.stderr,
            )
            sys.exit(2)
        return content

    torch.load = load_without_mask  # type: ignore[assignment]


if __name__ == "__main__":  # a process that Lightning starts
    sys.exit(main([os.environ[SCRIPT], *sys.argv[1:]]))
elif __name__ == "__mp_main__":  # one that multiprocessing starts, which needs the script's names
    globals().update(runpy.run_path(os.environ[SCRIPT], run_name=__name__))
