"""What an analysis reads: features and masks of checkpoints, and what lies behind the objects."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig
from torch.utils.data import DataLoader

from metamask_solo.analysis.measure_checkpoint import Measures
from metamask_solo.analysis.measures import Array, IntArray
from metamask_solo.analysis.subsets import Labelled
from metamask_solo.checkpoints.reading import Checkpoint
from metamask_solo.data.datasets import holds_classes, say
from metamask_solo.errors import UserError
from metamask_solo.evaluation.features import FeatureReader, NotFinite
from metamask_solo.training.resume import run_identity

METADATA = "metadata.csv"
MOST_DIFFERENCES = 3  # settings in the label of a run
LONGEST_NAME = 40  # letters in the label of a run
# in args.json they are those of a step
RATES = {f"optimizer.{name}": f"scaled {name}" for name in ("lr", "classifier_lr")}
SAME_DATA = ("dataset", "train_path", "val_path", "no_labels")
Loaders = dict[str, DataLoader[Any]]  # by split


def titles(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """A label for each checkpoint, short enough for a figure."""
    runs = []
    for checkpoint in checkpoints:
        name = checkpoint.config.get("name") if checkpoint.config else None
        name = str(name or checkpoint.method or checkpoint.path.stem)
        name = f"{name} (folded)" if checkpoint.folded else name
        runs.append((name, checkpoint.config, checkpoint.path.parent))
    return run_labels(runs)


def run_labels(runs: Sequence[tuple[str, DictConfig | None, Path]]) -> list[str]:
    """A number and a name for each run, short enough for a figure.

    Runs of one name are told apart by the settings that differ among them, or by their folders.

    Args:
        runs: name, config and folder of each.
    """
    table = pd.DataFrame({"name": [name for name, *_ in runs]})
    known = [run_identity(c) if c is not None else {} for _, c, _ in runs]
    settings = pd.DataFrame(known, dtype=object)  # beside a run without it, a seed is no float
    settings = settings.where(settings.notna(), "none").astype(str)
    labels = [f"{number}: {name[:LONGEST_NAME]}" for number, name in enumerate(table.name, 1)]
    for _, group in table.groupby("name"):
        alike = settings.loc[group.index]
        alike = alike[sorted(alike.columns[alike.nunique() > 1])]
        short = [key.rpartition(".")[2] for key in alike.columns]
        longer = [".".join(key.split(".")[-2:]) for key in alike.columns]
        names = [s if short.count(s) == 1 else long for s, long in zip(short, longer, strict=True)]
        names = [RATES.get(key, name) for key, name in zip(alike, names, strict=True)]
        for row in group.index if len(group) > 1 else ():
            parts = [
                f"{name}={text[:20]}" for name, text in zip(names, alike.loc[row], strict=True)
            ]
            if len(parts) > MOST_DIFFERENCES:
                parts[MOST_DIFFERENCES:] = ["…"]
            if not parts or alike.duplicated(keep=False)[row]:
                parts.append(runs[row][2].resolve().name.removeprefix("offline-"))
            labels[row] += f" ({', '.join(parts)[:60]})"
    return labels


def check_same_data(checkpoints: Sequence[Checkpoint]) -> None:
    """Raises UserError unless the runs' own data are the same: the report compares accuracies."""
    runs = [checkpoint.config.data for checkpoint in checkpoints if checkpoint.config]
    for key in SAME_DATA:
        values = [run.get(key) or None for run in runs]  # False is the default
        if key.endswith("_path"):
            values = [path and str(Path(path).resolve()) for path in values]
        if len(set(values)) > 1:
            different = " and ".join(map(str, dict.fromkeys(values)))
            raise UserError(
                f"runs of different data: data.{key} is {different}; "
                "analyse them one by one, or give --data FOLDER with images for all"
            )


def has_labels(checkpoint: Checkpoint, data: Path | None) -> bool:
    """Whether there are labelled images of both splits, in a folder or in the run's own data."""
    if data is not None:
        both = all((data / split).is_dir() for split in ("train", "val"))
        return both and holds_classes(data / "train", "--data")
    run: Any = checkpoint.config.data if checkpoint.config is not None else {}
    return run.get("val_path") is not None and not run.get("no_labels", False)


def read_features(
    reader: FeatureReader, name: str, loaders: Loaders
) -> tuple[Measures, dict[str, Labelled]]:
    """What is known of a checkpoint, and its plain features; none where some are not finite.

    Raises:
        UserError: the images cannot be read.
    """
    path, method = str(reader.checkpoint.path), reader.checkpoint.method
    mask, history, notes = mask_and_history(reader.checkpoint)
    splits: dict[str, Labelled] = {}
    try:
        for split, loader in loaders.items():
            features, labels = reader.extract(loader)
            splits[split] = Labelled(features.numpy(), labels.numpy())
    except NotFinite as error:
        say(str(error))
        splits = {}
        notes.append(str(error).removeprefix(f"{path}: "))
    return Measures(name, path, method, tuple(notes), mask=mask, history=history), splits


def mask_and_history(
    checkpoint: Checkpoint,
) -> tuple[Array | None, pd.DataFrame | None, list[str]]:
    """The learned mask, a row of weights for each optimiser step that was noted, and notes.

    There is neither where the mask was folded into the backbone, or is not finite.
    """
    if checkpoint.mask is None:
        return None, None, []
    mask = checkpoint.mask.double()
    if not mask.isfinite().all():
        return None, None, ["its mask is not finite: the run diverged"]
    noted = checkpoint.raw.get("metamask", {}).get("history")
    if noted is None:
        return mask.numpy(), None, []
    history = pd.DataFrame(noted["mask"].double().numpy(), index=noted["step"].numpy())
    return mask.numpy(), history, []


def read_background(root: Path, files: Sequence[str]) -> IntArray | None:
    """Reads from ``root``/metadata.csv which photograph lies behind the object of each image.

    Args:
        files: images in ``root``.

    Returns:
        Codes of the photographs, shape (N,), 0 to P − 1; None where there is no such file, or it
        has no columns ``file`` and ``photograph`` (another tool's), or names one photograph only.

    Raises:
        UserError: an image is missing from it.
    """
    if not (root / METADATA).is_file():
        return None
    try:
        table = pd.read_csv(root / METADATA)
    except ValueError:  # no table, or an empty one
        return None
    if not {"file", "photograph"} <= set(table.columns):
        return None
    names = [Path(file).relative_to(root).as_posix() for file in files]
    photographs = table.drop_duplicates("file").set_index("file").photograph.reindex(names)
    if photographs.isna().any():
        missing = photographs.index[photographs.isna()][0]
        raise UserError(f"{root / METADATA}: has no row for {missing} with a photograph")
    codes, kinds = pd.factorize(photographs, sort=True)
    return codes if len(kinds) > 1 else None
