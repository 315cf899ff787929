"""A command with Hydra's command line: one line for an error, a table after a sweep."""

import argparse
import gc
import importlib.machinery
import json
import math
import multiprocessing
import os
import re
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, OverrideParseException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from metamask_solo.atomic_files import atomic_write
from metamask_solo.errors import RunStopped, UserError
from metamask_solo.training.endings import config_path, override, scripts_folder

if TYPE_CHECKING:
    from metamask_solo.training.resume import FitResult

R = TypeVar("R")
CHECK = "--cfg-check"
# Hydra's folders and logs, of which a check leaves none
NO_FILES = ("hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=disabled")
BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
CONFIG_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError)
RESULT = "sweep_result.json"  # in the folder that Hydra gives to a job of a sweep
# of the jobs of the last command: signals at once, all others at its end
_errors: list[UserError | RunStopped] = []


def _signal() -> UserError | RunStopped | None:
    """The error of a job that a signal ended: no further job begins."""
    return next((error for error in _errors if _code(error) > 128), None)


def _code(error: Exception) -> int:
    return getattr(error, "exit_code", 0)


def _error(outcome: dict[str, Any]) -> UserError | RunStopped:
    """The error that a job noted in its result."""
    text, code = outcome["error"], outcome["exit_code"]
    return RunStopped(text, code) if code else UserError(text)


class _Leave(SystemExit):
    """Carries an error past Hydra, which would print a text of its own, or begin the next job."""

    def __init__(self, error: Exception):
        super().__init__(str(error))
        self.error = error


def run(
    name: str,
    argv: list[str],
    task: Callable[[DictConfig], "FitResult | None"],
    prepare: Callable[..., tuple[Any, DictConfig, Any, Any]] | None = None,
    objective: str = "",
) -> None:
    """Runs ``task`` on the config that Hydra composes from ``argv``, for each job of a sweep.

    Args:
        name: the command's.
        argv: its arguments.
        task: trains as a config says.
        prepare: what ``--cfg-check`` does instead: builds all, and writes and downloads nothing.
        objective: the metric that a search maximises, and by which a sweep's table is sorted.

    Raises:
        UserError: Hydra or YAML cannot make a config of ``argv``, or the task refuses it.
        RunStopped: a signal ended the run, and with it the sweep, or its loss is not finite.
    """
    from metamask_solo.training.trainer import quiet

    parser = argparse.ArgumentParser(
        prog=f"metamask-solo {name}", add_help=False, allow_abbrev=False
    )
    parser.add_argument("--config-path", "-cp")
    parser.add_argument("--config-name", "-cn")
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument(CHECK, action="store_true")
    arguments, overrides = parser.parse_known_args(argv)
    overrides = [_at_home(text) for text in overrides]
    options = [f"--config-path={_absolute(arguments.config_path)}"] if arguments.config_path else []
    if arguments.config_name:
        options.append(f"--config-name={arguments.config_name}")
    elif "--hydra-help" not in overrides:
        raise UserError("--config-name: missing; give --config-path FOLDER --config-name FILE")
    if arguments.multirun:
        options.append("--multirun")
        table = f"{{_target_:{__name__}.SweepTable,objective:'{objective}'}}"
        overrides.append(f"++hydra.callbacks.sweep_table={table}")
    job = Job(task, objective, prepare if arguments.cfg_check else None)
    _errors.clear()
    try:
        with tempfile.TemporaryDirectory() as nowhere, quiet(), _as_command(name):
            if arguments.cfg_check:
                overrides += [*NO_FILES, f"hydra.sweep.dir={nowhere}"]
            _adding_keys(overrides, lambda more: _main(job, name, [*options, *more]))
    except _Leave as left:
        raise left.error from left
    except CONFIG_ERRORS as error:
        raise UserError(f"config: {reason(error)}") from error
    except Exception as error:
        if (line := _signal() or _of_hydra(error)) is None:  # a launcher's processes may have ended
            raise
        raise line from error
    if _errors:
        raise max(_errors, key=_code)


def _of_hydra(error: Exception) -> UserError | RunStopped | None:
    """One line where Hydra, OmegaConf or Optuna raised an error of another kind than theirs."""
    if "No trials are completed" in str(error):  # Optuna's words
        return RunStopped("every trial of the search failed")
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    if not frame.f_globals.get("__name__", "").startswith(("hydra", "omegaconf")):
        return None
    hint = "; write augmentations.0.KEY=VALUE" if " int" in str(error) else ""
    return UserError(f"config: {reason(error)}{hint}")


