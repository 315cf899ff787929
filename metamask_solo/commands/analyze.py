"""``metamask-solo analyze``: measures and draws what a mask did to the representation."""

import argparse
from pathlib import Path
from typing import Any

from metamask_solo.commands.options import check_counts, command_parser
from metamask_solo.paths import user_path

RANGES = {"samples": (1_000, 50_000), "draws": (2, 1_000)}


def main(argv: list[str]) -> int:
    """Writes figures, analysis.json and report.html for one or several checkpoints.

    Raises:
        UserError: a setting, the data, a checkpoint or the output folder cannot be used; all of
            them are checked before any feature is computed.
    """
    arguments = _parse(argv)

    from tqdm import tqdm

    from metamask_solo.analysis import loading
    from metamask_solo.analysis.measure_checkpoint import accuracies, measure_checkpoint
    from metamask_solo.analysis.report import Analysis, check_output, write_analysis
    from metamask_solo.checkpoints.reading import read_checkpoint
    from metamask_solo.data.datasets import say
    from metamask_solo.errors import UserError
    from metamask_solo.evaluation.features import FeatureReader

    counts = ("seed", "batch_size", "num_workers")
    check_counts(**{name: getattr(arguments, name) for name in counts})
    for name, (least, most) in RANGES.items():
        if not least <= (value := getattr(arguments, name)) <= most:
            raise UserError(f"--{name}={value}: must be from {least} to {most}")
    check_output(arguments.out)
    data, seed, sample = arguments.data, arguments.seed, (arguments.samples, arguments.seed)
    readers = [
        FeatureReader(
            path,
            masked=None if read_checkpoint(path).folded else False,
            data=data,
            batch_size=arguments.batch_size,
            num_workers=arguments.num_workers,
            device=arguments.device,
        )
        for path in arguments.checkpoints
    ]
    read = [reader.checkpoint for reader in readers]
    if data is None:
        loading.check_same_data(read)
    labelled = loading.has_labels(read[0], data)
    splits: list[dict[str, Any]] = [
        dict(zip(("train", "val"), reader.loaders(*sample), strict=True))
        if labelled
        else {"train": reader.loader("train", False, *sample)}
        for reader in readers
    ]
    first = splits[0]
    config = read[0].config
    classes = len(first["train"].dataset.classes) if labelled else None
    if classes == 1:
        raise UserError("data: only 1 class; at least 2 are needed")
    if not labelled:
        say("no train/ and val/ with class folders: only redundancy and mask are measured")
    # one kind of positives for all, so that the bounds can be compared
    two_views = all(loading.view_transform(checkpoint.config) is not None for checkpoint in read)
    background = loading.read_background(data, first["train"].dataset.files) if labelled else None
    untrained = {}
    if labelled and arguments.untrained:
        untrained = loading.untrained_features(readers[0], splits[0], seed)
    measured = []
    for reader, name, loaders in zip(readers, loading.titles(read), splits, strict=True):
        subject = loading.read_features(reader, name, loaders, seed, two_views)
        with tqdm(total=arguments.draws + 2, desc=f"{name} subsets", leave=False) as bar:
            measured.append(
                measure_checkpoint(
                    subject, background, seed, arguments.draws, bar.update, untrained
                )
            )
    # the last one, that of val if there is one, knows what is said of both
    doubts = [note for loaders in splits for note in list(loaders.values())[-1].dataset.notes]
    analysis = Analysis(
        data=str(data or (config.data.train_path if config is not None else "")),
        images={loader.dataset.split: len(loader.dataset) for loader in first.values()},
        classes=classes,
        doubts=list(dict.fromkeys(doubts)),
        background=background is not None,
        seed=seed,
        samples=arguments.samples,
        draws=arguments.draws,
        untrained={
            name: {probe: float(hits.mean()) for probe, hits in accuracies(*features).items()}
            for name, features in untrained.items()
        },
        checkpoints=measured,
    )
    write_analysis(arguments.out, analysis)
    what = "checkpoints" if len(measured) > 1 else "checkpoint"
    report = arguments.out / "report.html"
    print(f"{report}: {len(measured)} {what}{'' if labelled else ', without labels'}")
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = command_parser(
        "analyze",
        ". Checkpoints of any method, side by side; those without a mask are measured on plain "
        "features only.",
        "The subset experiment takes at most 5,000 training and 2,000 validation images of the "
        "sample.",
    )
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help=".ckpt file or folder of a run")
    help_ = "holds train/ and val/ with class folders, or images alone (default: the runs' data)"
    add("--data", type=user_path, metavar="FOLDER", help=help_)
    add("--out", type=user_path, default=Path("analysis"), metavar="FOLDER", help="what to write")
    add("--seed", type=int, default=0, metavar="N", help="of all random draws")
    help_ = "images of each split, at most; {} to {}".format(*RANGES["samples"])
    add("--samples", type=int, default=10_000, metavar="N", help=help_)
    help_ = "random subsets of dimensions at each rate; {} to {}".format(*RANGES["draws"])
    add("--draws", type=int, default=50, metavar="N", help=help_)
    add("--batch-size", type=int, default=256, metavar="N", help="images at a time")
    add("--num-workers", type=int, default=2, metavar="N", help="processes that read images")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="for the backbone")
    help_ = "leave out the untrained backbone and the pixels"
    add("--no-untrained", dest="untrained", action="store_false", help=help_)
    return parser.parse_args(argv)
