"""The base of a method of one's own on solo-learn 1.0.2, which refuses unknown keywords."""

import difflib
import functools
import inspect
from argparse import ArgumentParser
from typing import Any

import pytorch_lightning as pl
from solo.args.dataset import augmentations_args, custom_dataset_args, dataset_args
from solo.methods.base import BaseMethod, BaseMomentumMethod
from solo.utils.auto_resumer import AutoResumer
from solo.utils.checkpointer import Checkpointer
from torch import Tensor, nn

from metamask_solo.errors import UserError
from metamask_solo.validation import Settings, validated

# what main_pretrain.py adds to what was given on its command line, and flags of older Lightnings
DERIVED = {
    "method",
    "unique_augs",
    "transform_kwargs",
    "num_classes",
    "backbone_args",
    "extra_optimizer_args",
    "num_large_crops",
    "num_small_crops",
    "gpus",
    "resume_from_checkpoint",
    "save_checkpoint",
    "auto_umap",
    "auto_resume",
}


class PluginMethod(BaseMethod):
    """Base of a method that brings settings of its own; see protocol.py."""

    settings_model: type[Settings]

    def __init__(self, **kwargs: Any):
        names = list(self.settings_model.model_fields)
        own = {name: kwargs.pop(name) for name in names if name in kwargs}
        for name in kwargs.keys() - _known_keywords():  # the base class would take any
            close = difflib.get_close_matches(name, [*names, *_base_keywords()], n=1)
            listed = ", ".join(names)
            hint = f"did you mean {close[0]}?" if close else f"this method's own are {listed}"
            raise UserError(f"{name}={kwargs[name]!r}: unknown setting; {hint}")
        super().__init__(**kwargs)
        self.settings = validated(self.settings_model, own)
        self.optimizer_name = "lars" if self.lars else self.optimizer

    @property
    def backbone(self) -> nn.Module:
        return self.encoder

    def base_forward(self, X: Tensor) -> dict[str, Any]:
        """What the shared steps of this release call; GitHub main's call ``forward``."""
        return self.forward(X)

    def to_memory_format(self, images: Tensor) -> Tensor:
        return images


def _base_keywords() -> set[str]:
    return set(inspect.signature(BaseMethod.__init__).parameters) - {"self", "kwargs"}


@functools.cache
def _known_keywords() -> set[str]:
    """What this release's main_pretrain.py passes to every method, needed or not."""
    parser = ArgumentParser(conflict_handler="resolve")
    for add in (
        dataset_args,
        augmentations_args,
        custom_dataset_args,
        BaseMomentumMethod.add_model_specific_args,
        Checkpointer.add_checkpointer_args,
        AutoResumer.add_autoresumer_args,
    ):
        add(parser)
    given = {action.dest for action in parser._actions}
    return (
        given | _base_keywords() | set(inspect.signature(pl.Trainer.__init__).parameters) | DERIVED
    )
