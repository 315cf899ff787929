"""``metamask-solo analyze``: measures and draws what a mask did to the representation."""

import argparse
from pathlib import Path

HELP = "measure and draw what the mask did: redundancy, confounders, bounds"
LEAST_SAMPLES, MOST_SAMPLES = 1_000, 50_000


def main(argv: list[str]) -> int:
    """Writes figures, analysis.json and report.html for one or several checkpoints.

    Raises:
        UserError: a setting, the data, a checkpoint or the output folder cannot be used; all of
            them are checked before any feature is computed.
    """
    arguments = _parse(argv)

    from tqdm import tqdm

    from metamask_solo.analysis import loading, subsets
    from metamask_solo.analysis.output import check_output, write_output
    from metamask_solo.analysis.records import Data, Settings
    from metamask_solo.analysis.study import (
        reference_accuracies,
        steps_of,
        study,
        subset_images,
    )
    from metamask_solo.checkpoints.reading import load_backbone
    from metamask_solo.evaluation.features import pick_device

    _check(arguments)
    device = pick_device(arguments.device)
    out, data = Path(arguments.out), arguments.data
    check_output(out)
    labelled, classes = False, None
    if data is not None and loading.has_labels(data):
        labelled, classes = True, loading.check_data(data)
    read = [load_backbone(path, masked=False)[1] for path in arguments.checkpoints]
    paths, names = [checkpoint.path for checkpoint in read], loading.titles(read)
    if data is None:
        labelled = all(loading.has_own_labels(checkpoint) for checkpoint in read)
        loading.check_same_data(read)
    # one kind of positives for all, so that the brackets can be compared
    two_views = labelled and all(
        loading.two_view_data(one, loading.val_folder(one, data)) is not None for one in read
    )
    reading = loading.Reading(
        data,
        arguments.samples,
        arguments.seed,
        arguments.batch_size,
        arguments.num_workers,
        device,
    )
    studies, background, references = [], None, None
    for path, name in zip(paths, names, strict=True):
        if labelled:
            subject, files = loading.load_subject(path, name, reading, two_views)
            background = loading.read_background(data, files)
        else:
            subject = loading.load_unlabelled(path, name, reading)
        if labelled and references is None and arguments.references:
            everything = loading.load_references(path, reading)
            train_part, val_part = subset_images(subject, arguments.seed)
            part = {
                reference: (train.take(train_part), val.take(val_part))
                for reference, (train, val) in everything.items()
            }
            references = reference_accuracies(everything), reference_accuracies(part)
        with tqdm(
            total=steps_of(subject, arguments.draws), desc=f"{name} subsets", leave=False
        ) as bar:
            seed, draws = arguments.seed, arguments.draws
            studies.append(study(subject, background, seed, draws, bar.update, references))
    if labelled and data is None:
        classes = int(subject.train.labels.max()) + 1
    config = read[0].config
    images = Data(
        folder=str(data or (config.data.train_path if config is not None else "")),
        classes=classes,
        train_images=len(subject.train.labels),
        val_images=len(subject.val.labels) if subject.val is not None else 0,
        background=background is not None,
    )
    settings = Settings(
        seed=arguments.seed,
        samples=arguments.samples,
        draws=arguments.draws,
        knn_k=subsets.KNN_K,
        knn_temperature=subsets.KNN_TEMPERATURE,
        penalties=list(subsets.PENALTIES),
    )
    write_output(out, images, settings, studies)
    what = "checkpoints" if len(studies) > 1 else "checkpoint"
    print(f"{out / 'report.html'}: {len(studies)} {what}{'' if labelled else ', without labels'}")
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="metamask-solo analyze",
        description=HELP[0].upper() + HELP[1:] + ". Checkpoints of any method, side by side; "
        "those without a mask are measured on plain features only.",
        epilog="Memory: about 4 copies of the features at most, that is 16 bytes for each image "
        "and dimension (50,000 images with 512 dimensions: 0.4 GB, with 2,048: 1.6 GB), for one "
        "checkpoint at a time, and about 0.3 GB for blocks of distances. The subset "
        "experiment takes at most 5,000 training and 2,000 validation images of the sample.",
    )
    parser.add_argument(
        "checkpoints", nargs="+", metavar="CHECKPOINT", help=".ckpt file or folder of a run"
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="holds train/ and val/, with class folders, or images alone (default: the "
        "data of each run)",
    )
    parser.add_argument(
        "--out", default="analysis", metavar="FOLDER", help="what to write (default: analysis)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of all random draws (default: 0)"
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=10_000,
        metavar="N",
        help=f"images of each split, at most; {LEAST_SAMPLES} to {MOST_SAMPLES} (default: 10000)",
    )
    parser.add_argument(
        "--draws",
        type=int,
        default=50,
        metavar="N",
        help="random subsets of dimensions at each rate; 2 to 1000 (default: 50)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=256, metavar="N", help="images at a time (default: 256)"
    )
    parser.add_argument(
        "--num-workers",
        type=int,
        default=2,
        metavar="N",
        help="processes that read images (default: 2)",
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu or cuda, for the backbone (default: auto)"
    )
    parser.add_argument(
        "--no-references",
        dest="references",
        action="store_false",
        help="leave out the lines of an untrained backbone and of the pixels",
    )
    return parser.parse_args(argv)


def _check(arguments: argparse.Namespace) -> None:
    from metamask_solo.errors import UserError

    ranges = {
        "seed": (0, 2**32 - 1),
        "samples": (LEAST_SAMPLES, MOST_SAMPLES),
        "draws": (2, 1_000),
        "batch_size": (1, 65_536),
        "num_workers": (0, 256),
    }
    for name, (least, most) in ranges.items():
        value = getattr(arguments, name)
        if not least <= value <= most:
            option = name.replace("_", "-")
            raise UserError(f"--{option}={value}: must be from {least} to {most}")
    if arguments.device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device={arguments.device}: must be auto, cpu or cuda")