def _main(job: "Job", name: str, argv: list[str]) -> None:
    sys.argv = [f"metamask-solo {name}", *argv]
    try:
        hydra.main(version_base="1.2", config_path=None)(job)()
    except SystemExit as error:  # --cfg leaves this way
        if isinstance(error, _Leave):
            raise
        if error.code not in (0, None):
            raise UserError(f"hydra could not read the command line: {' '.join(argv)}") from error


@contextmanager
def _as_command(name: str) -> Iterator[None]:
    """What Lightning needs to start the other processes of DDP, and Hydra to raise its errors."""
    module, argv, sigterm = sys.modules["__main__"], sys.argv, signal.getsignal(signal.SIGTERM)
    spec = module.__spec__
    module.__spec__ = importlib.machinery.ModuleSpec(f"metamask_solo.commands.{name}", None)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra else prints errors itself and exits
    try:
        yield
    finally:
        module.__spec__, sys.argv = spec, argv
        signal.signal(signal.SIGTERM, sigterm)


@dataclass
class Job:
    """One job of a command: its task, and what becomes of an error in it; see :func:`run`."""

    task: Callable[[DictConfig], "FitResult | None"]
    objective: str
    check: Callable[..., tuple[Any, DictConfig, Any, Any]] | None

    def __call__(self, cfg: DictConfig) -> float | None:
        """Runs the job; returns the objective, for searches."""
        settings = HydraConfig.get()
        sweeps = settings.mode == RunMode.MULTIRUN
        searches = sweeps and settings.sweeper._target_ != BASIC_SWEEPER
        gc.collect()  # the model of the job before is a reference cycle, and fills the GPU
        outcome: dict[str, Any] = {"overrides": OmegaConf.to_container(settings.overrides.task)}
        try:
            return self._value(cfg, settings, searches, outcome)
        except (UserError, RunStopped) as caught:
            if not sweeps:
                raise _Leave(caught) from caught
            outcome |= {"error": str(caught), "exit_code": _code(caught)}
        finally:
            if sweeps and self.objective:
                with atomic_write(Path(settings.runtime.output_dir, RESULT)) as path:
                    path.write_text(json.dumps(outcome))
        error = _error(outcome)  # a new one: what was caught holds the model, which fills the GPU
        if _code(error) > 128:
            _errors.append(error)
        # every trial of a search would fail by a wrong setting
        ends = _code(error) > 128 or (searches and isinstance(error, UserError))
        if ends and settings.launcher._target_ == BASIC_LAUNCHER:
            raise _Leave(error)
        print(f"failed: {error}", file=sys.stderr)
        if searches:
            raise error  # Optuna marks the trial
        return None

    def _value(
        self, cfg: DictConfig, settings: Any, searches: bool, outcome: dict[str, Any]
    ) -> float | None:
        """Trains, or checks; notes the folder and the metrics of the run."""
        if settings.job.chdir:
            raise UserError(
                "hydra.job.chdir=True: not supported; paths are relative to the current folder"
            )
        if searches and not _measures(cfg, self.objective):
            raise UserError(
                f"hydra.sweeper: the search has no objective, no run computes {self.objective}"
            )
        if self.check is not None:
            print(f"ok: {self.check(cfg, read_packed=False)[1].name}")
            return None
        if stop := _signal():
            raise stop
        result = self.task(cfg)
        if result is None:
            return None
        outcome |= {"folder": str(result.folder), "metrics": result.metrics}
        value = result.metrics.get(self.objective, math.nan)
        if searches and not math.isfinite(value):
            raise RunStopped(f"{self.objective} is {value}")
        return value


def _measures(cfg: DictConfig, objective: str) -> bool:
    """Whether a run of a composed config computes the objective of a search."""
    value = partial(OmegaConf.select, cfg)
    validates = value("data.val_path") and not value("data.no_labels")
    knn = "knn" not in objective or value("knn_eval.enabled")
    return bool(validates and knn and value("limit_val_batches") != 0)


