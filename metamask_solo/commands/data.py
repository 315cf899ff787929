"""``metamask-solo data``: writes the small data sets that need no download, or splits a folder."""

import argparse

HELP = "write small data sets made from Python packages, or split a folder of your own images"
SPLIT = "split"
MOST_NAMED = 5


def main(argv: list[str]) -> int:
    """Writes one or more data sets of :mod:`metamask_solo.data.digits`, or splits a folder.

    Raises:
        UserError: a name is unknown (checked before anything is written), or a folder is damaged
            or cannot be written.
    """
    if argv[:1] == [SPLIT]:
        return split(argv[1:])
    parser = argparse.ArgumentParser(
        prog="metamask-solo data",
        description=HELP[0].upper() + HELP[1:] + ".",
        epilog="A data set that is there already, whole and unchanged, is left alone. "
        "`metamask-solo data split --help` tells of splitting a folder.",
    )
    parser.add_argument(
        "names",
        nargs="+",
        metavar="NAME",
        help="digits, textured-digits, digits-search or textured-digits-search "
        "(-search: train and val both from the training images); or split FOLDER",
    )
    parser.add_argument(
        "--out", default="datasets", metavar="FOLDER", help="where to put them (default: datasets)"
    )
    parser.add_argument("--force", action="store_true", help="write anew what is there already")
    arguments = parser.parse_args(argv)

    from metamask_solo.data.digits import check_name, write_dataset
    from metamask_solo.training.endings import config_path, print_ending

    for name in arguments.names:
        check_name(name)
    for name in arguments.names:
        written = write_dataset(name, arguments.out, arguments.force)
        made = f"{arguments.out}/{name}: {'written' if written else 'already there'}"
        commands = []
        if arguments.out == "datasets" and name in ("digits", "textured-digits"):
            path = config_path(f"pretrain/{name}")
            commands = [["pretrain", "--config-path", path, "--config-name", "metamask.yaml"]]
        print_ending(made, *commands)
    return 0


def split(argv: list[str]) -> int:
    """``data split``: links the images of a folder into train/ and val/.

    Raises:
        UserError: see :func:`metamask_solo.data.splitting.split_folder`.
    """
    parser = argparse.ArgumentParser(
        prog="metamask-solo data split",
        description="Split a folder of images into train/ and val/: class by class where it holds "
        "class folders, else as one set without labels. Makes links: no image is copied or moved. "
        "The same call gives the same split on every machine.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="holds class folders, or images")
    parser.add_argument(
        "--val", type=float, default=0.1, metavar="SHARE", help="that goes to val (default: 0.1)"
    )
    parser.add_argument(
        "--out",
        default="datasets/custom",
        metavar="FOLDER",
        help="gets train/ and val/ (default: datasets/custom, which scripts/*/custom read)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="draws other images (default: 0)"
    )
    parser.add_argument(
        "--flat", action="store_true", help="no labels: all images below FOLDER are one set"
    )
    parser.add_argument("--force", action="store_true", help="replace a split of another folder")
    arguments = parser.parse_args(argv)

    from metamask_solo.data.reading import shown
    from metamask_solo.data.splitting import split_folder
    from metamask_solo.training.endings import config_path, override, print_ending

    made = split_folder(
        arguments.folder,
        arguments.out,
        arguments.val,
        arguments.seed,
        arguments.flat,
        arguments.force,
    )
    kind = f"{len(made.classes)} classes" if made.classes else "no classes (flat)"
    line = f"{made.out}: {made.train} training and {made.val} validation images, {kind}"
    if not made.written:
        line += "; already there"
    if made.empty:
        names = ", ".join(map(shown, made.empty[:MOST_NAMED]))
        more = ", …" if len(made.empty) > MOST_NAMED else ""
        folders = "1 folder" if len(made.empty) == 1 else f"{len(made.empty)} folders"
        line += f"; left out, without an image: {folders} ({names}{more})"
    if made.beside:
        line += f"; {made.beside} images beside the class folders were left out"
    place = ["--config-path", config_path("pretrain/custom"), "--config-name", "metamask.yaml"]
    elsewhere = arguments.out != "datasets/custom"
    overrides = [override("data.train_path", made.out / "train")] if elsewhere else []
    if made.classes:
        overrides += [override("data.val_path", made.out / "val")] if elsewhere else []
    else:
        overrides += ["data.no_labels=True", "data.val_path=null", "knn_eval.enabled=False"]
    print_ending(line, ["pretrain", *place, *overrides])
    return 0
