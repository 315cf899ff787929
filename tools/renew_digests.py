"""Renews the digests of the rows in docs/results: ``python tools/renew_digests.py``.

For when what decides a run is written in another form but is the same, so that a benchmark still
knows its finished runs; a test keeps the rows equal to it. Where settings or methods change, the
runs must be made anew.
"""

import os
import tempfile
from pathlib import Path

import pandas as pd

from metamask_solo.benchmark.plan import override_list, read_plan, run_digests
from metamask_solo.benchmark.results import csv_text, read_csv

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
        if config.startswith("cifar10"):  # the images are not needed, only folders of their form
            for split in ("train", "val"):
                for label in range(10):
                    Path(folder, split, str(label)).mkdir(parents=True)
                    Path(folder, split, str(label), f"{split}.png").write_text(f"{split} {label}")
            overrides += tuple(f"data.{split}_path={folder}/{split}" for split in ("train", "val"))
        runs = read_plan(config, [*overrides]).runs
    identities = {(r.method, " ".join(override_list(r.setting)), r.seed): r.identity for r in runs}
    rows = rows.copy()
    for line in rows.itertuples():
        identity = identities[line.method, line.setting, line.seed]
        digest, config_digest = run_digests(line.data_digest, identity, line.seed)
        folder = f"runs/{line.method}/seed-{line.seed}-{digest}"
        columns = ["digest", "config_digest", "folder"]
        rows.loc[line.Index, columns] = [digest, config_digest, folder]
    return rows


if __name__ == "__main__":
    os.chdir(ROOT)
    for name, arguments in ROWS.items():
        file = ROOT / "docs" / "results" / f"{name}.csv"
        file.write_text(csv_text(renewed(read_csv(file), *arguments)))
