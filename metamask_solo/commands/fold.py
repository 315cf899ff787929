"""``metamask-solo fold``: folds a checkpoint's mask into its backbone."""

import argparse

HELP = "fold the mask into the backbone's weights, for tools that know nothing of masks"


def main(argv: list[str]) -> int:
    """Writes a folded checkpoint; see :func:`metamask_solo.checkpoints.folding.fold_checkpoint`.

    Raises:
        UserError: the checkpoint cannot be folded, or OUT cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="metamask-solo fold",
        description=HELP[0].upper() + HELP[1:] + ".",
        epilog="Without --timm or --torchvision, OUT is a solo-learn checkpoint with its args.json "
        "beside it, in a folder of its own.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=".ckpt file or folder of a run")
    parser.add_argument(
        "out", metavar="OUT", help="folder or .ckpt file; with --timm or --torchvision, a file"
    )
    form = parser.add_mutually_exclusive_group()
    for library in ("timm", "torchvision"):
        form.add_argument(
            f"--{library}",
            dest="form",
            action="store_const",
            const=library,
            default="host",
            help=f"write the state dict of {library}'s model, without classifier",
        )
    parser.add_argument("--force", action="store_true", help="overwrite OUT")
    arguments = parser.parse_args(argv)

    from metamask_solo.checkpoints.folding import fold_checkpoint

    folded = fold_checkpoint(arguments.checkpoint, arguments.out, arguments.form, arguments.force)
    print(f"{folded.path}: {folded.dims} dimensions folded, {folded.floored} of them floored to 0")
    return 0
