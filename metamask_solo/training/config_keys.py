"""Which keys a run's config may have: one rule, and a guess at what a misspelt one means."""

import inspect
import re
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel

from metamask_solo.errors import UserError
from metamask_solo.hosts import LINEAR_OPTIMIZER_KEYS, pl, setting_names
from metamask_solo.training.run_config import Pretraining, Probe, TrainerArguments
from metamask_solo.validation import holder_of, section_of, unknown

# a section that is passed on whole, so that others say what may stand in it
WHOLE: dict[str, Any] = {"*": None}

# a key without keys of its own
LEAF: dict[str, Any] = {}


# Arguments of Lightning's Trainer that a command sets itself, and what to do instead
NOT_FROM_A_CONFIG = {
    "logger": "metrics go into the run's folder, and wandb.enabled=True sends them to W&B",
    "callbacks": "a program can give them to metamask_solo.training.pretraining.pretrain_run",
    "plugins": "the command has its own; precision and strategy choose Lightning's",
    "enable_checkpointing": "checkpoint.enabled says whether checkpoints are written",
    "default_root_dir": "checkpoint.dir says where a run is written",
    "use_distributed_sampler": "the images are shared among the processes in any case",
    "reload_dataloaders_every_n_epochs": "the images stay the same for the whole run",
    "overfit_batches": "limit_train_batches trains on a part of the images",
    "limit_test_batches": "nothing is tested here",
    "limit_predict_batches": "nothing is predicted here",
    "barebones": "enable_progress_bar and enable_model_summary say what is shown",
    "model_registry": "the checkpoints stay on this machine",
}
# read by solo-learn's own scripts
NOT_HERE = {
    "auto_umap": "`metamask-solo umap` draws a run's features",
    "dali": "images are read by torchvision",
    "debug_augmentations": "`metamask-solo pretrain … --cfg-check` checks them",
}


# names that other tools have for a setting
OTHER_NAMES = {
    "arch": "backbone.name",
    "epochs": "max_epochs",
    "gpus": "devices",
    "learning_rate": "optimizer.lr",
    "model": "backbone.name",
    "output_dir": "checkpoint.dir",
    "resume": "resume_from_checkpoint",
    "temperature": "method_kwargs.temperature",
    "workers": "data.num_workers",
}


def trainer_arguments() -> dict[str, inspect.Parameter]:
    """The arguments of the installed Lightning's Trainer."""
    parameters = dict(inspect.signature(pl.Trainer.__init__).parameters)
    parameters.pop("self")
    return parameters


def known_keys(command: str) -> dict[str, Any]:
    """The tree of keys that a command reads: ``pretrain``, else those of a probe."""
    own = _tree(Pretraining if command == "pretrain" else Probe)
    for name in TrainerArguments.model_fields:  # which of them there are depends on the release
        del own[name]
    return {**dict.fromkeys(trainer_arguments(), LEAF), "max_time": WHOLE, **own}


def _tree(model: type[BaseModel]) -> dict[str, Any]:
    found = {}
    for name, field in model.model_fields.items():
        section = section_of(field)
        below = WHOLE if holder_of(field) is dict else LEAF
        found[name] = below if section is None else _tree(section)
    return found


def is_known(key: str, command: str) -> bool:
    """Whether a dotted key may stand in a command's config."""
    tree = known_keys(command)
    for part in key.split("."):
        if tree is WHOLE:
            return True
        if part not in tree:
            return False
        tree = tree[part]
    return True


def check_key(key: str, command: str) -> None:
    """Raises UserError for a dotted key that a command does not read."""
    top = tree = known_keys(command)
    prefix = ""
    for part in key.split("."):
        if tree is WHOLE:
            return
        name = f"{prefix}.{part}".lstrip(".")
        if part not in tree:
            raise _unknown(part, name, tree, prefix, top)
        tree, prefix = tree[part], name


def check_keys(cfg: DictConfig, command: str) -> None:
    """Raises UserError for the first key that nothing reads.

    What an interpolation of the config itself refers to is read by that.
    """
    plain = OmegaConf.to_container(cfg)
    known = known_keys(command)
    if command == "pretrain" and isinstance(cfg.get("method"), str):
        names = setting_names(cfg.method)
        if names is not None:
            known["method_kwargs"] = dict.fromkeys(sorted(names), WHOLE)
    elif command != "pretrain" and "layer_decay" not in LINEAR_OPTIMIZER_KEYS:
        del known["optimizer"]["layer_decay"]
    _check(plain, known, "", set(_references(plain)), known)
    parameters = trainer_arguments()
    for key, instead in NOT_FROM_A_CONFIG.items():
        if key in parameters and cfg.get(key) not in (None, parameters[key].default):
            raise UserError(f"{key}={cfg[key]}: not from a config; {instead}")


def _check(
    node: Any, known: dict[str, Any], prefix: str, referred: set[str], top: dict[str, Any]
) -> None:
    if known is WHOLE:
        return
    if isinstance(node, list) and prefix == "augmentations":
        for i, item in enumerate(node):
            _check(item, known, f"{prefix}.{i}", referred, top)
        return
    if not isinstance(node, dict) or known is LEAF:
        return
    for name, value in node.items():
        key = f"{prefix}.{name}".lstrip(".")
        if name in known:
            _check(value, known[name], key, referred, top)
        elif not any(reference == key or reference.startswith(f"{key}.") for reference in referred):
            raise _unknown(str(name), key, known, prefix, top)


def _unknown(
    name: str, key: str, known: dict[str, Any], prefix: str, top: dict[str, Any]
) -> UserError:
    if key in NOT_HERE:
        return UserError(f"{key}: not read by this command; {NOT_HERE[key]}")
    if name in OTHER_NAMES:
        return UserError(f"{key}: unknown setting; did you mean {OTHER_NAMES[name]}?")
    beside = [f"{prefix}.{n}".lstrip(".") for n in known]
    return unknown(key, beside, elsewhere=_dotted(top))


def _dotted(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, below in tree.items():
        key = f"{prefix}{name}"
        if below is WHOLE or not below:
            yield key
        else:
            yield from _dotted(below, f"{key}.0." if key == "augmentations" else f"{key}.")


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for value in node.values():
            yield from _references(value)
    elif isinstance(node, list):
        for value in node:
            yield from _references(value)
    elif isinstance(node, str):
        yield from re.findall(r"\$\{\s*([\w.-]+)\s*\}", node)
