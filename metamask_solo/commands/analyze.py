"""``metamask-solo analyze``: measures and draws what a mask did to the representation."""

from pathlib import Path
from typing import Any

from metamask_solo.commands.options import (
    add_data_options,
    command_parser,
    count,
    feature_reader,
)
from metamask_solo.paths import user_path


def main(argv: list[str]) -> int:
    """Writes figures, analysis.json and report.html for one or several checkpoints.

    Returns:
        0; 1 where the features of no checkpoint are finite.

    Raises:
        UserError: a setting, the data, a checkpoint or the output folder cannot be used; all of
            them are checked before any feature is computed.
    """
    parser = command_parser(
        "analyze",
        ". Checkpoints of any method, side by side; those without a mask are measured on plain "
        "features only.",
        "The subset experiment takes at most 5,000 training and 2,000 validation images of the "
        "sample.",
    )
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help=".ckpt file or folder of a run")
    add_data_options(parser, "holds train/ and val/ with class folders, or images alone")
    add("--out", type=user_path, default="analysis", metavar="FOLDER", help="what to write")
    add("--seed", type=count(0), default=0, metavar="N", help="of all random draws")
    add(
        "--samples", type=count(), default=10_000, metavar="N", help="images of each split, at most"
    )
    help_ = "random subsets of dimensions at each rate"
    add("--draws", type=count(), default=50, metavar="N", help=help_)
    arguments = parser.parse_args(argv)

    from metamask_solo.analysis import loading
    from metamask_solo.analysis.measure_checkpoint import measure_checkpoint
    from metamask_solo.analysis.report import check_output, write_analysis
    from metamask_solo.checkpoints.reading import read_checkpoint
    from metamask_solo.data.datasets import counted, say
    from metamask_solo.errors import UserError

    seed, samples, draws = arguments.seed, arguments.samples, arguments.draws
    read = [read_checkpoint(path) for path in arguments.checkpoints]
    readers = [
        feature_reader(arguments, checkpoint=one, masked=None if one.folded else False)
        for one in read
    ]
    data = arguments.data
    if data is None:
        loading.check_same_data(read)
    labelled = loading.has_labels(read[0], data)
    splits: list[dict[str, Any]] = [
        dict(zip(("train", "val"), reader.loaders(samples, seed), strict=True))
        if labelled
        else {"train": reader.loader("train", False, samples, seed)}
        for reader in readers
    ]
    images = {split: loader.dataset for split, loader in splits[0].items()}
    classes = len(images["train"].classes) if labelled else None
    if classes == 1:
        raise UserError("data: only 1 class; at least 2 are needed")
    if not labelled:
        say(
            "no train/ and val/ with class folders: only redundancy and mask are measured; for "
            "accuracies, split class folders by metamask-solo data split, and give datasets/custom"
        )
    photographs = None
    if labelled and images["train"].root:
        root = Path(images["train"].root).parent
        photographs = loading.read_background(root, images["train"].files)
    check_output(arguments.out)
    measured = []
    for reader, name, loaders in zip(readers, loading.titles(read), splits, strict=True):
        known, features = loading.read_features(reader, name, loaders)
        measured.append(measure_checkpoint(known, features, photographs, seed, draws))
    # the last one, that of val if there is one, knows what is said of both
    doubts = [note for loaders in splits for note in list(loaders.values())[-1].dataset.notes]
    about = {
        "data": str(data or read[0].config.data.train_path),  # type: ignore[union-attr]
        "images": {split.split: len(split) for split in images.values()},
        "classes": classes,
        "doubts": list(dict.fromkeys(doubts)),
        "photographs": photographs is not None,
        "seed": seed,
        "draws": draws,
    }
    write_analysis(arguments.out, about, measured)
    report, what = arguments.out / "report.html", counted(len(measured), "checkpoint")
    print(f"{report}: {what}{'' if labelled else ', without labels'}")
    return 0 if any(one.dims for one in measured) else 1
