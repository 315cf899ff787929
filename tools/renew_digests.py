"""Renews the digests of the rows in docs/results: ``python tools/renew_digests.py``.

For when what decides a run is written in another form but is the same, so that a benchmark still
knows its finished runs; a test keeps the rows equal to it. Where settings or methods change, the
runs must be made anew.
"""

import itertools
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import pandas as pd

from metamask_solo.benchmark.plan import read_plan
from metamask_solo.benchmark.results import DIGESTS, csv_text, read_csv

ROOT = Path(__file__).resolve().parents[1]
# each file of rows, and the arguments of the benchmark that made it
ROWS = {
    "cifar10": ["cifar10_small"],
    "cifar10_search": ["cifar10_search"],
    "digits": ["digits"],
    "digits_search": ["digits_search"],
    "textured-digits": ["textured-digits"],
    "textured-digits_search": ["digits_search", "name=textured-digits", "epochs=4"],
}


def renewed(rows: pd.DataFrame, config: str, *overrides: str) -> pd.DataFrame:
    """The rows with the digests that the runs of a benchmark have on the images of the rows."""
    with tempfile.TemporaryDirectory() as folder:
        # the images are not needed, only folders of their form
        for split, label in itertools.product(("train", "val"), range(10)):
            image = Path(folder, split, str(label), f"{split}.png")
            image.parent.mkdir(parents=True)
            image.write_text(f"{split} {label}")
        paths = [f"data.{split}_path={folder}/{split}" for split in ("train", "val")]
        runs = {
            (r.method, r.setting, r.seed): r for r in read_plan(config, [*overrides, *paths]).runs
        }
    rows = rows.copy()
    for line in rows.itertuples():
        run = replace(runs[line.method, line.setting, line.seed], data_digest=line.data_digest)
        folder = run.folder.relative_to(run.out).as_posix()
        digests = {name: getattr(run, name) for name in (*DIGESTS, "mask")}
        for name, value in {**digests, "folder": folder}.items():
            rows.loc[line.Index, name] = value
    return rows


if __name__ == "__main__":
    os.chdir(ROOT)
    for name, arguments in ROWS.items():
        file = ROOT / "docs" / "results" / f"{name}.csv"
        file.write_text(csv_text(renewed(read_csv(file), *arguments)))
