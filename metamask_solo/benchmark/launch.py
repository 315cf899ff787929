"""Running a benchmark's runs through Hydra's launchers, each in a process of its own."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from metamask_solo.benchmark.plan import JOB, Plan, Run, job_config
from metamask_solo.benchmark.records import Failure, Result, Task
from metamask_solo.benchmark.rows import known_rows
from metamask_solo.errors import UserError
from metamask_solo.training import hydra_app

POLL = 1.0  # seconds
LOG = "log.txt"  # of a run's folder


def execute(plan: Plan) -> None:
    """Runs what is not finished yet; a failed run leaves failed.json, and the rest goes on.

    Finished is what has a result here, or a row of its digest in the file of ``rows``.

    Raises:
        UserError: the launcher could not be started.
    """
    known = known_rows(plan.file)
    pending = [run for run in plan.runs if not Result.is_in(run.folder) and run.digest not in known]
    print(
        f"{plan.file.name}: {len(plan.runs)} runs, {len(plan.runs) - len(pending)} finished before"
    )
    if not pending:
        return
    for run in pending:
        _tell_of_other_settings(run)
        Task(
            method=run.method,
            setting=run.setting,
            seed=run.seed,
            config=run.config,
            evaluations=plan.file.measured,
            keep_checkpoints=plan.file.keep_checkpoints,
        ).write(run.folder)
        (run.folder / Failure.FILE).unlink(missing_ok=True)
    names = [run.folder.relative_to(plan.out).as_posix() for run in pending]
    node = {**job_config(plan), "launched_by": os.getpid()}
    ConfigStore.instance().store(name=f"{JOB}.yaml", node=node)
    with _progress(pending):
        try:
            argv = ["--config-name", JOB, "-m", f"run={','.join(names)}"]
            hydra_app.run("benchmark", argv, run_job)
        except UserError:
            raise
        except Exception as error:  # whatever a launcher raises: the finished runs still count
            print(f"launcher {plan.file.launcher.name}: {type(error).__name__}: {error}")


def run_job(cfg: DictConfig) -> None:
    """One job of the sweep: starts the run's own process, and notes it if that fails."""
    folder = Path(cfg.out, cfg.run)
    # A worker of joblib must not outlive the command, nor take its next job. A job of submitit may:
    # it goes on, as on a cluster, and a second call of the command waits for it.
    in_worker = cfg.launcher == "joblib" and os.getpid() != cfg.launched_by
    parent = cfg.launched_by if in_worker else None
    _end_without(parent)
    with (folder / LOG).open("ab") as log:
        log.write(f"started {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
        log.flush()
        begin = log.tell()
        child = subprocess.Popen(
            [sys.executable, "-m", "metamask_solo.benchmark.worker", str(folder)],
            stdin=subprocess.PIPE,  # stays open as long as this process lives
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TQDM_DISABLE": "1"},
        )
        try:
            code = _wait(child, parent)
        finally:
            child.kill()
            child.wait()
    if code != 0:
        Failure(error=_reason(folder / LOG, begin, code), exit_code=code).write(folder)


def _wait(child: "subprocess.Popen[bytes]", parent: int | None) -> int:
    while True:
        try:
            return child.wait(POLL)
        except subprocess.TimeoutExpired:
            _end_without(parent)


def _end_without(parent: int | None) -> None:
    """Ends an orphaned worker; its child sees the pipe closed, and ends too."""
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def _reason(log: Path, begin: int, code: int) -> str:
    """Why a process failed, in one line: the last one that it printed, or the signal."""
    if code < 0:
        return f"killed by signal {-code} ({signal.Signals(-code).name})"
    with log.open("rb") as file:
        file.seek(begin)
        text = file.read().decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {code}"


def _tell_of_other_settings(run: Run) -> None:
    """A finished run of this method and seed with another config is not taken for this one."""
    for result in sorted(run.folder.parent.glob(f"seed-{run.seed}-*/{Result.FILE}")):
        other = Task.read(result.parent)
        if other.setting != run.setting:
            continue
        old, new = _flat(other.config), _flat(run.config)
        keys = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
        changes = [
            f"{k}: {old.get(k)} then, {new.get(k)} now" for k in keys if k != "checkpoint.dir"
        ]
        told = "; ".join(changes[:3]) or "other data, or evaluated in another way"
        print(f"{run}: finished with another config ({told}); it is run anew")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = dict(enumerate(value)).items()  # type: ignore[assignment]
    else:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, child in items:
        found |= _flat(child, f"{prefix}.{key}".lstrip("."))
    return found


@contextmanager
def _progress(runs: list[Run]) -> Iterator[None]:
    """Prints a line when a run starts and when it ends, under any launcher: the files tell."""
    stop = threading.Event()
    logs = {run.folder: _size(run.folder / LOG) for run in runs}
    started: set[Path] = set()
    ended: set[Path] = set()
    begin = time.monotonic()

    def look() -> None:
        for number, run in enumerate(runs, 1):
            failed = Failure.is_in(run.folder)
            done = failed or Result.is_in(run.folder)
            if run.folder not in started and (done or _size(run.folder / LOG) > logs[run.folder]):
                started.add(run.folder)
                print(f"run {number} of {len(runs)}: {run}", flush=True)
            if run.folder not in ended and done:
                ended.add(run.folder)
                print(f"  {run}: {_outcome(run.folder, failed)}{_left()}", flush=True)

    def _left() -> str:
        done = len(ended) + len(started - ended) / 2  # of those that run, half on average
        seconds = (time.monotonic() - begin) / done * (len(runs) - done)
        return f"; about {_duration(seconds)} left"

    def watch() -> None:
        while not stop.wait(POLL):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        look()


def _outcome(folder: Path, failed: bool) -> str:
    if failed:
        return f"FAILED: {Failure.read(folder).error} (see {folder / LOG})"
    metrics = Result.read(folder).metrics
    units = {name: "" if name.startswith("rankme") else " %" for name in metrics}
    return "  ".join(f"{name} {value:.1f}{units[name]}" for name, value in metrics.items())


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
