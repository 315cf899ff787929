"""``metamask-solo knn``: what solo-learn's main_knn.py does, on both releases and on any device."""

import argparse
import json
import math
from typing import Any

from metamask_solo.commands.options import (
    add_feature_options,
    command_parser,
    count,
    feature_reader,
)
from metamask_solo.paths import user_path


def main(argv: list[str]) -> int:
    """Prints the accuracy for each combination of the settings, and writes it with ``--json``.

    Raises:
        UserError: a setting, the checkpoint or the data cannot be used.
    """
    parser = command_parser(
        "knn",
        ", through solo-learn's weighted kNN: one row for each combination of the settings. "
        "Temperature counts with the cosine distance only.",
        epilog="Choose a setting before you look at the validation images: the best of many rows "
        "is no fair result. top5 with k below 5 takes k guesses.",
    )
    add = parser.add_argument
    add_feature_options(parser, "holds train/ and val/, with class folders")
    add("--k", type=count(), nargs="+", default=[20], help="neighbours")
    add("--temperature", type=number, nargs="+", default=[0.07], metavar="T", help="of the votes")
    distances = ("cosine", "euclidean")
    add("--distance", choices=distances, nargs="+", default=["cosine"], help="of features")
    add("--linear", action="store_true", help="also the benchmark's linear probe, in a last row")
    add("--json", type=user_path, metavar="FILE", help="write the rows to FILE too")
    arguments = parser.parse_args(argv)

    from metamask_solo.atomic_files import atomic_write
    from metamask_solo.errors import UserError

    reader = feature_reader(arguments)
    loaders: Any = reader.loaders()
    train, val = (len(loader.dataset) for loader in loaders)
    if max(arguments.k) > train:
        raise UserError(f"--k={max(arguments.k)}: there are only {train} training images")
    result = {
        "checkpoint": str(reader.checkpoint.path),
        "method": reader.checkpoint.method,
        "features": arguments.features,
        "masked": reader.masked,
        "train_images": train,
        "val_images": val,
        "rows": _rows(arguments, reader, loaders),
    }
    print(f"{reader.checkpoint.path}: {reader.kind}, {train} training and {val} validation images")
    print(_table(result["rows"]))
    if arguments.json is not None:
        with atomic_write(arguments.json) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def number(text: str) -> float:
    """The type of an option that is a number above 0."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text}")
    return float(text)


def _rows(arguments: argparse.Namespace, reader: Any, loaders: Any) -> list[dict[str, Any]]:
    """The accuracies in percent of each combination of the settings."""
    from metamask_solo.data.datasets import say
    from metamask_solo.evaluation.features import imbalance_note, mean_over_classes, percent
    from metamask_solo.evaluation.knn import knn_hits
    from metamask_solo.evaluation.linear import linear_probe

    tensors = [tensor for loader in loaders for tensor in reader.extract(loader)]
    _, train_labels, _, val_labels = tensors
    on_device = [tensor.to(reader.device) for tensor in tensors]
    rows = []

    def add(correct: Any, top5: float | None, **settings: Any) -> None:
        top1, mean = percent(correct), mean_over_classes(correct, val_labels)
        rows.append({**settings, "top1": top1, "top5": top5, "mean_over_classes": mean})
        if (note := imbalance_note(top1, train_labels, val_labels)) is not None:
            say(f"{note}: see mean_over_classes")

    for distance in arguments.distance:
        for temperature in arguments.temperature if distance == "cosine" else [None]:
            for k in arguments.k:
                settings = {"k": k, "distance": distance, "temperature": temperature}
                top1, top5 = knn_hits(*on_device, **settings)
                add(top1.cpu(), percent(top5), **settings)
    if arguments.linear:
        correct, c = linear_probe(*tensors)
        add(correct, None, distance="linear", C=c)
    return rows


def _table(rows: list[dict[str, Any]]) -> str:
    """The rows for the screen; the mean over classes where classes are of unequal size."""
    import pandas as pd

    names = ["distance", "temperature", "k", "C", "top1", "top5", "mean_over_classes"]
    table = pd.DataFrame(rows).astype({"temperature": float})
    if (table.top1 - table.mean_over_classes).abs().max() < 1e-9:
        names.remove("mean_over_classes")
    return table.to_string(
        columns=[name for name in names if name in table],
        index=False,
        na_rep="-",
        float_format="{:.2f}".format,
        formatters=dict.fromkeys(("temperature", "k", "C"), "{:g}".format),
    )
