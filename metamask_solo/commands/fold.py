"""``metamask-solo fold``: folds a checkpoint's mask into its backbone."""

from metamask_solo.commands.options import command_parser


def main(argv: list[str]) -> int:
    """Writes a folded checkpoint; see :func:`metamask_solo.checkpoints.exporting.fold_checkpoint`.

    Raises:
        UserError: the checkpoint cannot be folded, or OUT cannot be written.
    """
    parser = command_parser(
        "fold",
        epilog="OUT is a solo-learn checkpoint (.ckpt, or a folder) with its args.json beside it, "
        "in a folder of its own. With --timm, it is a folder for timm.create_model('local-dir:OUT',"
        " pretrained=True), or a state dict where OUT ends in .safetensors, .pt, .pth or .ckpt; of "
        "checkpoints without a mask, too.",
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help=".ckpt file or folder of a run")
    add("out", metavar="OUT", help="file, or folder; its ending decides the format, see below")
    help_ = "write timm's model, with the classifier of a probe or fine-tuned model"
    add("--timm", dest="form", action="store_const", const="timm", default="host", help=help_)
    add("--force", action="store_true", help="overwrite OUT")
    arguments = parser.parse_args(argv)

    from metamask_solo.checkpoints.exporting import fold_checkpoint
    from metamask_solo.training.endings import print_ending

    form = arguments.form
    folded = fold_checkpoint(arguments.checkpoint, arguments.out, form, arguments.force)
    made = f"{folded.path}: no mask to fold, written as it is"
    if folded.dims:
        made = f"{folded.path}: {folded.dims} dimensions folded"
        if folded.floored:
            made += f", {folded.floored} of them as 0 (weights below 2^-60)"
    print_ending(made, *([["knn", folded.path]] if form == "host" else []))
    if folded.code:
        print(f"{'open it' if folded.path.is_dir() else 'its model'}: {folded.code}")
    return 0
