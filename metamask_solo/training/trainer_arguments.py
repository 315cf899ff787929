"""What a config may say to Lightning's Trainer, at the ends of the ranges.

Lightning itself refuses some of it, some only after the first epoch or not at all.
"""

import math
import re
from datetime import timedelta
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field

from metamask_solo.validation import Allowed, Left, Number, Settings


def duration(given: Any) -> timedelta:
    """A time as Lightning takes it, ``DD:HH:MM:SS`` or a mapping such as ``{hours: 12}``.

    Raises:
        ValueError: it is none.
    """
    form = r"\s*(\d+):(\d\d):(\d\d):(\d\d)\s*"
    if isinstance(given, str) and (parts := re.fullmatch(form, given)):
        days, hours, minutes, seconds = map(int, parts.groups())
        return timedelta(days, seconds, hours=hours, minutes=minutes)
    if isinstance(given, dict):
        try:
            return timedelta(**given)
        except (TypeError, OverflowError) as error:
            raise ValueError("no time") from error
    raise ValueError("no time")


def _time(given: Any) -> Any:
    if given is not None and duration(given) <= timedelta():
        raise ValueError("no time")
    return given


def _share(given: Any) -> Any:
    """A share of the batches up to 1.0, or a whole number of them."""
    if given is not None:
        good = isinstance(given, int | float) and not isinstance(given, bool)
        if not good or not 0 <= given < math.inf or (isinstance(given, float) and given > 1):
            raise ValueError("no share")
    return given


def _positive_share(given: Any) -> Any:
    if given == 0:
        raise ValueError("none")
    return _share(given)


def _interval(given: Any) -> Any:
    if isinstance(given, str | dict):
        duration(given)
        return given
    return _positive_share(given)


def _limit(given: int | None) -> int | None:
    if given is not None and given < 1 and given != -1:
        raise ValueError("no limit")
    return given


class TrainerArguments(Settings):
    """Arguments of Lightning's Trainer; those that are not here it checks itself."""

    model_config = ConfigDict(extra="ignore")

    max_epochs: int = Field(ge=1)
    min_epochs: int | None = Field(None, ge=0)
    min_steps: int | None = Field(None, ge=0)
    max_steps: Annotated[
        int | None,
        AfterValidator(_limit),
        Allowed("an integer of at least 1 or -1 for no limit"),
    ] = -1
    max_time: Annotated[
        Any,
        AfterValidator(_time),
        Allowed(
            "a time such as 00:12:00:00 (days, hours, minutes, seconds) or {hours: 12}, above 0"
        ),
    ] = None
    limit_train_batches: Annotated[
        Any,
        AfterValidator(_positive_share),
        Allowed("a share above 0.0 up to 1.0, or a whole number of batches"),
    ] = None
    limit_val_batches: Annotated[
        Any,
        AfterValidator(_share),
        Allowed("a share from 0.0 up to 1.0, or a whole number of batches"),
    ] = None
    val_check_interval: Annotated[
        Any,
        AfterValidator(_interval),
        Allowed("a share of an epoch above 0.0 up to 1.0, a number of batches, or DD:HH:MM:SS"),
    ] = None
    check_val_every_n_epoch: int | None = Field(1, ge=1)
    num_sanity_val_steps: int | None = Field(None, ge=-1)
    log_every_n_steps: int | None = Field(None, ge=0)
    accumulate_grad_batches: int = Field(1, ge=1)
    num_nodes: int = Field(1, ge=1)
    fast_dev_run: bool | Annotated[int, Field(ge=1)] | None = False
    gradient_clip_val: Number | None = Field(None, ge=0)
    gradient_clip_algorithm: Literal["norm", "value"] | None = None
    profiler: Literal["simple", "advanced", "pytorch"] | None = None
    deterministic: Literal[True, False, "warn"] | None = None
    sync_batchnorm: Left[bool] = False
    enable_progress_bar: Left[bool] = None
    enable_model_summary: Left[bool] = None
    enable_autolog_hparams: Left[bool] = None
    inference_mode: Left[bool] = None
    detect_anomaly: Left[bool] = None
    benchmark: Left[bool] = None
