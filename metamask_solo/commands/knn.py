"""``metamask-solo knn``: what solo-learn's main_knn.py does, on both releases and on any device."""

import argparse
import json
from typing import Any

from metamask_solo.commands.options import add_feature_options, command_parser, feature_reader
from metamask_solo.paths import user_path

TITLES = {"features": 10, "distance": 11, "temperature": 12, "k": 6, "top-1": 8, "top-5": 8}
CLASSES_TITLE = {"class mean": 12}  # of the top-1 accuracies
LEFT = ("features", "distance")


def main(argv: list[str]) -> int:
    """Prints the accuracy for each combination of the settings, and writes it with ``--json``.

    Raises:
        UserError: a setting, the checkpoint or the data cannot be used.
    """
    arguments = _parse(argv)

    from metamask_solo.errors import UserError
    from metamask_solo.evaluation.knn import check_settings

    grid = [
        (distance, temperature, k)
        for distance in arguments.distance
        for temperature in (arguments.temperature if distance == "cosine" else [None])
        for k in arguments.k
    ]
    for distance, temperature, k in grid:
        check_settings(k, distance, temperature)
    readers = {}
    for name in arguments.features:
        readers[name] = feature_reader(arguments, name)
        arguments.checkpoint = readers[name].checkpoint.path  # of a folder, the same file for all
    loaders = readers[name].loaders()
    images = [len(loader.dataset) for loader in loaders]  # type: ignore[arg-type]
    if max(arguments.k) > images[0]:
        raise UserError(f"--k={max(arguments.k)}: there are only {images[0]} training images")
    rows = []
    for reader in readers.values():
        rows += _rows(reader, loaders, grid, arguments.linear)
    checkpoint = readers[name].checkpoint
    result = {
        "checkpoint": str(checkpoint.path),
        "method": checkpoint.method,
        "masked": readers[name].masked,
        "train_images": images[0],
        "val_images": images[1],
        "rows": rows,
    }
    _print(result)
    if arguments.json is not None:
        from metamask_solo.atomic_files import atomic_write

        with atomic_write(arguments.json) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _rows(reader: Any, loaders: Any, grid: list[Any], linear: bool) -> list[dict[str, Any]]:
    """The accuracies of one kind of features."""
    from metamask_solo.data.datasets import say
    from metamask_solo.evaluation.features import imbalance_note, mean_over_classes, percent
    from metamask_solo.evaluation.knn import knn_hits
    from metamask_solo.evaluation.linear import linear_probe

    train, val = (reader.extract(loader) for loader in loaders)
    tensors = train.features, train.labels, val.features, val.labels
    on_device = [tensor.to(reader.device) for tensor in tensors]
    hits: list[tuple[dict[str, Any], Any, Any]] = []
    for distance, temperature, k in grid:
        settings: Any = {"k": k, "distance": distance, "temperature": temperature}
        top1, top5 = knn_hits(*on_device, **settings)
        hits.append((settings, top1.cpu(), percent(top5)))
    if linear:
        probe = linear_probe(*tensors)
        hits.append(({"distance": "linear", "c": probe.c}, probe.correct, None))
    rows = []
    for settings, correct, top5_accuracy in hits:
        accuracy, mean = percent(correct), mean_over_classes(correct, val.labels)
        row = {"features": reader.part, **settings, "top1": accuracy, "top5": top5_accuracy}
        rows.append({**row, "mean_over_classes": mean})
        if (note := imbalance_note(accuracy, train.labels, val.labels)) is not None:
            say(note)
    return rows


def _print(result: dict[str, Any]) -> None:
    print(
        f"{result['checkpoint']}: {'masked' if result['masked'] else 'plain'} features, "
        f"{result['train_images']} training and {result['val_images']} validation images"
    )
    rows = result["rows"]
    # of classes of one size both are the same, but for rounding
    unequal = any(abs(row["top1"] - row["mean_over_classes"]) > 1e-9 for row in rows)
    titles = TITLES | (CLASSES_TITLE if unequal else {})
    print("".join(f"{title:{'<' if title in LEFT else '>'}{titles[title]}}" for title in titles))
    for row in rows:
        temperature = "-" if row.get("temperature") is None else f"{row['temperature']:g}"
        line = f"{row['features']:<10}{row['distance']:<11}{temperature:>12}{row.get('k', '-'):>6}"
        top5 = "-" if row["top5"] is None else f"{row['top5']:.2f}"
        line += f"{row['top1']:>8.2f}{top5:>8}"
        print(line + (f"{row['mean_over_classes']:>12.2f}" if unequal else ""))


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = command_parser(
        "knn",
        ", through solo-learn's weighted kNN: one row for each combination of the settings. "
        "Temperature counts with the cosine distance only.",
        epilog="Choose a setting before you look at the validation images: the best of many rows "
        "is no fair result. top-5 with k below 5 takes k guesses.",
    )
    add = parser.add_argument
    add_feature_options(parser, "holds train/ and val/, with class folders", False, True)
    add("--k", type=int, nargs="+", default=[20], help="neighbours")
    add("--temperature", type=float, nargs="+", default=[0.07], metavar="T", help="of the votes")
    distances = ("cosine", "euclidean")
    add("--distance", choices=distances, nargs="+", default=["cosine"], help="of features")
    add("--linear", action="store_true", help="also the benchmark's linear probe, in a last row")
    add("--json", type=user_path, metavar="FILE", help="write the rows to FILE too")
    return parser.parse_args(argv)
