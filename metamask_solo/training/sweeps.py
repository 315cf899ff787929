"""Hydra's sweeps (-m): what ends one, and searches by Optuna that can be stopped and go on."""

import functools
import gc
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from metamask_solo.errors import RunStopped, UserError
from metamask_solo.training.overrides import option, target

BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
SWEEP = ("-m", "--multirun")
# what Optuna says at the end of a search without any result, in memory and in a file
NO_BEST_TRIAL = ("No trials are completed", "Record does not exist")
Objective = dict[str, tuple[Any, ...]]
# set in a process that was told to stop: it begins no further job
_stopped: list[RunStopped] = []


class Leave(BaseException):
    """Carries an error past Hydra, which would go on with the next job of the sweep."""

    def __init__(self, error: Exception):
        super().__init__(str(error))
        self.error = error


class Job:
    """One job of a command; ends the whole sweep where that must not go on.

    Args:
        task: what the command does with a config.
    """

    def __init__(self, task: Callable[[DictConfig], Any]):
        self.task = task
        functools.update_wrapper(self, task)  # Hydra names jobs by module and name

    def __call__(self, cfg: DictConfig) -> Any:
        if _stopped:
            raise _stopped[0]
        gc.collect()  # the model of the job before is a reference cycle, and fills the GPU
        try:
            return self.task(cfg)
        except RunStopped as error:
            if error.exit_code < 128:  # it diverged, or the like
                if _searches():
                    print(f"trial failed: {error}", file=sys.stderr)
                raise
            _stopped.append(error)
            raise self._leaving(error) from error
        except UserError as error:
            if _searches():
                raise self._leaving(error) from error  # every trial would fail like this
            raise

    @staticmethod
    def _leaving(error: Exception) -> BaseException:
        # another launcher's processes hand on exceptions only
        basic = not _sweeps() or HydraConfig.get().launcher._target_ == BASIC_LAUNCHER
        return Leave(error) if basic else error


def begin() -> None:
    """Forgets that this process was told to stop, which is of the command before."""
    _stopped.clear()


def _sweeps() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def _searches() -> bool:
    return _sweeps() and HydraConfig.get().sweeper._target_ != BASIC_SWEEPER


def objective(metrics: dict[str, float], name: str) -> float:
    """The value that a search optimises; 0 where there is none and nobody asks for it.

    Raises:
        UserError: there is none, and a search asks for it.
        RunStopped: it is not finite.
    """
    value = metrics.get(name)
    if value is None:
        if _searches():
            raise UserError(f"{name}: the run did not compute it, so the search has no objective")
        return 0.0
    if not math.isfinite(value):
        raise RunStopped(f"{name} is {value}")
    return value


def optimises(composed: DictConfig | None, argv: list[str]) -> bool:
    """Whether a command line asks for a search, of which the command returns the objective."""
    return any(a in SWEEP for a in argv) and target(composed, "sweeper") not in ("", BASIC_SWEEPER)


def optuna_overrides(argv: list[str], composed: DictConfig | None) -> list[str]:
    """What makes a search by Optuna survive: a file, failed trials, and only what is missing.

    Returns:
        More overrides, for what neither the YAML file nor the command line says.
    """
    if composed is None or "optuna" not in target(composed, "sweeper"):
        return []
    _bridge_storage()
    sweeper = composed.hydra.sweeper
    added = []
    if not _given(argv, "hydra.sweeper.max_failure_rate"):
        added.append("++hydra.sweeper.max_failure_rate=1.0")
    name, storage = sweeper.get("study_name"), sweeper.get("storage")
    if name is None:
        name = composed.get("name", "study")
        added.append(f'hydra.sweeper.study_name="{name}"')
    if storage is None:
        storage = f"sqlite:///{name}.db"
        added.append(f'hydra.sweeper.storage="{storage}"')
    left = _trials_left(str(name), str(storage), int(sweeper.n_trials))
    if left != sweeper.n_trials:
        added.append(f"hydra.sweeper.n_trials={left}")
    return added


