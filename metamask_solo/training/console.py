"""Keeps from the terminal what a user cannot act on."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# a user can do nothing about these: they are of the libraries, or of how this package uses them
OF_NO_USE = (
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*LeafSpec.*deprecated.*",
    r".*`torch\.jit\.(script|interface|isinstance)`.*",
    r".*Found \d+ module\(s\) in eval mode.*",
    r".*weights_only.*",
    r".*Total length of `DataLoader` across ranks is zero.*",
    r".*The number of training batches .* is smaller than the logging interval.*",
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*FLOP.*",
    r".*lr_scheduler\.step\(\)` before `optimizer\.step\(\).*",
    r".*Importing from timm.*",
    r".*`torch\.cuda\.amp.*",
    r".*Experiment logs directory .* exists and is not empty.*",
)
LOGGED_OF_NO_USE: tuple[str, ...] = (
    "Tip:",
    "litlogger",
    "litmodels",
    "FLOP",
    "GPU available",
    "TPU available",
)
LOGGED_OF_NO_USE += ("HPU available", "IPU available", "`Trainer.fit` stopped:", "weights_only")


class _Useful(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(text in message for text in LOGGED_OF_NO_USE)


@contextmanager
def quiet() -> Iterator[None]:
    """Leaves out warnings and tips that a user cannot act on; all others are shown."""
    useful = _Useful()
    names = [
        name
        for name in list(logging.root.manager.loggerDict)
        if name.startswith(("lightning", "pytorch_lightning"))
    ]
    loggers = [logging.getLogger(name) for name in names]
    for logger in loggers:
        logger.addFilter(useful)
    try:
        with warnings.catch_warnings():
            for message in OF_NO_USE:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(useful)
