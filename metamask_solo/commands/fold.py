"""``metamask-solo fold``: folds a checkpoint's mask into its backbone."""

import argparse
import json

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
        "beside it, in a folder of its own. With --timm, OUT is a folder for "
        "timm.create_model('local-dir:OUT', pretrained=True), or where it ends in .pth or another "
        "ending, a state dict; with --torchvision, a state dict.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=".ckpt file or folder of a run")
    parser.add_argument("out", metavar="OUT", help="folder or .ckpt file; of other forms see below")
    form = parser.add_mutually_exclusive_group()
    for library in ("timm", "torchvision"):
        form.add_argument(
            f"--{library}",
            dest="form",
            action="store_const",
            const=library,
            default="host",
            help=f"write {library}'s model, without classifier",
        )
    parser.add_argument("--force", action="store_true", help="overwrite OUT")
    arguments = parser.parse_args(argv)

    from metamask_solo.checkpoints.exporting import CONFIG
    from metamask_solo.checkpoints.folding import fold_checkpoint
    from metamask_solo.training.endings import print_ending

    folded = fold_checkpoint(arguments.checkpoint, arguments.out, arguments.form, arguments.force)
    made = f"{folded.path}: {folded.dims} dimensions folded, {folded.floored} of them floored to 0"
    print_ending(made, *([["knn", folded.path]] if arguments.form == "host" else []))
    if arguments.form == "timm" and folded.path.is_dir():
        architecture = json.loads((folded.path / CONFIG).read_text())["architecture"]
        knows = (
            "import metamask_solo.checkpoints.timm_stems; " if architecture.endswith("_3x3") else ""
        )
        print(f'open it: {knows}timm.create_model("local-dir:{folded.path}", pretrained=True)')
    return 0
