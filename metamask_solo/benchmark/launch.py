"""Runs a benchmark's runs through Hydra's launchers, each in a process of its own."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from metamask_solo.benchmark.plan import JOB, Plan, Run
from metamask_solo.benchmark.results import FAILURE, RESULT, TASK, Known, read_json, write_json
from metamask_solo.benchmark.schema import EVALUATIONS, QUICK_EPOCHS, QUICK_PIXELS
from metamask_solo.benchmark.worker import LARGEST_RAW
from metamask_solo.data.datasets import counted
from metamask_solo.errors import RunStopped, UserError
from metamask_solo.training import hydra_app
from metamask_solo.training.sampling import trains_on_gpu

LOG = "log.txt"  # of a run's folder


def pending_runs(plan: Plan, known: Known) -> list[Run]:
    """The runs that have no result here, and none in the file of ``rows``."""
    return [r for r in plan.runs if not (r.folder / RESULT).exists() and r.digest not in known]


def runs_beside(plan: Plan) -> str:
    """How many finished runs the folder holds that are none of the plan; nothing for none."""
    folders = {path.parent for path in (plan.out / "runs").glob(f"*/*/{RESULT}")}
    beside = len(folders - {run.folder for run in plan.runs})
    return f"; {counted(beside, 'run')} of other settings or images there" if beside else ""


def check_batches(plan: Plan, runs: list[Run]) -> None:
    """Raises UserError where a run's batch is larger than the images to train on."""
    for run in runs:
        batch = run.config.get("optimizer", {}).get("batch_size", 1)
        if plan.images and batch > plan.images[0]:
            lower = 2 ** max(0, plan.images[0].bit_length() - 2)
            raise UserError(
                f"methods.{run.method}: optimizer.batch_size={batch}: there are only "
                f"{plan.images[0]} training images; add overrides+=[optimizer.batch_size={lower}]"
            )


