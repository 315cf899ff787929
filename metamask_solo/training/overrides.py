"""What a user writes on Hydra's command line: hints where it cannot work, and keys to be added."""

import os
import re
import shlex
from contextlib import suppress
from typing import Any

from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from metamask_solo.errors import UserError
from metamask_solo.training.config_keys import check_key, is_known
from metamask_solo.training.endings import override

OVERRIDE = re.compile(r"(?P<sign>\+\+|\+|)(?P<key>[A-Za-z_][\w./@:-]*)=(?P<value>.*)", re.DOTALL)


def check_overrides(argv: list[str]) -> None:
    """Raises UserError for an override that Hydra cannot read, with a hint."""
    parser = OverridesParser.create()
    for argument in argv:
        found = OVERRIDE.fullmatch(argument)
        if found is None:
            continue
        key, value = found["key"], found["value"]
        part = key.removeprefix("augmentations.")
        if part != key and not part[:1].isdigit():
            raise UserError(
                f"{argument}: augmentations is a list of pipelines; write "
                f"augmentations.0.{part}={value}"
            )
        try:
            parser.parse_override(argument)
        except HydraException as error:
            quoted = shlex.quote(f"{found['sign']}{override(key, value)}")
            raise UserError(
                f"{argument}: Hydra cannot read the value; quote it: {quoted}"
            ) from error


def add_known_keys(argv: list[str], command: str, composed: DictConfig | None) -> list[str]:
    """Lets an override name any key that the command reads, although the YAML file lacks it.

    Hydra asks for a ``+`` before such a key; what it cannot know is that the key is a known one.

    Raises:
        UserError: a key that is neither in the file nor known.
    """
    if composed is None:
        return argv
    groups = _groups(composed)
    result = []
    for argument in argv:
        found = OVERRIDE.fullmatch(argument)
        if (
            found is not None
            and not found["sign"]
            and found["key"] not in groups
            and _is_of_the_config(found["key"])
        ):
            key, value = found["key"], found["value"]
            lacks = _lacks(composed, key)
            if lacks:
                check_key(key, command)
            # a mapping may hold keys that the file's lacks
            if lacks or value.startswith("{") and is_known(key, command):
                argument = f"++{argument}"
        result.append(argument)
    return result


def compose_pretraining(name: str, overrides: list[str]) -> DictConfig:
    """Composes a file of the folder that Hydra was started in; known keys need no ``+``."""
    composed = compose(name, return_hydra_config=True)
    return compose(name, add_known_keys(overrides, "pretrain", composed))


def _is_of_the_config(key: str) -> bool:
    return not (key.startswith(("hydra.", "augmentations")) or key == "hydra" or "/" in key)


def _lacks(composed: DictConfig, key: str) -> bool:
    missing = object()
    with suppress(Exception):  # an interpolation that cannot be resolved yet is there
        return OmegaConf.select(composed, key, default=missing) is missing
    return False


def composed_config(argv: list[str]) -> DictConfig | None:
    """The config of a command line without its sweeps, Hydra's own part included.

    None where it cannot be composed: Hydra itself then tells why.
    """
    path, name = option(argv, "--config-path", "-cp"), option(argv, "--config-name", "-cn")
    if path is None or name is None or GlobalHydra.instance().is_initialized():
        return None
    module = path.removeprefix("pkg://")
    start = initialize_config_dir if module == path else initialize_config_module
    extra = option(argv, "--config-dir", "-cd")
    chosen = [] if extra is None else [f'hydra.searchpath=["file://{os.path.abspath(extra)}"]']
    try:
        with start(module, version_base="1.2"):
            groups = _groups(compose(name, overrides=chosen, return_hydra_config=True))
            chosen += [a for a in argv if _is_part_of_composing(a, groups)]
            return compose(name, overrides=chosen, return_hydra_config=True)
    except Exception:
        return None


def _groups(composed: DictConfig) -> set[str]:
    """The config groups that a file chooses from, such as ``augmentations``."""
    return set(OmegaConf.select(composed, "hydra.runtime.choices", default={}))


def _is_part_of_composing(argument: str, groups: set[str]) -> bool:
    """Whether an override chooses a part of the config, rather than a value within."""
    found = OVERRIDE.fullmatch(argument)
    if found is None:
        return False
    key = found["key"]
    chooses = "/" in key or key.startswith("hydra.") or key in groups
    return chooses and not OverridesParser.create().parse_override(argument).is_sweep_override()


def option(argv: list[str], *names: str) -> str | None:
    """The value of an option of Hydra's command line."""
    for i, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        if flag in names:
            return value if equals else next(iter(argv[i + 1 : i + 2]), None)
    return None


def target(composed: DictConfig | None, part: str) -> str:
    """The class of Hydra's ``sweeper`` or ``launcher``."""
    value: Any = OmegaConf.select(composed, f"hydra.{part}._target_") if composed else None
    return str(value or "")
