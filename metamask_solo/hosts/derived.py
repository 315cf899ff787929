"""Subclasses that are made for one run, of classes of solo-learn that stay as they are."""

import functools
from collections.abc import Callable
from typing import Any

from torchmetrics.metric import Metric

# how the names begin of what solo-learn logs of labels
OF_LABELS = (
    "train_class_loss",
    "train_acc",
    "train_momentum_",
    "train_nn_acc",
    "val_",
    "momentum_",
)


def derive(make: Callable[[Any], type], cls: Any, members: dict[str, Any], *mixins: type) -> type:
    """A subclass under the name of its base, whose instances another process can unpickle.

    Args:
        make: the function of one class that calls this, cached, found again by its name.
        cls: the base.
        members: attributes and methods of the subclass.
        mixins: classes that come before the base.
    """
    rebuilt = {"__reduce__": lambda self: (_blank, (make, cls), self.__dict__)}
    return type(cls.__name__, (*mixins, cls), {"__module__": __name__, **members, **rebuilt})


def _blank(make: Callable[[Any], Any], cls: type) -> Any:
    return object.__new__(make(cls))


@functools.cache
def without_label_metrics(cls: Any) -> type:
    """A method that logs nothing of labels: for images of which some have none."""

    def log_dict(self: Any, dictionary: Any, *args: Any, **kwargs: Any) -> None:
        rest = {k: v for k, v in dictionary.items() if not k.startswith(OF_LABELS)}
        super(derived, self).log_dict(rest, *args, **kwargs)

    derived: Any = derive(without_label_metrics, cls, {"log_dict": log_dict})
    return derived


class UpdatingMetric(Metric):
    """Base for solo-learn's online kNN, which asks for what torchmetrics 1 no longer has.

    That was ``compute_on_step=False``: a call updates, and computes nothing.
    """

    def __init__(self, compute_on_step: bool = False, **kwargs: Any):
        super().__init__(**kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> None:
        self.update(*args, **kwargs)
