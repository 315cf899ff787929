"""The settings of MetaMask: their defaults, what is allowed, and the check.

They stand under ``method_kwargs`` in a YAML file of solo-learn's GitHub main, and are keyword
arguments of ``MetaMask`` on 1.0.2 (``mask`` and ``meta`` are mappings there).
"""

import difflib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from metamask_solo.errors import UserError
from metamask_solo.method.hypergradient import METHODS
from metamask_solo.method.mask import KINDS


@dataclass(frozen=True)
class Setting:
    """One setting: default, a test of a value, words for what it accepts, and what it does."""

    default: Any
    accepts: Callable[[Any], bool]
    allowed: str
    meaning: str = ""


def _number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _integer(meaning: str, default: int, least: int) -> Setting:
    return Setting(
        default,
        lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= least,
        f"an integer of at least {least}",
        meaning,
    )


def _real(meaning: str, default: float, least: float = 0.0, most: float = math.inf) -> Setting:
    bounds = f"a number of at least {least:g}" + (f" and at most {most:g}" if most < 1e9 else "")
    return Setting(default, lambda v: _number(v) and least <= v <= most, bounds, meaning)


def _positive(meaning: str, default: float, most: float = math.inf) -> Setting:
    bounds = "a number above 0" + (f" and at most {most:g}" if most < 1e9 else "")
    return Setting(default, lambda v: _number(v) and 0 < v <= most, bounds, meaning)


def _choice(meaning: str, *choices: str) -> Setting:
    return Setting(choices[0], lambda v: v in choices, "one of " + ", ".join(choices), meaning)


def _switch(meaning: str, default: bool) -> Setting:
    return Setting(default, lambda v: isinstance(v, bool), "true or false", meaning)


def _optional(setting: Setting) -> Setting:
    return Setting(
        None,
        lambda v: v is None or setting.accepts(v),
        f"null or {setting.allowed}",
        setting.meaning,
    )


# The meanings stand in the help and in docs/settings.md.
SETTINGS: dict[str, Setting] = {
    "proj_hidden_dim": _integer(
        "hidden size, twice, of the redundancy-reduction head (three layers)", 2048, 1
    ),
    "proj_output_dim": _integer("output size of the redundancy-reduction head", 2048, 1),
    "contrastive_hidden_dim": _integer("hidden size of the contrastive head (two layers)", 2048, 1),
    "contrastive_output_dim": _integer("output size of the contrastive head", 256, 1),
    "lamb": _real("off-diagonal weight of the redundancy (Barlow Twins) loss", 0.005),
    "scale_loss": _real("factor of the whole redundancy loss", 1.0),
    # below 0.02, exp(1 / temperature) leaves the range of single precision
    "temperature": _real("temperature of the contrastive (NT-Xent) loss", 0.07, 0.02, 100.0),
    "alpha": _real("weight of the contrastive loss in the regular step", 10.0),
    "mask.kind": _choice("sigmoid: m = 1 / (1 + exp(-a)) of the logits a; linear: m = a", *KINDS),
    "mask.initial_logit": _optional(
        Setting(
            None,
            _number,
            "a number within ±10 (sigmoid), or of a size from 0.001 to 1000 (linear)",
            "where all logits start; null: 0 for sigmoid (m = 0.5), 1 for linear (m = 1)",
        )
    ),
    "mask.optimizer": _choice("optimiser of the mask", "sgd", "adam"),
    "mask.lr": _real("learning rate of the mask", 1e-3),
    "mask.momentum": Setting(
        0.9,
        lambda v: _number(v) and 0 <= v < 1,
        "a number of at least 0 and below 1",
        "momentum of the mask's sgd; of its adam, the first beta",
    ),
    "mask.weight_decay": _real("weight decay of the mask's logits", 5e-4),
    "mask.schedule": _choice(
        "fixed: a constant rate; cosine: the rate falls to 0 over the run", "fixed", "cosine"
    ),
    "mask.clip_grad": _optional(
        _positive("largest norm of the hypergradient; null: it is not clipped", 1.0)
    ),
    "meta.enabled": _switch("false: the mask stays where it starts", True),
    "meta.hypergradient": _choice(
        "how the mask's gradient is computed; finite_difference is the official code's way, "
        "first_order leaves out how the trial step depends on the mask, plain takes no trial step",
        *METHODS,
        "plain",
    ),
    "meta.radius": _positive(
        "finite_difference only: how far the weights move to either side", 1e-2
    ),
    "meta.trial_lr": _optional(
        _real("rate of the trial step; null: the rate in force, where the optimiser is SGD", 0.0)
    ),
    "meta.trial_momentum": _switch("whether the trial step uses the momentum buffers", True),
    "meta.trial_weight_decay": _switch("whether the trial step uses the weight decay", True),
    "meta.every_n_steps": _integer("the mask is updated after every n-th step", 1, 1),
    "meta.trial_scope": _choice(
        "all: the trial step moves backbone and contrastive head; heads: the contrastive head "
        "alone, on features already computed, which is much cheaper",
        "all",
        "heads",
    ),
    "meta.batch_fraction": _positive("part of the batch that the mask update uses", 1.0, 1.0),
}

# where the logit's derivative is still right in single precision, and above BatchNorm's eps:
# σ(a) (1 − σ(a)) is off by 0.1 % at 10, by 18 % at 15, and exactly 0 from 17
LARGEST_SIGMOID_LOGIT = 10.0
SMALLEST_LINEAR_LOGIT, LARGEST_LINEAR_LOGIT = 1e-3, 1e3

