"""Runs a benchmark's runs through Hydra's launchers, each in a process of its own."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from tqdm import tqdm

from metamask_solo.benchmark.plan import JOB, Plan, Run, job_config
from metamask_solo.benchmark.results import FAILURE, RESULT, TASK, known_runs, read_json, write_json
from metamask_solo.benchmark.schema import EVALUATIONS, QUICK_EPOCHS, QUICK_PIXELS
from metamask_solo.errors import UserError
from metamask_solo.training import hydra_app

LOG = "log.txt"  # of a run's folder


def pending_runs(plan: Plan) -> list[Run]:
    """The runs that have no result here, and none in the file of ``rows``."""
    known = known_runs(plan.file)
    return [r for r in plan.runs if not (r.folder / RESULT).exists() and r.digest not in known]


def check_batches(plan: Plan, runs: list[Run]) -> None:
    """Raises UserError where a run's batch is larger than the images to train on."""
    if plan.images is None:
        return
    for run in runs:
        batch = run.config.get("optimizer", {}).get("batch_size", 1)
        if batch > plan.images:
            lower = 2 ** max(0, plan.images.bit_length() - 2)
            raise UserError(
                f"methods.{run.method}: optimizer.batch_size={batch}: there are only {plan.images} "
                f"training images; add overrides+=[optimizer.batch_size={lower}]"
            )


def execute(plan: Plan, runs: list[Run]) -> None:
    """Runs some of the plan's runs; a failed run leaves failed.json, and the rest goes on.

    Raises:
        UserError: the launcher could not be started.
    """
    # a run that is not trained says nothing of the time left: those come last
    runs = sorted(runs, key=lambda run: "untrained" in run.config)
    for run in runs:
        task = {"config": run.config, "evaluations": plan.file.measured}
        write_json(run.folder / TASK, {**task, "keep_checkpoints": plan.file.keep_checkpoints})
        (run.folder / FAILURE).unlink(missing_ok=True)
    names = [run.folder.relative_to(plan.out).as_posix() for run in runs]
    ConfigStore.instance().store(name=f"{JOB}.yaml", node=job_config(plan.file, plan.out))
    with _progress(runs):
        try:
            hydra_app.run(
                "benchmark", ["--config-name", JOB, "-m", f"run={','.join(names)}"], run_job
            )
        except UserError:
            raise
        except Exception as error:  # whatever a launcher raises: the finished runs still count
            print(f"launcher {plan.file.launcher.name}: {type(error).__name__}: {error}")


def forecast(plan: Plan, runs: list[Run]) -> str:
    """How long some runs take, from three timed steps of the dearest method; also with ``quick``.

    Where no step can be timed, such as with one step an epoch, their number alone; the run itself
    then says what is wrong.
    """
    trained = [run for run in runs if "untrained" not in run.config]
    if not trained:
        return f"{len(runs)} runs without training"
    dearest = max(trained, key=_weight)
    each = _seconds(dearest, {})
    if each is None:
        return f"{len(runs)} runs"
    runs_of_dearest = sum(map(_weight, runs)) / _weight(dearest) / _jobs(plan)
    seconds = each * runs_of_dearest
    text = f"{len(runs)} runs, about {_duration(seconds)} here"
    if not plan.file.quick and seconds > 1800:
        pixels = {f"augmentations.{i}.crop_size": QUICK_PIXELS
                  for i in range(len(dearest.config["augmentations"]))}  # fmt: skip
        quick = _seconds(dearest, {**pixels, "max_epochs": QUICK_EPOCHS, "precision": "32"})
        if quick is not None and quick < each / 2:
            quick *= runs_of_dearest
            text += (
                f"; quick=True takes about {_duration(quick)}: {QUICK_PIXELS} pixels, "
                f"{QUICK_EPOCHS} epochs"
            )
    return text


def _weight(run: Run) -> float:
    """About how long a run takes, in runs of the cheapest method (docs/runs.md)."""
    if "untrained" in run.config:
        return 0.05
    meta = run.config.get("method_kwargs", {}).get("meta", {})
    if run.config["method"] != "metamask" or not meta.get("enabled", True):
        return 1.0
    update = 3.0 if meta.get("trial_scope", "all") == "all" else 0.05
    return 1 + update / int(meta.get("every_n_steps", 1))


def _jobs(plan: Plan) -> int:
    return int((plan.file.launcher.model_extra or {}).get("n_jobs", 1))


def _seconds(run: Run, changes: dict[str, object]) -> float | None:
    """Seconds of a run, from three steps in a process of its own; None where that fails."""
    with tempfile.TemporaryDirectory(prefix="forecast-") as folder:
        write_json(Path(folder, TASK), {"config": run.config, "changes": changes})
        command = [sys.executable, "-m", "metamask_solo.benchmark.worker", "--forecast", folder]
        environment = {**os.environ, "TQDM_DISABLE": "1"}
        subprocess.run(command, capture_output=True, env=environment)
        result = read_json(Path(folder, RESULT))
    return None if result is None else float(result["seconds"])


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def run_job(cfg: DictConfig) -> None:
    """One job of the sweep: the run's own process, and a note of why it failed."""
    folder = Path(cfg.out, cfg.run)
    with (folder / LOG).open("ab") as log:
        begin = log.tell()
        command = [sys.executable, "-m", "metamask_solo.benchmark.worker", str(folder)]
        environment = {**os.environ, "TQDM_DISABLE": "1"}
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
        )
    if done.returncode != 0:
        error = _reason(folder / LOG, begin, done.returncode)
        write_json(folder / FAILURE, {"error": error})


def _reason(log: Path, begin: int, code: int) -> str:
    """Why a process failed, in one line: the last one that it printed, or the signal."""
    if code < 0:
        return f"killed by signal {-code} ({signal.Signals(-code).name})"
    text = log.read_bytes()[begin:].decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {code}"


@contextmanager
def _progress(runs: list[Run]) -> Iterator[None]:
    """A line for each run that ends, and the time left; under any launcher, the files tell."""
    stop = threading.Event()
    form = "{percentage:3.0f} % |{bar:20}| {elapsed} so far, {remaining} left"
    weights = {run.folder: _weight(run) for run in runs}
    bar = tqdm(total=sum(weights.values()), smoothing=0, bar_format=form, file=sys.stdout)

    def watch() -> None:
        running, last = list(runs), False
        while not last:
            last = stop.wait(1.0)
            for run in filter(_outcome, list(running)):
                running.remove(run)
                bar.n += weights[run.folder]  # shown once, below the line
                bar.write(f"{run}: {_outcome(run)}")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        bar.close()


def _outcome(run: Run) -> str:
    """What became of a run, in words; nothing while it runs."""
    if result := read_json(run.folder / RESULT):
        return "  ".join(f"{name} {result[name]:.1f}" for name in EVALUATIONS if name in result)
    failure = read_json(run.folder / FAILURE)
    return f"FAILED: {failure['error']} (see {run.folder / LOG})" if failure else ""
