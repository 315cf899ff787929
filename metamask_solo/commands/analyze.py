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
    from metamask_solo.analysis.study import steps_of, study
    from metamask_solo.checkpoints.reading import load_backbone

    _check(arguments)
    out, data = Path(arguments.out), Path(arguments.data)
    check_output(out)
    classes = loading.check_data(data)
    paths, names, two_views = [], [], True
    for number, path in enumerate(arguments.checkpoints, start=1):
        _, checkpoint = load_backbone(path, masked=False)
        paths.append(checkpoint.path)
        names.append(f"{number}: {loading.title(checkpoint)}")
        # one kind of positives for all, so that the brackets can be compared
        two_views &= loading.two_view_data(checkpoint, data / "val") is not None
    reading = loading.Reading(
        data,
        arguments.samples,
        arguments.seed,
        arguments.batch_size,
        arguments.num_workers,
        arguments.device,
    )
    studies, background = [], None
    for path, name in zip(paths, names, strict=True):
        subject, files = loading.load_subject(path, name, reading, two_views)
        background = loading.read_background(data, files)
        with tqdm(
            total=steps_of(subject, arguments.draws), desc=f"{name} subsets", leave=False
        ) as bar:
            studies.append(study(subject, background, arguments.seed, arguments.draws, bar.update))
    head = {
        "data": {
            "folder": str(data),
            "classes": classes,
            "train_images": len(subject.train.labels),
            "val_images": len(subject.val.labels),
            "background": background is not None,
        },
        "settings": {
            "seed": arguments.seed,
            "samples": arguments.samples,
            "draws": arguments.draws,
            "knn_k": subsets.KNN_K,
            "knn_temperature": subsets.KNN_TEMPERATURE,
            "ridge": subsets.RIDGE,
        },
    }
    write_output(out, head, studies)
    print(f"{out / 'report.html'}: {len(studies)} checkpoints")
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
        "--data", required=True, metavar="FOLDER", help="holds train/ and val/, with class folders"
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
        "--device", default="cpu", help="cpu or cuda, for the backbone (default: cpu)"
    )
    return parser.parse_args(argv)


def _check(arguments: argparse.Namespace) -> None:
    import torch

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
    if arguments.device not in ("cpu", "cuda"):
        raise UserError(f"--device={arguments.device}: must be cpu or cuda")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device=cuda: this machine has no GPU that PyTorch can use")
