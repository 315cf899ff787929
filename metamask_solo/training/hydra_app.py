"""A command with Hydra's command line, and one line for whatever is wrong with a config."""

import importlib.machinery
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from metamask_solo.errors import RunStopped, UserError
from metamask_solo.training import sweeps
from metamask_solo.training.console import quiet
from metamask_solo.training.endings import scripts_folder
from metamask_solo.training.overrides import (
    add_known_keys,
    check_overrides,
    compose_pretraining,
    composed_config,
)

# keys of paths, in which `~` is the home
PATHS = (
    "data.train_path",
    "data.val_path",
    "checkpoint.dir",
    "resume_from_checkpoint",
    "pretrained_feature_extractor",
)
CHECK = "--cfg-check"


def run(
    name: str,
    argv: list[str],
    task: Callable[[DictConfig], Any],
    objective: sweeps.Objective | None = None,
    check: Callable[[DictConfig], None] | None = None,
) -> None:
    """Runs ``task`` on the config that Hydra composes from ``argv``, for each job of a sweep.

    Args:
        name: the command's.
        argv: its arguments.
        task: takes the config; returns what a search optimises.
        objective: dotted keys to the values of which each leaves nothing to optimise.
        check: what ``--cfg-check`` does instead of ``task``.

    Raises:
        UserError: Hydra or YAML cannot make a config of ``argv``.
        RunStopped: a signal ended the run, and with it the sweep.
    """
    if not any(a.split("=")[0] in ("--config-name", "-cn") for a in argv) and not _informs(argv):
        raise UserError("--config-name: missing; give --config-path FOLDER --config-name FILE")
    if check is not None and CHECK in argv:
        task, argv = check, [a for a in argv if a != CHECK]
    sweeps.begin()
    # between overrides, Hydra takes what follows for something that it does not know
    argv = sorted(argv, key=lambda argument: argument not in sweeps.SWEEP)
    argv = _absolute_config_path(argv)
    check_overrides(argv)
    composed = composed_config(argv)
    argv = add_known_keys(argv, name, composed)
    if any(a in sweeps.SWEEP for a in argv):
        sweeps.check_objective(composed, argv, objective or {})
        argv = argv + sweeps.optuna_overrides(argv, composed)
    before = sys.argv
    main_module = sys.modules["__main__"]
    own_spec = main_module.__spec__
    # Lightning starts the other processes of DDP as `python -m` what the spec names
    main_module.__spec__ = importlib.machinery.ModuleSpec(f"metamask_solo.commands.{name}", None)
    full = os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [f"metamask-solo {name}", *argv]
    # Hydra else prints errors itself and exits; raised, they become one line
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        with quiet(), sweeps.quiet_jobs(), sweeps.signals_passed_on(argv, composed):
            hydra.main(version_base="1.2", config_path=None)(sweeps.Job(task))()
    except sweeps.Leave as left:
        raise left.error from left
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config: {reason(error)}") from error
    except ValueError as error:
        if not str(error).startswith(sweeps.NO_BEST_TRIAL):
            raise
        raise RunStopped("every trial of the search failed") from error
    except SystemExit as error:  # --help and --cfg leave this way
        if error.code not in (0, None):
            raise UserError(f"hydra could not read the command line: {' '.join(argv)}") from error
    finally:
        sys.argv = before
        main_module.__spec__ = own_spec
        if full is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full


def open_config(cfg: DictConfig) -> DictConfig:
    """A copy of a composed config that takes new keys, as solo-learn's scripts need it."""
    cfg = OmegaConf.create(OmegaConf.to_container(cfg))  # type: ignore[assignment]
    OmegaConf.set_struct(cfg, False)
    for key in PATHS:
        # `~` is the shell's, which leaves it alone behind a `key=`
        value = resolved(cfg, key)
        if isinstance(value, str) and value.startswith("~"):
            OmegaConf.update(cfg, key, os.path.expanduser(value))
    check_interpolations(cfg)
    return cfg


def resolved(cfg: DictConfig, key: str) -> Any:
    """A value of a config; None where it is missing or cannot be resolved."""
    try:
        return OmegaConf.select(cfg, key, default=None)
    except OmegaConfBaseException:
        return None


def check_interpolations(cfg: DictConfig) -> None:
    """Raises UserError for the first ``${…}`` that cannot be resolved, with its key."""
    for key, node in _nodes(cfg):
        try:
            OmegaConf.select(cfg, key)
        except InterpolationResolutionError as error:
            lines = str(error).splitlines()
            variable = re.search(r"Environment variable '(.+?)' not found", lines[0])
            why = f"environment variable {variable[1]} is not set" if variable else lines[0]
            raise UserError(f"{key}={node}: {why}") from error


def _nodes(cfg: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    plain: Any = OmegaConf.to_container(cfg) if OmegaConf.is_config(cfg) else cfg
    items = plain.items() if isinstance(plain, dict) else enumerate(plain)
    for name, value in items:
        key = f"{prefix}.{name}".lstrip(".")
        if isinstance(value, dict | list):
            yield from _nodes(value, key)
        elif isinstance(value, str) and "${" in value:
            yield key, value


def _informs(argv: list[str]) -> bool:
    return any(a in ("--help", "-h", "--hydra-help", "--version") for a in argv)


def _absolute_config_path(argv: list[str]) -> list[str]:
    """Makes --config-path relative to the working folder; Hydra would take this file's folder."""
    result = list(argv)
    for i, argument in enumerate(result):
        flag, equals, value = argument.partition("=")
        if flag in ("--config-path", "-cp"):
            if equals:
                result[i] = f"{flag}={_absolute(value)}"
            elif i + 1 < len(result):
                result[i + 1] = _absolute(result[i + 1])
    return result


def _absolute(path: str) -> str:
    if "://" in path:
        return path
    path = os.path.expanduser(path)
    if not Path(path).is_dir():
        raise UserError(f"--config-path={path}: no such folder")
    return str(Path(path).resolve())


def reason(error: Exception) -> str:
    """The innermost cause in one line: Hydra wraps what OmegaConf and YAML say."""
    if isinstance(error, UnicodeDecodeError):
        return f"a YAML file is not UTF-8 ({error})"
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return "; ".join(lines[:3]) if lines else type(cause).__name__


def compose_config(dataset: str, name: str, overrides: list[str]) -> Any:
    """The config of one of the package's own pretraining files."""
    from hydra import initialize_config_dir

    folder = scripts_folder() / "pretrain" / dataset
    with initialize_config_dir(str(folder), version_base="1.2"):
        return compose_pretraining(name, overrides)