@contextmanager
def stoppable() -> Iterator[None]:
    """Makes one line of SIGTERM and Ctrl-C.

    Raises:
        RunStopped: one of them came.
    """
    received = [signal.SIGINT]

    def stop(number: int, frame: Any) -> None:
        received[0] = signal.Signals(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except (KeyboardInterrupt, RunStopped) as error:
        code = getattr(error, "exit_code", 128 + received[0])
        raise RunStopped(
            f"stopped by {signal.Signals(code - 128).name}; finished runs are kept, and the same "
            "command continues the others",
            code,
        ) from error
    finally:
        signal.signal(signal.SIGTERM, before)


def execute(plan: Plan, runs: list[Run]) -> None:
    """Runs some of the plan's runs; a failed run leaves failed.json, and the rest goes on.

    Raises:
        UserError: the launcher could not be started.
        RunStopped: a signal came.
    """
    # a run that is not trained says nothing of the time left: those come last
    runs = sorted(runs, key=lambda run: not run.trained)
    for run in runs:
        task = {"config": run.config, "evaluations": plan.file.measured}
        write_json(run.folder / TASK, {**task, "keep_checkpoints": plan.file.keep_checkpoints})
        (run.folder / FAILURE).unlink(missing_ok=True)
    names = [run.folder.relative_to(plan.out).as_posix() for run in runs]
    with _progress(runs):
        try:
            hydra_app.run(
                "benchmark", ["--config-name", JOB, "-m", f"run={','.join(names)}"], run_job
            )
        except (UserError, RunStopped):
            raise
        except Exception as error:  # whatever a launcher raises: the finished runs still count
            print(f"launcher {plan.file.launcher.name}: {type(error).__name__}: {error}")


def forecast(plan: Plan, runs: list[Run]) -> str:
    """How long some runs take, from three short epochs of the dearest method; also with ``quick``.

    Where no step can be timed, their number alone; the run itself then says what is wrong.
    """
    trained = [run for run in runs if run.trained]
    if not trained:
        return f"{counted(len(runs), 'run')} without training"
    dearest = max(trained, key=_weight)

    def seconds(config: dict[str, Any]) -> float | None:
        if (timed := _seconds(plan, dearest.identity, config)) is None:
            return None
        starting, training = timed
        return starting * len(runs) + training * sum(map(_weight, runs)) / _weight(dearest)

    whole = seconds(dearest.config)
    if whole is None:
        return counted(len(runs), "run")
    text = f"{counted(len(runs), 'run')}, about {_duration(whole)} here"
    # side by side, each has a part of the cores, or another machine
    text += "" if plan.file.launcher.name == "basic" else ", one after the other"
    if not plan.file.quick and whole > 1800:
        views = [{**view, "crop_size": QUICK_PIXELS} for view in dearest.config["augmentations"]]
        changes = {"augmentations": views, "max_epochs": QUICK_EPOCHS, "precision": "32"}
        quick = seconds({**dearest.config, **changes})
        if quick is not None and quick < whole / 2:
            text += f"; quick=True takes about {_duration(quick)}: {QUICK_PIXELS} pixels, "
            text += f"{QUICK_EPOCHS} epochs"
    return text


def _weight(run: Run) -> float:
    """About how long a run takes, in runs of the cheapest method (docs/runs.md)."""
    if not run.trained:
        return 0.05
    meta = run.config.get("method_kwargs", {}).get("meta", {})
    if run.config["method"] != "metamask" or not meta.get("enabled", True):
        return 1.0
    update = 3.0 if meta.get("trial_scope", "all") == "all" else 0.05
    return 1 + update / int(meta.get("every_n_steps", 1))


def _seconds(
    plan: Plan, identity: dict[str, Any], config: dict[str, Any]
) -> tuple[float, float] | None:
    """Seconds that a run takes to start, and from then on; None where it fails.

    Three epochs on one process are timed, each just long enough for an update of the mask. A
    forward pass of one image, of which an evaluation takes one, is a sixth of what training takes
    for two views.
    """
    batch, limit = config["optimizer"]["batch_size"], config.get("limit_train_batches")
    period = identity.get("method_kwargs.meta.every_n_steps", 1)
    period *= identity.get("accumulate_grad_batches", 1)
    # on a CPU, a step of large images may take minutes; small ones cost less in large batches
    large = max(view["crop_size"] for view in config["augmentations"]) > LARGEST_RAW
    timed = min(batch, 16) if large and not trains_on_gpu(config) else batch
    with tempfile.TemporaryDirectory(prefix="forecast-") as folder:
        changes = {
            "optimizer.batch_size": timed,
            "devices": 1,
            "num_nodes": 1,
            "max_epochs": 3,
            "limit_train_batches": period + 1,
            "auto_resume.enabled": False,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 1,
            "knn_eval.enabled": False,
            "checkpoint.dir": folder,
        }
        cfg = OmegaConf.create(config)
        for key, value in changes.items():
            OmegaConf.update(cfg, key, value, force_add=True)
        task = {"config": OmegaConf.to_container(cfg), "evaluations": [], "keep_checkpoints": True}
        write_json(Path(folder, TASK), task)
        began = time.monotonic()
        _train(Path(folder))
        lasted = time.monotonic() - began
        result = read_json(Path(folder, RESULT))
    if result is None or result["seconds_per_step"] is None:
        return None
    step, batches = result["seconds_per_step"] * batch / timed, result["batches"] * timed // batch
    steps = batches // identity["processes"]
    steps = steps * limit if isinstance(limit, float) else min(steps, limit or steps)
    forward = step * batches / 6  # of all training images
    evaluated = plan.images[-1] / plan.images[0] if len(plan.images) > 1 else 0.0
    between = result["seconds_between_epochs"] + forward * evaluated
    training = config["max_epochs"] * (
        step * steps + between / (config.get("check_val_every_n_epoch") or 1)
    )
    return lasted - 3 * result["seconds_per_epoch"], training + forward * (1 + evaluated)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def run_job(cfg: DictConfig) -> None:
    """One job of the sweep: the run's own process, and a note of why it failed."""
    folder = Path(cfg.out, cfg.run)
    log = folder / LOG
    begin = log.stat().st_size if log.exists() else 0
    with stoppable():
        code = _train(folder)
    if code != 0:
        write_json(folder / FAILURE, {"error": _reason(log, begin, code)})


def _train(folder: Path) -> int:
    """The exit code of a run's process."""
    command = [sys.executable, "-m", "metamask_solo.benchmark.worker", str(folder)]
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    with (folder / LOG).open("ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
        )
        try:
            return process.wait()
        except BaseException:  # a signal: the run saves before it ends
            process.terminate()
            process.wait()
            raise


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
    bar = tqdm(total=sum(map(_weight, runs)), smoothing=0, bar_format=form, file=sys.stdout)

    def watch() -> None:
        running, last = list(runs), False
        while not last:
            last = stop.wait(1.0)
            for run in filter(_outcome, list(running)):
                running.remove(run)
                bar.n += _weight(run)  # shown once, below the line
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
