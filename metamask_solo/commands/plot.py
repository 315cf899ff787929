"""``metamask-solo plot``: draws what runs logged while training."""

from metamask_solo.commands.options import command_parser, file
from metamask_solo.paths import user_path


def main(argv: list[str]) -> int:
    """Draws the curves of one or several runs side by side.

    Raises:
        UserError: a run logged nothing, or the file cannot be written.
    """
    parser = command_parser(
        "plot",
        ". The online kNN is measured while training, on augmented training images; "
        "`metamask-solo knn` measures it afterwards.",
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", type=user_path, help="folder of a run, or its .ckpt file")
    add("--out", type=file(".png"), default="plot.png", metavar="FILE", help="a .png file")
    arguments = parser.parse_args(argv)

    from metamask_solo.analysis.curves import draw_runs
    from metamask_solo.atomic_files import atomic_write
    from metamask_solo.data.datasets import counted

    content = draw_runs(arguments.runs)
    with atomic_write(arguments.out) as path:
        path.write_bytes(content)
    print(f"{arguments.out}: {counted(len(arguments.runs), 'run')}")
    return 0
