"""The results of a benchmark: one DataFrame from start to end, a line for each run.

Columns: ``method``, ``setting`` (searched keys and values, else empty), ``seed``, ``status``
(finished, failed or pending); accuracies in percent (``knn``, ``linear``; ``…_plain`` of the
features without mask) and ``rankme``; costs; versions; digests of what decides the run; ``curve``
(EPOCH:ACCURACY of the online kNN); ``mask``, ``learned`` where it is updated; ``notes``, what the
evaluation doubts; ``logged/…``, the last value of all that training logged.
"""

import itertools
import json
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from filelock import FileLock

from metamask_solo.atomic_files import atomic_write
from metamask_solo.benchmark.plan import Plan
from metamask_solo.benchmark.schema import SAME_METHOD, BenchmarkFile
from metamask_solo.errors import UserError

TASK, RESULT, FAILURE = "run.json", "result.json", "failed.json"  # of a run's folder
# title and form of each in a report
COSTS = {
    "seconds_per_epoch": ("s / epoch", ".1f"),
    "seconds_per_step": ("s / step", ".3f"),
    "peak_memory_mib": ("peak MiB", ".0f"),
    "parameters": ("parameters", ",.0f"),
}
VERSIONS = ["metamask-solo", "solo-learn", "torch", "lightning", "python"]
DIGESTS = ["digest", "config_digest", "unmasked_digest", "data_digest"]
FIRST = ["method", "setting", "seed", "status", "knn", "linear", "rankme"]
FIRST += ["knn_plain", "linear_plain", "rankme_plain", "linear_C", "linear_plain_C"]
ABOUT = ["device", "commit", *VERSIONS, *DIGESTS, "mask", "folder", "curve", "notes"]
UPDATED = "logged/hypergradient_norm"  # logged where a mask was updated
FIRST += [*COSTS, "epochs", *ABOUT]
TEXTS = ["method", "setting", "status", *ABOUT, "error"]
INTEGERS = ["seed", "epochs", "parameters"]
Known = dict[str, dict[str, Any]]  # digest to the line of a finished run


def read_json(path: Path) -> dict[str, Any] | None:
    """The content of a file that :func:`write_json` wrote; None where there is none."""
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path}: is no JSON file ({error}); delete it") from error
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a mapping, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1))


def read_results(plan: Plan, known: Known) -> pd.DataFrame:
    """A line for each run of a plan, in the order of its methods, settings and seeds.

    A finished run has its result from its folder, or else from the file of ``rows``.
    """
    lines = []
    for run in plan.runs:
        line: dict[str, Any] = {"method": run.method, "setting": run.setting, "seed": run.seed}
        line |= {name: getattr(run, name) for name in (*DIGESTS, "mask")}
        line["folder"] = run.folder.relative_to(plan.out).as_posix()
        result = read_json(run.folder / RESULT) or known.get(run.digest)
        failure = read_json(run.folder / FAILURE)
        if result is not None:
            line = {**result, **line, "status": "finished"}
        else:
            line |= {"status": "pending"} if failure is None else {"status": "failed", **failure}
        lines.append(line)
    return _in_order(pd.DataFrame(lines), plan.file.shown)


def _in_order(rows: pd.DataFrame, methods: Iterable[str]) -> pd.DataFrame:
    """Methods in the given order, their settings in that of the search, then the seeds."""
    rows = rows.fillna({name: "" for name in rows.columns.intersection(TEXTS)})
    rows["variant"] = (rows.method + " " + rows.setting).str.strip()
    ranks = {"method": rows.method.map([*methods].index), "variant": pd.factorize(rows.variant)[0]}
    order = rows.assign(**ranks).sort_values([*ranks, "seed"]).index
    return rows.loc[order].reset_index(drop=True)


def known_runs(plan: Plan) -> Known:
    """The finished runs in the file of ``rows`` by their digest; of no file or none yet, none.

    Raises:
        UserError: a run of the plan would take the line of another one.
    """
    file = plan.file.rows_file
    if file is None or not file.exists():
        return {}
    rows = read_csv(file).drop(columns="variant")
    finished = rows[rows.status == "finished"]
    known = {line.digest: line.dropna().to_dict() for _, line in finished.iterrows()}
    lines = {(row["method"], row["setting"], row["seed"]): row for row in known.values()}
    for run in plan.runs:
        row = lines.get((run.method, run.setting, run.seed))
        if row is not None and run.digest not in known:
            raise UserError(
                f"rows={file}: {run} is there with other settings, images, "
                f"evaluations or versions (digest {row['digest']}, not {run.digest}), and is not "
                "overwritten; give another file by rows=FILE, or take the line out"
            )
    return known


def csv_text(rows: pd.DataFrame) -> str:
    """The rows as a CSV file: columns in a fixed order, what a run lacks is empty."""
    first = [name for name in FIRST if name in rows]
    rest = sorted(rows.columns.difference([*first, "variant", "error"]))
    last = ["error"] if "error" in rows else []
    rows = rows.astype({name: "Int64" for name in INTEGERS if name in rows})
    return rows[[*first, *rest, *last]].to_csv(index=False, lineterminator="\n")