GROUPS = sorted({key.partition(".")[0] for key in SETTINGS if "." in key})
NAMES = tuple(dict.fromkeys(key.partition(".")[0] for key in SETTINGS))


def resolve_settings(given: Mapping[str, Any], prefix: str = "method_kwargs.") -> dict[str, Any]:
    """Completes and checks the settings of MetaMask.

    Args:
        given: nested mapping of settings, without defaults.
        prefix: what stands before a key in error messages.

    Returns:
        A nested dictionary with every setting.

    Raises:
        UserError: an unknown key, or a value of the wrong type or out of range.
    """
    resolved: dict[str, Any] = {group: {} for group in GROUPS}
    flat = dict(_flatten(given, prefix))
    for key in flat.keys() - SETTINGS.keys():
        close = difflib.get_close_matches(key, SETTINGS, n=1)
        hint = f"did you mean {close[0]}?" if close else "allowed are " + ", ".join(SETTINGS)
        raise UserError(f"{prefix}{key}: unknown setting; {hint}")
    for key, setting in SETTINGS.items():
        value = flat.get(key, setting.default)
        if isinstance(setting.default, float) or key in ("mask.initial_logit", "meta.trial_lr"):
            value = _scientific(value)
        if not _accepts(setting, value):
            raise UserError(f"{prefix}{key}={value!r}: must be {setting.allowed}")
        group, _, name = key.rpartition(".")
        (resolved[group] if group else resolved)[name] = value
    _check_initial_logit(resolved["mask"], prefix)
    return resolved


def describe_settings() -> str:
    """The settings as text, one a line: name, default, what is allowed, what it is for."""
    return "\n".join(
        f"{name} = {_yaml(setting.default)}: {setting.meaning} ({setting.allowed})"
        for name, setting in SETTINGS.items()
    )


def idle_settings(settings: Mapping[str, Any], steps: float, sgd: bool) -> list[str]:
    """Settings that differ from their default, or forbid the mask to move, and do nothing.

    Args:
        settings: completed settings.
        steps: steps of the network in the whole run, infinity where nobody knows.
        sgd: whether the network's optimiser is SGD.

    Returns:
        For each a few words: the setting, and why.
    """
    mask, meta = settings["mask"], settings["meta"]
    found = []

    def idle(key: str, why: str, always: bool = False) -> None:
        group, _, name = key.rpartition(".")
        value = (settings[group] if group else settings)[name]
        if always or value != SETTINGS[key].default:
            found.append(f"{key}={_yaml(value)} ({why})")

    if settings["alpha"] == settings["scale_loss"] == 0:
        found.append("alpha=0 and scale_loss=0 (the network learns nothing)")
    elif settings["scale_loss"] == 0:
        idle("lamb", "scale_loss is 0")
    if not meta["enabled"]:
        for key in SETTINGS:
            if key.startswith(("mask.", "meta.")) and key not in (
                "meta.enabled",
                "mask.kind",
                "mask.initial_logit",
            ):
                idle(key, "meta.enabled is false")
        return found
    if meta["every_n_steps"] > steps:
        idle("meta.every_n_steps", f"the run has {int(steps)} steps, so the mask never moves", True)
    if mask["lr"] == 0:
        idle("mask.lr", "the mask never moves", True)
    if meta["hypergradient"] != "finite_difference":
        idle("meta.radius", "only finite_difference uses it")
    if meta["hypergradient"] == "plain":
        for name in ("trial_lr", "trial_momentum", "trial_weight_decay"):
            idle(f"meta.{name}", "hypergradient is plain, without a trial step")
    elif meta["trial_lr"] == 0:
        idle("meta.trial_lr", "no trial step: the plain gradient at the trial step's cost", True)
    if not sgd:
        idle("meta.trial_momentum", "only SGD's momentum can take part")
    return found


def _check_initial_logit(mask: Mapping[str, Any], prefix: str) -> None:
    logit, kind = mask["initial_logit"], mask["kind"]
    if logit is None:
        return
    if kind == "linear":
        good = SMALLEST_LINEAR_LOGIT <= abs(logit) <= LARGEST_LINEAR_LOGIT
        allowed = f"be of a size from {SMALLEST_LINEAR_LOGIT:g} to {LARGEST_LINEAR_LOGIT:g}"
    else:
        good = abs(logit) <= LARGEST_SIGMOID_LOGIT
        allowed = f"lie within -{LARGEST_SIGMOID_LOGIT:g} and {LARGEST_SIGMOID_LOGIT:g}"
    if not good:
        raise UserError(
            f"{prefix}mask.initial_logit={logit}: must {allowed} with mask.kind={kind}, where "
            "single precision still has its gradient"
        )


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _accepts(setting: Setting, value: Any) -> bool:
    try:
        return bool(setting.accepts(value))
    except TypeError:  # a list, say, where a choice is expected
        return False


def _scientific(value: Any) -> Any:
    """Reads ``1e-3`` as a number: YAML 1.1 takes it, without a point, for a string."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _flatten(given: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(given, Mapping):
        raise UserError(f"{prefix.rstrip('.')}={given!r}: must be a mapping of settings")
    for key, value in given.items():
        if key in GROUPS:
            if not isinstance(value, Mapping):
                raise UserError(f"{prefix}{key}={value!r}: must be a mapping of settings")
            yield from ((f"{key}.{name}", v) for name, v in value.items())
        else:
            yield str(key), value
