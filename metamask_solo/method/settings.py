"""The settings of MetaMask: their defaults, what is allowed, and the check.

They stand under ``method_kwargs`` in a YAML file of solo-learn's GitHub main, and are keyword
arguments of ``MetaMask`` on 1.0.2 (``mask`` and ``meta`` are mappings there).
"""

import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from metamask_solo.errors import UserError
from metamask_solo.method.mask import KINDS


@dataclass(frozen=True)
class Setting:
    """One setting: its default, a test of a value, and the words for what the test accepts."""

    default: Any
    accepts: Callable[[Any], bool]
    allowed: str


def _number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _integer(default: int, least: int) -> Setting:
    return Setting(
        default,
        lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= least,
        f"an integer of at least {least}",
    )


def _real(default: float, least: float = 0.0, most: float = math.inf) -> Setting:
    bounds = f"a number of at least {least:g}" + (f" and at most {most:g}" if most < 1e9 else "")
    return Setting(default, lambda v: _number(v) and least <= v <= most, bounds)


def _positive(default: float, most: float = math.inf) -> Setting:
    bounds = "a number above 0" + (f" and at most {most:g}" if most < 1e9 else "")
    return Setting(default, lambda v: _number(v) and 0 < v <= most, bounds)


def _choice(*choices: str) -> Setting:
    return Setting(choices[0], lambda v: v in choices, "one of " + ", ".join(choices))


def _switch(default: bool) -> Setting:
    return Setting(default, lambda v: isinstance(v, bool), "true or false")


def _optional(setting: Setting) -> Setting:
    return Setting(None, lambda v: v is None or setting.accepts(v), f"null or {setting.allowed}")


SETTINGS: dict[str, Setting] = {
    # redundancy-reduction head: three layers, hidden size twice
    "proj_hidden_dim": _integer(2048, 1),
    "proj_output_dim": _integer(2048, 1),
    # contrastive head: two layers
    "contrastive_hidden_dim": _integer(2048, 1),
    "contrastive_output_dim": _integer(256, 1),
    # L_drr: Barlow Twins' off-diagonal weight and its overall factor
    "lamb": _real(0.005),
    "scale_loss": _real(1.0),
    # L_con: below 0.02, exp(1 / temperature) leaves the range of single precision
    "temperature": _real(0.07, 0.02, 100.0),
    # weight of L_con in the regular step
    "alpha": _real(10.0),
    "mask.kind": _choice(*KINDS),
    # null: 0 for sigmoid (m = 0.5), 1 for linear (m = 1)
    "mask.initial_logit": _optional(Setting(None, _number, "a finite number")),
    "mask.optimizer": _choice("sgd", "adam"),
    "mask.lr": _real(1e-3),
    # sgd: momentum; adam: its first beta
    "mask.momentum": Setting(
        0.9, lambda v: _number(v) and 0 <= v < 1, "a number of at least 0 and below 1"
    ),
    "mask.weight_decay": _real(5e-4),
    "mask.schedule": _choice("fixed", "cosine"),
    # null: the hypergradient is not clipped; a number: largest norm
    "mask.clip_grad": _optional(_positive(1.0)),
    # false: the mask stays as it started
    "meta.enabled": _switch(True),
    # plain: the gradient of L_con at the current weights, without any trial step
    "meta.hypergradient": _choice("exact", "finite_difference", "first_order", "plain"),
    # finite_difference only: how far the weights move to either side
    "meta.radius": _positive(1e-2),
    # null: the learning rate in force, where the optimiser is SGD
    "meta.trial_lr": _optional(_real(0.0)),
    "meta.trial_momentum": _switch(True),
    "meta.trial_weight_decay": _switch(True),
    "meta.every_n_steps": _integer(1, 1),
    # heads: the trial step moves the contrastive head only, on features already computed
    "meta.trial_scope": _choice("all", "heads"),
    # part of the batch that the meta-update uses
    "meta.batch_fraction": _positive(1.0, 1.0),
}

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
    kind, logit = resolved["mask"]["kind"], resolved["mask"]["initial_logit"]
    if logit is not None and (logit == 0 if kind == "linear" else abs(logit) > 50):
        allowed = "not be 0" if kind == "linear" else "lie within -50 and 50"
        raise UserError(
            f"{prefix}mask.initial_logit={logit}: must {allowed} with mask.kind={kind}, where the "
            "gradient would vanish"
        )
    return resolved


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