def read_csv(file: Path) -> pd.DataFrame:
    """The rows that :func:`csv_text` wrote.

    Raises:
        UserError: it is not such a file.
    """
    try:
        texts = dict.fromkeys(TEXTS, str)
        rows = pd.read_csv(file, dtype=texts, encoding="utf-8-sig")
        missing = {"method", "setting", "seed", "status"}.difference(rows.columns)
        if missing:
            raise ValueError(f"no column {min(missing)}")
        rows["seed"] = rows.seed.astype(int)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: is no table of a benchmark ({error})") from error
    return _in_order(rows, rows.method.unique())


def set_aside(file: Path, rows: pd.DataFrame) -> Path | None:
    """Renames an earlier table with finished runs that are not in the new one; its new name."""
    if not file.exists():
        return None
    with suppress(UserError):  # what is no table is kept, too
        earlier = read_csv(file)
        if earlier[earlier.status == "finished"].digest.isin(rows.digest).all():
            return None
    names = (file.with_stem(f"{file.stem}-{number}") for number in itertools.count(1))
    return file.rename(next(name for name in names if not name.exists()))


def add_to_file(benchmark: BenchmarkFile, rows: pd.DataFrame) -> None:
    """Writes the finished rows into the file of ``rows``, beside those of other runs."""
    file = benchmark.rows_file
    finished = rows[rows.status == "finished"]
    if file is None or finished.empty:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(f".{file.name}.lock")):  # another benchmark may add to it, too
        if file.exists():
            earlier = read_csv(file)
            keys = ["method", "setting", "digest"]  # two methods may be the same run
            finished = pd.concat([finished, earlier]).drop_duplicates(keys)
        with atomic_write(file) as path:
            path.write_text(csv_text(finished.drop(columns="variant")))


def rows_of(benchmark: BenchmarkFile) -> pd.DataFrame:
    """The benchmark's runs in its file of ``rows``: its methods, seeds and epochs.

    Raises:
        UserError: there is no such file, or its rows are not the runs of one benchmark.
    """
    file = benchmark.rows_file
    if file is None:
        raise UserError("rows: missing; --from-rows needs this key, the path of a CSV file")
    rows = read_csv(file)
    rows = rows[rows.method.isin(benchmark.shown)]
    seeds = {method: benchmark.seeds_of(method) for method in benchmark.shown}
    of_seed = [m == "pixels" or s in seeds[m] for m, s in zip(rows.method, rows.seed, strict=True)]
    of_length = (rows.epochs == 0) | (rows.epochs == (benchmark.epochs or rows.epochs))
    rows = rows[of_length & np.array(of_seed)]
    finished = rows[rows.status == "finished"]
    if finished.empty:
        raise UserError(f"{file}: has no finished run of these methods, seeds and epochs")
    for name in benchmark.measured:
        if name not in finished or finished[name].isna().any():
            raise UserError(f"{file}: some runs have no {name}; leave it out of evaluations=")
    twice = finished[finished.duplicated(["variant", "seed"])]
    if len(twice):
        raise UserError(f"{file}: {twice.variant.iloc[0]}, seed {twice.seed.iloc[0]}: two lines")
    settings = finished.groupby("variant").config_digest.nunique(dropna=False)
    if settings.max() > 1:
        raise UserError(f"{file}: {settings.idxmax()}: its seeds have different settings")
    if finished.data_digest.nunique(dropna=False) > 1:
        raise UserError(f"{file}: its runs have different images or evaluations")
    return _in_order(rows, benchmark.shown)


def learned_masks(runs: pd.DataFrame) -> set[str]:
    """The methods whose mask is updated."""
    learned = runs.get("mask", pd.Series("", runs.index)) == "learned"
    if UPDATED in runs:  # rows of earlier versions, and methods that derive from MetaMask
        learned |= runs[UPDATED].notna()
    return {*runs.method[learned]}


def same_but_for_the_mask(runs: pd.DataFrame, pair: Collection[str]) -> bool:
    """Whether two methods differ by their masks alone; rows of earlier versions tell by names."""
    digests = runs.get("unmasked_digest", pd.Series("", runs.index))[runs.method.isin(pair)]
    if (digests == "").any():
        return not {*SAME_METHOD}.isdisjoint(pair)
    return digests.nunique() == 1


def same_methods(runs: pd.DataFrame) -> tuple[str, ...]:
    """Two methods that are one, so that what they differ by is noise; or none."""
    there = {*SAME_METHOD} <= {*runs.method} - learned_masks(runs)
    return SAME_METHOD if there and same_but_for_the_mask(runs, SAME_METHOD) else ()


def best_settings(rows: pd.DataFrame, measures: list[str]) -> pd.DataFrame:
    """The mean of each method's best setting, by the first measure; of equal ones, by the next.

    Only settings with the most finished runs of their method take part: means over fewer seeds
    are no match.

    Returns:
        A line for each method: its ``variant``, ``setting``, ``runs``, and the means.
    """
    finished = rows[rows.status == "finished"]
    means = finished.groupby(["method", "variant", "setting"], sort=False)[measures].mean()
    means["runs"] = finished.groupby(["method", "variant", "setting"]).size()
    means = means.reset_index()
    means = means[means.runs == means.groupby("method").runs.transform("max")]
    best = means.sort_values(measures, ascending=False, kind="stable").drop_duplicates("method")
    return best.sort_index()
