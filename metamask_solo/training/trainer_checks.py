"""Checks of what a config says to Lightning's Trainer, at the ends of its ranges."""

import math
import re
from datetime import timedelta
from typing import Any

from omegaconf import DictConfig, OmegaConf

from metamask_solo.errors import UserError

PROFILERS = ("simple", "advanced", "pytorch")
ALGORITHMS = ("norm", "value")
# least whole number; null stands for Lightning's default
WHOLE_NUMBERS = {
    "min_epochs": 0,
    "min_steps": 0,
    "num_sanity_val_steps": -1,
    "log_every_n_steps": 0,
    "check_val_every_n_epoch": 1,
}
TRAINER_SWITCHES = (
    "enable_progress_bar",
    "enable_model_summary",
    "inference_mode",
    "detect_anomaly",
    "benchmark",
    "enable_autolog_hparams",
)


def check_trainer(cfg: DictConfig) -> None:
    """Raises UserError for the first argument of Lightning's Trainer that cannot work.

    Lightning itself refuses some of them, others only after the first epoch or not at all.
    """
    for key, least in WHOLE_NUMBERS.items():
        _whole(cfg, key, least)
    for key in TRAINER_SWITCHES:
        value = cfg.get(key)
        if value is not None and not isinstance(value, bool):
            raise UserError(f"{key}={value}: must be true or false")
    steps = cfg.get("max_steps")
    if steps is not None and steps != -1:
        _whole(cfg, "max_steps", 1, "or -1 for no limit")
    for key in ("limit_train_batches", "limit_val_batches"):
        _share(cfg, key, zero=key == "limit_val_batches")
    _check_validation(cfg)
    _check_time(cfg)
    fast = cfg.get("fast_dev_run")
    if fast is not None and not isinstance(fast, bool):
        _whole(cfg, "fast_dev_run", 1, "or true or false")
    clip = cfg.get("gradient_clip_val")
    if clip is not None and not (_number(clip) and clip >= 0):
        raise UserError(f"gradient_clip_val={clip}: must be a number of at least 0")
    for key, allowed in (
        ("gradient_clip_algorithm", ALGORITHMS),
        ("profiler", PROFILERS),
        ("deterministic", (True, False, "warn")),
    ):
        value = cfg.get(key)
        if value is not None and value not in allowed:
            raise UserError(f"{key}={value}: allowed are {', '.join(map(str, allowed))}")


def _check_validation(cfg: DictConfig) -> None:
    interval = cfg.get("val_check_interval")
    key = f"val_check_interval={interval}"
    timed = isinstance(interval, str) or OmegaConf.is_config(interval)
    if interval is not None and not timed:
        _share(cfg, "val_check_interval", zero=False)
    if interval is not None and timed and _duration(interval) is None:
        raise UserError(f"{key}: must be a share of an epoch, a number of batches, or DD:HH:MM:SS")
    by_epoch = "check_val_every_n_epoch" not in cfg or cfg.check_val_every_n_epoch is not None
    if not by_epoch and not timed and (interval is None or isinstance(interval, float)):
        raise UserError(
            "check_val_every_n_epoch=null: needs a number of batches in val_check_interval, after "
            "which to validate"
        )


def _check_time(cfg: DictConfig) -> None:
    given = cfg.get("max_time")
    duration = _duration(given)
    if given is not None and (duration is None or duration <= timedelta()):
        raise UserError(
            f"max_time={given}: must be a time such as 00:12:00:00 (days, hours, minutes, "
            "seconds) or {hours: 12}, above 0"
        )


def _duration(given: Any) -> timedelta | None:
    if isinstance(given, str):
        parts = re.fullmatch(r"(\d+):(\d\d):(\d\d):(\d\d)", given.strip())
        if parts is None:
            return None
        days, hours, minutes, seconds = map(int, parts.groups())
        return timedelta(days, seconds, hours=hours, minutes=minutes)
    if OmegaConf.is_dict(given):
        try:
            return timedelta(**OmegaConf.to_container(given, resolve=True))  # type: ignore[arg-type]
        except TypeError:
            return None
    return None


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(cfg: DictConfig, key: str, least: int, besides: str = "") -> None:
    value = cfg.get(key)
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        allowed = f"an integer of at least {least} {besides}".strip()
        raise UserError(f"{key}={value}: must be {allowed}")


def _share(cfg: DictConfig, key: str, zero: bool) -> None:
    """A share of the batches up to 1.0, or a whole number of them."""
    value = cfg.get(key)
    if value is None:
        return
    good = _number(value) and (value > 0 or (zero and value == 0))
    if not good or (isinstance(value, float) and value > 1):
        above = "from" if zero else "above"
        raise UserError(
            f"{key}={value}: must be a share {above} 0.0 up to 1.0, or a whole number of batches"
        )