class SweepTable(Callback):
    """At the end of a sweep: overrides, folder and accuracies of each job, the best one on top."""

    def __init__(self, objective: str):
        self.objective = objective
        self.started = time.time()

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Passes SIGTERM on to processes that run the jobs: they save before they end."""

        def pass_on(number: int, frame: Any) -> None:
            _errors.append(RunStopped("stopped by SIGTERM", 128 + number))
            for child in multiprocessing.active_children():
                child.terminate()

        if config.hydra.launcher._target_ != BASIC_LAUNCHER:  # there, the run itself hears it
            signal.signal(signal.SIGTERM, pass_on)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Prints the table, and remembers what failed."""
        import pandas as pd

        files = Path(config.hydra.sweep.dir).rglob(RESULT)
        jobs = [json.loads(f.read_text()) for f in files if f.stat().st_mtime >= self.started]
        fixed = set.intersection(*(set(job["overrides"]) for job in jobs)) if jobs else set()
        rows = []
        for job in jobs:
            metrics = {k: v for k, v in job.get("metrics", {}).items() if "acc" in k and "val" in k}
            chosen = " ".join(o.lstrip("+") for o in job["overrides"] if o not in fixed)
            if "folder" in job or "error" in job:  # no check that went well
                rows.append({"overrides": chosen, **metrics, "folder": job.get("folder", "failed")})
            if "error" in job:
                _errors.append(_error(job))
        table = pd.DataFrame(rows)
        if len(table) > 1:
            if self.objective in table:
                table = table.sort_values(self.objective, ascending=False)
            print(table.to_string(index=False, float_format="%.2f", na_rep=""))


def _adding_keys(overrides: Sequence[str], use: Callable[[list[str]], R]) -> R:
    """Calls ``use`` with overrides, in which a key that the file lacks gets the + that Hydra wants.

    Whether a command reads the key is checked later, with a better hint.
    """
    overrides = list(overrides)
    while True:
        try:
            return use(overrides)
        except ConfigCompositionException as error:
            lacking = re.match(
                r"Could not override '(.+?)'\.|Error merging override ([^+].+)", str(error)
            )
            if lacking is None:
                raise
            key, mark = (lacking[1], "+") if lacking[1] else (lacking[2].partition("=")[0], "++")
            more = [f"{mark}{o}" if o.startswith(f"{key}=") else o for o in overrides]
            if more == overrides:
                raise
            overrides = more


def compose_file(path: str | Path, overrides: Sequence[str] = ()) -> DictConfig:
    """The config of a YAML file as a command composes it; known keys need no ``+``.

    Args:
        path: the file.
        overrides: as on the command line.

    Raises:
        UserError: Hydra or YAML cannot make a config of it.
    """
    folder, _, name = str(path).removesuffix(".yaml").rpartition("/")
    try:
        with hydra.initialize_config_dir(os.path.abspath(folder), version_base="1.2"):
            cfg = _adding_keys(overrides, lambda more: hydra.compose(name, more))
            OmegaConf.set_struct(cfg, False)
            return cfg
    except CONFIG_ERRORS as error:
        raise UserError(f"{path}: {reason(error)}") from error


def _at_home(text: str) -> str:
    """``KEY=~/…`` with the home folder in it: Hydra's grammar has no ``~`` in a value."""
    key, _, value = text.partition("=")
    one_path = value.startswith("~/") and "," not in value
    return override(key, os.path.expanduser(value)) if one_path else text


def _absolute(path: str) -> str:
    """--config-path from the working folder; Hydra would start at this file's folder."""
    if "://" in path:
        return path
    absolute = os.path.abspath(os.path.expanduser(path))
    if not os.path.isdir(absolute):
        group = path.removeprefix("scripts/").rstrip("/")
        packaged = group != path and (scripts_folder() / group).is_dir()
        hint = f"; the package has {config_path(group)}" if packaged else ""
        raise UserError(f"--config-path={path}: no such folder{hint}")
    return absolute


def reason(error: Exception) -> str:
    """The innermost cause in one line: Hydra wraps what OmegaConf and YAML say."""
    if isinstance(error, OverrideParseException):
        key, equals, value = str(error.override).partition("=")
        if not equals:
            return f"{key}: must be KEY=VALUE"
        quoted = shlex.quote(override(key, value))
        return f"{error.override}: Hydra cannot read it; quote the value: {quoted}"
    if isinstance(error, UnicodeDecodeError):
        return f"a YAML file is not UTF-8 ({error})"
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = str(cause).partition("\nConfig search path:")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "; ".join(lines).replace(":; ", ": ") if lines else type(cause).__name__
