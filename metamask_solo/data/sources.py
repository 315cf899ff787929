"""Data sets of this package: where images come from, and what is made of them.

All classes are at module level and hold nothing that cannot be pickled, so loaders may start their
workers in any way. Imports no solo-learn, so that such workers start quickly.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

from PIL import Image
from torch.utils.data import Dataset

from metamask_solo.data.folders import Found
from metamask_solo.data.reading import ReadingRule, read_image, shown
from metamask_solo.data.seeds import Draw, start_at, states_kept
from metamask_solo.errors import UserError


class Source(Protocol):
    """Images with labels, before any transform."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Raises UserError, which names the image, where it cannot be read."""

    def name(self, index: int) -> str:
        """What to call an image in an error."""

    def labels(self) -> list[int]:
        """All labels, without reading an image."""


class FolderSource:
    """The images of a folder, as :func:`metamask_solo.data.folders.find_images` finds them."""

    def __init__(self, found: Found, rule: ReadingRule):
        self.samples = found.samples
        self.classes = found.classes
        self.rule = rule

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return read_image(path, self.rule), label

    def name(self, index: int) -> str:
        return shown(self.samples[index][0])

    def labels(self) -> list[int]:
        return [label for _, label in self.samples]


class PackedSource:
    """One of torchvision's data sets, which keep all images in memory, without its transform."""

    def __init__(self, dataset: Any, title: str):
        self.dataset = dataset
        self.title = title
        self.classes = list(getattr(dataset, "classes", []))

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple[Image.Image, int]:
        try:
            image, label = self.dataset[index]
        except Exception as error:
            raise UserError(f"{self.name(index)}: cannot be read ({error})") from error
        return image, int(label)

    def name(self, index: int) -> str:
        return f"{self.title}, image {index}"

    def labels(self) -> list[int]:
        labels = getattr(self.dataset, "targets", None)
        labels = self.dataset.labels if labels is None else labels
        return [int(label) for label in labels]


class Images(Dataset[Any]):
    """Transformed images of a source: (image, label), or (index, views, label) for pretraining.

    An item is asked for by its index, or by its index and a seed: then the transform draws what
    that seed gives, whatever process or worker it runs in, and the process's own random numbers
    stay as they were.

    Attributes:
        samples: paths and labels of the images of a folder; missing for others.
        classes: the names of the classes.

    Raises:
        UserError: on access: names the image that cannot be read or transformed.
    """

    def __init__(
        self,
        source: Any,
        transform: Callable[..., Any],
        with_index: bool = False,
        chosen: Sequence[int] | None = None,
    ):
        self.source = source
        self.transform = transform
        self.with_index = with_index
        self.chosen = None if chosen is None else list(chosen)
        self.classes = list(getattr(source, "classes", []))
        samples = getattr(source, "samples", None)
        if samples is not None:
            self.samples = samples if chosen is None else [samples[i] for i in chosen]

    def __len__(self) -> int:
        return len(self.source) if self.chosen is None else len(self.chosen)

    @property
    def targets(self) -> list[int]:
        """All labels."""
        labels = self.source.labels()
        return labels if self.chosen is None else [labels[i] for i in self.chosen]

    def __getitem__(self, key: int | Draw) -> Any:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[int | Draw]) -> list[Any]:
        """A batch at once: the random states are kept and put back once, not for each image."""
        seeded = any(isinstance(key, tuple) for key in keys)
        with states_kept() if seeded else nullcontext():
            return [self._item(key) for key in keys]

    def _item(self, key: int | Draw) -> Any:
        index, seed = key if isinstance(key, tuple) else (int(key), None)
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        place = index if self.chosen is None else self.chosen[index]
        image, label = self.source.read(place)
        if seed is not None:
            start_at(seed)
        try:
            made = self.transform(image)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(
                f"{self.source.name(place)}: was read, but its transform failed ({reason})"
            ) from error
        # the classifier on the way, which logs nothing then, takes no −1
        return (index, made, max(label, 0)) if self.with_index else (made, label)
