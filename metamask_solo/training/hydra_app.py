"""A command with Hydra's command line, and one line for whatever is wrong with a config."""

import importlib.machinery
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from metamask_solo.errors import UserError

CHECK = "--cfg-check"


def run(name: str, argv: list[str], task: Callable[[DictConfig], Any]) -> None:
    """Runs ``task`` on the config that Hydra composes from ``argv``, for each job of a sweep.

    Raises:
        UserError: Hydra or YAML cannot make a config of ``argv``.
    """
    if not any(a.split("=")[0] in ("--config-name", "-cn") for a in argv) and not _informs(argv):
        raise UserError("--config-name: missing; give --config-path FOLDER --config-name FILE")
    before = sys.argv
    main_module = sys.modules["__main__"]
    own_spec = main_module.__spec__
    # Lightning starts the other processes of DDP as `python -m` what the spec names
    main_module.__spec__ = importlib.machinery.ModuleSpec(f"metamask_solo.commands.{name}", None)
    full = os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [f"metamask-solo {name}", *_absolute_config_path(argv)]
    # Hydra else prints errors itself and exits; raised, they become one line
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        hydra.main(version_base="1.2", config_path=None)(task)()
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"config: {reason(error)}") from error
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
    return cfg


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
    if not Path(path).is_dir():
        raise UserError(f"--config-path={path}: no such folder")
    return str(Path(path).resolve())


def reason(error: Exception) -> str:
    """The innermost cause in one line: Hydra wraps what OmegaConf and YAML say."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return "; ".join(lines[:3]) if lines else type(cause).__name__


def compose_config(dataset: str, name: str, overrides: list[str]) -> Any:
    """The config of one of the package's own pretraining files."""
    from hydra import compose, initialize_config_dir

    folder = scripts_folder() / "pretrain" / dataset
    with initialize_config_dir(str(folder), version_base="1.2"):
        return compose(name, overrides)


def scripts_folder() -> Path:
    """Where the YAML files are: in the repository, or installed with the package."""
    import metamask_solo

    package = Path(metamask_solo.__file__).parent
    beside = package.parent / "scripts"
    return (beside if beside.is_dir() else package / "scripts").resolve()
