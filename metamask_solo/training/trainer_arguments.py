"""What a config may say to Lightning's Trainer, at the ends of the ranges.

Lightning itself refuses some of it, some only after the first epoch or not at all.
"""

import re
from datetime import timedelta
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le
from pydantic import AfterValidator, ConfigDict, Field

from metamask_solo.validation import Allowed, Left, Number, Settings


def _time(given: Any) -> Any:
    """A time as Lightning takes it, ``DD:HH:MM:SS`` or a mapping such as ``{hours: 12}``."""
    found = None
    form = r"\s*(\d+):(\d\d):(\d\d):(\d\d)\s*"
    try:
        if isinstance(given, dict):
            found = timedelta(**given)
        elif isinstance(given, str) and (parts := re.fullmatch(form, given)):
            days, hours, minutes, seconds = map(int, parts.groups())
            found = timedelta(days, seconds, hours=hours, minutes=minutes)
    except (TypeError, OverflowError):
        found = None
    if found is None or found <= timedelta():
        raise ValueError("no time")
    return given


Time = Annotated[Any, AfterValidator(_time)]
# of the batches, or a whole number of them
Share = Annotated[int, Ge(1)] | Annotated[float, Gt(0), Le(1)]
ShareOrNone = Annotated[int, Ge(0)] | Annotated[float, Ge(0), Le(1)]


class TrainerArguments(Settings):
    """Arguments of Lightning's Trainer; those that are not here it checks itself."""

    model_config = ConfigDict(extra="ignore")

    max_epochs: int = Field(ge=1)
    min_epochs: int | None = Field(None, ge=0)
    min_steps: int | None = Field(None, ge=0)
    max_steps: Annotated[int, Ge(1)] | Literal[-1] | None = -1
    max_time: Annotated[
        Time | None,
        Allowed(
            "a time such as 00:12:00:00 (days, hours, minutes, seconds) or {hours: 12}, above 0"
        ),
    ] = None
    limit_train_batches: Annotated[
        Share | None, Allowed("a share above 0.0 up to 1.0, or a whole number of batches")
    ] = None
    limit_val_batches: Annotated[
        ShareOrNone | None, Allowed("a share from 0.0 up to 1.0, or a whole number of batches")
    ] = None
    val_check_interval: Annotated[
        Share | Time | None,
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
