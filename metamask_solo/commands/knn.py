"""``metamask-solo knn``: what solo-learn's main_knn.py does, on both releases and on any device."""

import argparse
import json
from pathlib import Path
from typing import Any

from metamask_solo.commands.options import add_loading_options, add_mask_options, check_counts

HELP = "nearest-neighbour accuracy of a checkpoint's features"


def main(argv: list[str]) -> int:
    """Prints the accuracy for each combination of the settings, and writes it with ``--json``.

    Raises:
        UserError: a setting, the checkpoint or the data cannot be used.
    """
    arguments = _parse(argv)

    from metamask_solo.evaluation.features import (
        extract_features,
        feature_extractor,
        pick_device,
    )
    from metamask_solo.evaluation.knn import check_settings, knn_accuracy

    check_counts(batch_size=arguments.batch_size, num_workers=arguments.num_workers)
    grid = [
        (k, distance, temperature)
        for distance in arguments.distance
        for temperature in (arguments.temperature if distance == "cosine" else [None])
        for k in arguments.k
    ]
    for setting in grid:
        check_settings(*setting)
    device = pick_device(arguments.device)
    path, modules = arguments.checkpoint, {}
    for name in arguments.features:
        modules[name], checkpoint = feature_extractor(path, name, arguments.masked)
        path = checkpoint.path  # of a folder, the same file for all
    loaders = _loaders(arguments, checkpoint.config)

    rows = []
    for name, module in modules.items():
        tensors: list[Any] = []
        for split, loader in loaders.items():
            tensors += extract_features(module, loader, device, f"{name} {split}")
        train, train_labels, val, val_labels = (tensor.to(device) for tensor in tensors)
        for k, distance, temperature in grid:
            top1, top5 = knn_accuracy(
                train, train_labels, val, val_labels, k, distance, temperature or 0.0
            )
            settings = {"features": name, "distance": distance, "temperature": temperature, "k": k}
            rows.append({**settings, "top1": top1, "top5": top5})
    result = {
        "checkpoint": str(checkpoint.path),
        "method": checkpoint.method,
        "masked": checkpoint.mask is not None and arguments.masked is not False,
        **{f"{split}_images": len(loader.dataset) for split, loader in loaders.items()},
        "rows": rows,
    }
    _report(result, arguments.json)
    return 0


def _loaders(arguments: argparse.Namespace, config: Any) -> dict[str, Any]:
    """Training and validation images, of the same classes and enough of them."""
    from metamask_solo.data.datasets import say_doubts
    from metamask_solo.data.images import split_loader
    from metamask_solo.data.reading import shown
    from metamask_solo.errors import UserError
    from metamask_solo.training.resume import say_other_images

    loaders: dict[str, Any] = {
        split: split_loader(
            split, config, arguments.data, arguments.batch_size, arguments.num_workers
        )
        for split in ("train", "val")
    }
    datasets = [loader.dataset for loader in loaders.values()]
    say_doubts(*datasets)
    if arguments.data is None:
        say_other_images(config)
    odd = set(datasets[0].classes) ^ set(datasets[1].classes)
    if odd:
        raise UserError(
            f"data: train and val must have the same classes; {shown(min(odd))} is in one only"
        )
    images = len(loaders["train"].dataset)
    if max(arguments.k) > images:
        raise UserError(f"--k={max(arguments.k)}: there are only {images} training images")
    return loaders


def _report(result: dict[str, Any], file: Path | None) -> None:
    kind = "masked" if result["masked"] else "plain"
    print(
        f"{result['checkpoint']}: {kind} features, {result['train_images']} training and ", end=""
    )
    print(f"{result['val_images']} validation images")
    print(f"{'features':<10}{'distance':<11}{'temperature':>11}{'k':>6}{'top-1':>8}{'top-5':>8}")
    for row in result["rows"]:
        temperature = "-" if row["temperature"] is None else f"{row['temperature']:g}"
        print(f"{row['features']:<10}{row['distance']:<11}{temperature:>11}{row['k']:>6}", end="")
        print(f"{row['top1']:>8.2f}{row['top5']:>8.2f}")
    if file is not None:
        from metamask_solo.atomic_files import atomic_write

        with atomic_write(file) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="metamask-solo knn",
        description=HELP[0].upper() + HELP[1:] + ", through solo-learn's weighted kNN: one row for "
        "each combination of the settings. Temperature counts with the cosine distance only.",
        epilog="Choose a setting before you look at the validation images: the best of many rows "
        "is no fair result. top-5 with k below 5 takes k guesses.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=".ckpt file or folder of a run")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="holds train/ and val/, with class folders (default: the data of the run)",
    )
    parser.add_argument("--k", type=int, nargs="+", default=[20], help="neighbours (default: 20)")
    parser.add_argument(
        "--temperature", type=float, nargs="+", default=[0.07], metavar="T", help="(default: 0.07)"
    )
    distances = ("cosine", "euclidean")
    parser.add_argument(
        "--distance", choices=distances, nargs="+", default=["cosine"], help="(default: cosine)"
    )
    parser.add_argument(
        "--features",
        choices=("backbone", "projector"),
        nargs="+",
        default=["backbone"],
        help="(default: backbone)",
    )
    add_mask_options(parser)
    add_loading_options(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE too")
    return parser.parse_args(argv)
