"""``metamask-solo data``: writes the small data sets that need no download."""

import argparse

HELP = "write image folders made from data that Python packages carry"


def main(argv: list[str]) -> int:
    """Writes one or more data sets of :mod:`metamask_solo.data.digits`.

    Raises:
        UserError: a name is unknown (checked before anything is written), or a folder is damaged
            or cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="metamask-solo data",
        description=HELP[0].upper() + HELP[1:] + ".",
        epilog="A data set that is there already, whole and unchanged, is left alone.",
    )
    parser.add_argument(
        "names",
        nargs="+",
        metavar="NAME",
        help="digits, textured-digits, digits-search or textured-digits-search "
        "(-search: train and val both from the training images)",
    )
    parser.add_argument(
        "--out", default="datasets", metavar="FOLDER", help="where to put them (default: datasets)"
    )
    parser.add_argument("--force", action="store_true", help="write anew what is there already")
    arguments = parser.parse_args(argv)

    from metamask_solo.data.digits import check_name, write_dataset

    for name in arguments.names:
        check_name(name)
    for name in arguments.names:
        written = write_dataset(name, arguments.out, arguments.force)
        print(f"{arguments.out}/{name}: {'written' if written else 'already there'}")
    return 0