def _bridge_storage() -> None:
    """Lets Optuna 2, the only one that Hydra's sweeper takes, begin a file with SQLAlchemy 2.

    It writes the version of a new file on a connection that SQLAlchemy 2 no longer commits by
    itself, and then finds none.
    """
    import alembic.migration
    from optuna.storages._rdb.storage import _VersionManager

    def set_revision(self: Any, revision: str) -> None:
        with self.engine.begin() as connection:
            context = alembic.migration.MigrationContext.configure(connection)
            context.stamp(self._create_alembic_script(), revision)

    _VersionManager._set_alembic_revision = set_revision  # type: ignore[method-assign]


def _given(argv: list[str], key: str) -> bool:
    return any(a.lstrip("+").partition("=")[0] == key for a in argv)


def _trials_left(name: str, storage: str, wanted: int) -> int:
    """How many trials a study lacks; those that a killed search left open count as failed.

    Raises:
        UserError: the study is complete, or its file cannot be read.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    file = storage.removeprefix("sqlite:///")
    if file != storage and not Path(file).exists():
        return wanted
    try:
        study = optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        return wanted
    except Exception as error:
        raise UserError(f"hydra.sweeper.storage={storage}: cannot be read ({error})") from error
    states = optuna.trial.TrialState
    for trial in study.get_trials(deepcopy=False, states=(states.RUNNING,)):
        study.tell(trial.number, state=states.FAIL)
    done = len(study.get_trials(deepcopy=False, states=(states.COMPLETE, states.FAIL)))
    if done >= wanted:
        raise UserError(
            f"hydra.sweeper.n_trials={wanted}: the study {name} in {storage} has {done} trials "
            "already; give a larger number, or another study_name"
        )
    if done:
        print(f"search: {done} of {wanted} trials are in {storage}; going on")
    return wanted - done


@contextmanager
def quiet_jobs() -> Iterator[None]:
    """Keeps Hydra from printing "Error executing job" before an error that is told in one line."""
    own = JobReturn.return_value

    def value(self: Any) -> Any:
        if self.status == JobStatus.FAILED:
            raise self._return_value
        return own.fget(self)  # type: ignore[attr-defined]

    JobReturn.return_value = property(value, own.fset)  # type: ignore[assignment, attr-defined]
    try:
        yield
    finally:
        JobReturn.return_value = own  # type: ignore[method-assign]


@contextmanager
def signals_passed_on(argv: list[str], composed: DictConfig | None) -> Iterator[None]:
    """While other processes run a sweep's jobs, passes SIGTERM on to them and waits for them."""
    elsewhere = target(composed, "launcher") not in ("", BASIC_LAUNCHER)
    if not elsewhere or not any(a in SWEEP for a in argv):
        yield
        return
    received: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        received.append(number)
        _stopped.append(RunStopped("stopped by SIGTERM", 128 + number))
        for child in _children():
            with suppress(ProcessLookupError):
                os.kill(child, number)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield
    except Exception as error:
        if received and not isinstance(error, RunStopped):
            raise _stopped[-1] from error
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        _stopped.clear()


def _children() -> list[int]:
    if not sys.platform.startswith("linux"):
        return []
    files = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return [int(pid) for file in files for pid in file.read_text().split()]


def check_objective(composed: DictConfig | None, argv: list[str], lacking: Objective) -> None:
    """Refuses a search whose objective nothing computes, before the first trial.

    Args:
        lacking: dotted keys, each with the values under which there is no objective.
    """
    if not optimises(composed, argv):
        return
    for key, values in lacking.items():
        given = option([a.lstrip("+") for a in argv], key)
        value: Any = OmegaConf.select(composed, key) if composed is not None else None
        if given is not None:
            value = OmegaConf.create(f"given: {given}").given
        if value in values:
            shown = "null" if value is None else value
            raise UserError(
                f"{key}={shown}: then the search has no objective; it needs the accuracy on "
                "labelled validation images"
            )
