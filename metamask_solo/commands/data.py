"""``metamask-solo data``: writes the small data sets that need no download, or splits a folder."""

from pathlib import Path

from metamask_solo.commands.options import Help, Parser, command_parser
from metamask_solo.paths import user_path

CUSTOM = Path("datasets/custom")  # which scripts/*/custom read


def main(argv: list[str]) -> int:
    """Writes one or more data sets of :mod:`metamask_solo.data.digits`, or splits a folder.

    Raises:
        UserError: a name is unknown (checked before anything is written), or a folder is damaged
            or cannot be written.
    """
    if argv[:1] == ["split"]:
        return split(argv[1:])
    parser = command_parser(
        "data",
        epilog="A data set that is there already, whole and unchanged, is left alone. "
        "`metamask-solo data split --help` is about splitting a folder.",
    )
    add = parser.add_argument
    names = "digits, textured-digits, digits-search or textured-digits-search "
    names += "(-search: train and val both from the training images); or split FOLDER"
    add("names", nargs="+", metavar="NAME", help=names)
    add("--out", type=user_path, default=Path("datasets"), metavar="FOLDER", help="gets them")
    add("--force", action="store_true", help="write anew what is there already")
    arguments = parser.parse_args(argv)

    from metamask_solo.data.digits import check_name, write_dataset
    from metamask_solo.training.endings import config_path, print_ending

    for name in arguments.names:
        check_name(name)
    for name in arguments.names:
        written = write_dataset(name, arguments.out, arguments.force)
        made = f"{arguments.out / name}: {'written' if written else 'already there'}"
        commands = []
        if arguments.out == Path("datasets") and name in ("digits", "textured-digits"):
            path = config_path(f"pretrain/{name}")
            commands = [["pretrain", "--config-path", path, "--config-name", "metamask.yaml"]]
        print_ending(made, *commands)
    return 0


def split(argv: list[str]) -> int:
    """``data split``: links the images of a folder into train/ and val/.

    Raises:
        UserError: see :func:`metamask_solo.data.split.split_folder`.
    """
    parser = Parser(
        prog="metamask-solo data split",
        description="Split a folder of images into train/ and val/: class by class where it holds "
        "class folders, else as one set without labels. Makes links: no image is copied or moved. "
        "An image stays where it is when more come, and is in the same part on every machine.",
        formatter_class=Help,
    )
    add = parser.add_argument
    add("folder", type=user_path, metavar="FOLDER", help="holds class folders, or images")
    add("--val", type=float, default=0.1, metavar="SHARE", help="that goes to val")
    out = "gets train/ and val/; scripts/*/custom read the default"
    add("--out", type=user_path, default=CUSTOM, metavar="FOLDER", help=out)
    add("--seed", type=int, default=0, metavar="N", help="draws other images")
    add("--flat", action="store_true", help="no labels: all images below FOLDER are one set")
    add("--force", action="store_true", help="replace another split")
    arguments = parser.parse_args(argv)

    from metamask_solo.data.datasets import counted, say
    from metamask_solo.data.split import split_folder
    from metamask_solo.training.endings import config_path, override, print_ending

    options = arguments.val, arguments.seed, arguments.flat, arguments.force
    made = split_folder(arguments.folder, arguments.out, *options)
    say(*made.notes)
    classes = made.train.classes
    kind = counted(len(classes), "class") if classes else "no classes (flat)"
    line = f"{made.out}: {len(made.train)} training and {len(made.val)} validation images, {kind}"
    paths = {} if arguments.out == CUSTOM else {"train_path": "train", "val_path": "val"}
    overrides = [override(f"data.{key}", made.out / part) for key, part in paths.items()]
    if not classes:
        overrides = [*overrides[:1], "data.no_labels=True", "data.val_path=null"]
        overrides.append("knn_eval.enabled=False")
    config = ["--config-path", config_path("pretrain/custom"), "--config-name"]
    print_ending(
        line if made.written else f"{line}; already there",
        ["pretrain", *config, "metamask_heads.yaml", *overrides],
    )
    return 0
