"""The list of what is bridged, and what both releases of solo-learn miss on today's torchmetrics.

A bridge is a function (or a class) that mends one thing of a host. The first line of its docstring
says which; `metamask-solo doctor` prints these lines.
"""

from collections.abc import Callable
from typing import Any

from torchmetrics.metric import Metric

# names of the bridges of this process to what they mend
BRIDGED: dict[str, str] = {}


def bridge(mend: Callable[..., Any], *targets: Any) -> Any:
    """Applies a bridge to what it mends, and notes it.

    Args:
        mend: the bridge.
        targets: its arguments.

    Returns:
        What the bridge returns.
    """
    note(mend)
    return mend(*targets)


def note(mend: Callable[..., Any]) -> None:
    """Notes a bridge that is applied elsewhere, such as to each model that is built."""
    name = mend.__name__.strip("_")
    # without docstrings (python -OO) its name must do
    line = (mend.__doc__ or name).strip().partition("\n")[0]
    BRIDGED[name] = line.replace("`", "").rstrip(".")


class _Metric(Metric):
    def __init__(self, **kwargs: Any):
        kwargs.pop("compute_on_step", None)
        super().__init__(**kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> None:
        self.update(*args, **kwargs)


def bridge_knn(cls: Any) -> Any:
    """The online kNN asks torchmetrics for ``compute_on_step``, which version 1 no longer has."""
    if Metric in cls.__bases__:
        cls.__bases__ = (_Metric,)
    return cls
