"""From a checkpoint and images to features, and what can be said of features alone."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from metamask_solo.checkpoints.reading import Checkpoint, load_backbone, load_projector
from metamask_solo.data.datasets import holds_split, read_folder, say
from metamask_solo.data.loaders import (
    compare_splits,
    has_labels,
    images_of,
    is_folder,
    loader_failure,
    plain_loader,
)
from metamask_solo.data.read_image import reading_rule
from metamask_solo.data.transforms import evaluation_transform
from metamask_solo.errors import UserError

NEARLY_THE_SAME = 1e-5  # root mean square about the mean, of that of the features
AT_ONCE = 2**22  # numbers that are converted to double precision


class NotFinite(UserError):
    """Features that hold NaN or infinity, as those of a run that diverged."""


class FeatureReader:
    """A checkpoint's network, and how the images for it are read.

    Attributes:
        module: from images to features, on ``device``.
        checkpoint: what was read.
        masked: whether the features are masked.
        kind: of the features, such as ``masked backbone features``.

    Args:
        checkpoint: checkpoint file or run folder, or what was read of it.
        features: ``backbone``, or ``projector`` for what the method's ``forward`` returns as ``z``.
        masked: True for masked features, False for plain ones, None for masked ones where the
            checkpoint has a mask.
        data: folder that holds train/ and val/, or images; None for the data of the run.
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        UserError: the checkpoint does not have such features, or there is no such device.
    """

    def __init__(
        self,
        checkpoint: str | Path | Checkpoint,
        features: str = "backbone",
        masked: bool | None = None,
        data: Path | None = None,
        batch_size: int = 256,
        num_workers: int = 2,
        device: str = "auto",
    ):
        self.device = pick_device(device)
        self._data, self._batches = data, (batch_size, num_workers)
        load = load_backbone if features == "backbone" else load_projector
        self.module, self.checkpoint = load(checkpoint, masked)
        has_mask = self.checkpoint.mask is not None or self.checkpoint.folded
        self.masked = has_mask and masked is not False
        self.kind = f"{'masked' if self.masked else 'plain'} {features} features"

    def loader(
        self, split: str, labels: bool | None = True, limit: int | None = None, seed: int = 0
    ) -> DataLoader[Any]:
        """The images of one split, with the evaluation transform of the run.

        Args:
            split: ``train`` or ``val``; ``loader.dataset.split`` says which was read, and is empty
                where the folder holds neither.
            labels: True for class folders, None for labels where ``data``, or else the run, has
                them, and False for none. Unless it is True, any folder of images is taken, and a
                run without validation images gives its training images for ``val``.
            limit: at most this many images, drawn by ``seed``; None for all.

        Raises:
            UserError: the data are missing or cannot be read.
        """
        cfg = self.checkpoint.config
        assert cfg is not None  # what loads the network needs it
        if self._data is not None:
            split = split if labels or holds_split(self._data, "--data", split) else ""
            images = read_folder(self._data / split, "--data", labels, reading_rule(cfg))
            say(*images.notes)
        else:
            if labels is None and not has_labels(cfg):
                labels = False
            if labels is not True and is_folder(cfg) and cfg.data.get(f"{split}_path") is None:
                split = "train"
            try:
                images = images_of(cfg, split, split, labels)  # all of them, as main_knn.py
            except UserError as error:
                raise UserError(f"{error}; give --data FOLDER") from error
        images = replace(images, transform=evaluation_transform(cfg), split=split)
        return plain_loader(images.limited(limit, seed), *self._batches)

    def loaders(
        self, limit: int | None = None, seed: int = 0
    ) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """Labelled training and validation images of the same classes."""
        train, val = (self.loader(split, True, limit, seed) for split in ("train", "val"))
        datasets: Any = train.dataset, val.dataset
        compare_splits(datasets[0], datasets[1], self.checkpoint.path.parent)
        return train, val

    def extract(self, loader: DataLoader[Any]) -> tuple[Tensor, Tensor]:
        """Features (N, D) and labels (N,) of a loader's images, on the CPU."""
        return extract_features(self.module, loader, self.device, str(self.checkpoint.path))


def pick_device(name: str) -> str:
    """``cuda`` or ``cpu`` for one of ``auto``, ``cpu`` and ``cuda``.

    Raises:
        UserError: there is no GPU that PyTorch can use.
    """
    available = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if available else "cpu"
    if name == "cuda" and not available:
        raise UserError("--device=cuda: this machine has no GPU that PyTorch can use")
    return name


def extract_features(
    module: nn.Module,
    loader: DataLoader[Any],
    device: str | torch.device = "cpu",
    label: str = "features",
) -> tuple[Tensor, Tensor]:
    """The batches of :func:`feature_batches` in one piece.

    Returns:
        Features, N × D in single precision, and labels, N integers; both on the CPU.
    """
    batches = zip(*feature_batches(module, loader, device, label), strict=True)
    features, labels = map(torch.cat, batches)
    say_collapse(features, label)
    return features, labels


@torch.no_grad()
def feature_batches(
    module: nn.Module,
    loader: DataLoader[Any],
    device: str | torch.device = "cpu",
    label: str = "features",
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features and labels of a data set, batch by batch, with a progress bar.

    Yields:
        Features in single precision, N × D, and labels, N integers; both on the CPU.

    Raises:
        NotFinite: a feature is NaN or infinite.
        UserError: an image cannot be read, or the GPU's memory is full.
    """
    module = module.to(device).eval()
    count = 0
    try:
        for images, labels in tqdm(loader, desc=label, leave=False):
            features = module(images.to(device)).float().cpu()
            count += len(features)
            if bad := int((~features.isfinite()).any(dim=1).sum()):
                raise NotFinite(
                    f"{label}: its features are not finite, for {bad} of the first {count} images; "
                    "the run diverged, or its numbers left the range of the precision"
                )
            yield features, labels
    except torch.OutOfMemoryError as error:
        raise UserError("the GPU's memory is full; lower --batch-size, or --device=cpu") from error
    except RuntimeError as error:
        if (failure := loader_failure(error)) is not None:
            raise failure from error
        raise


def _in_double(features: Tensor) -> Iterator[Tensor]:
    """The rows of (N, D) features in double precision, in blocks of bounded memory."""
    return (block.double() for block in features.split(max(1, AT_ONCE // features.shape[1])))


def is_collapsed(features: Tensor) -> bool:
    """Whether the features of all images, shape (N, D), are (nearly) the same.

    Their root mean square about their mean is then at most 1e-5 of their root mean square: what
    rounding in single precision leaves.
    """
    squares = sum(float(block.square().sum()) for block in _in_double(features))
    total = sum((block.sum(0) for block in _in_double(features)), torch.zeros(()))
    about_mean = squares - float(total.square().sum()) / len(features)
    return len(features) > 1 and about_mean <= NEARLY_THE_SAME**2 * squares


def say_collapse(features: Tensor, label: str) -> None:
    """A note where the features of all images are (nearly) the same."""
    if is_collapsed(features):
        say(f"{label}: all features are (nearly) the same; the representation has collapsed")


def second_moments(features: Tensor) -> Tensor:
    """The sum of h hᵀ over features of shape (N, D), in double precision: shape (D, D)."""
    return sum((block.T @ block for block in _in_double(features)), torch.zeros(()))


def effective_rank(second: Tensor) -> float:
    """RankMe from the sum, or the mean, of h hᵀ over the features, shape (D, D).

    exp of the entropy of σ / Σσ, with σ the singular values of the N × D features (Garrido et al.,
    ICML 2023, arXiv 2210.02885, equation 1): 1 to D, and 0 where all features are zero. That of
    masked features h ⊙ m is ``effective_rank(second * m * m[:, None])``.
    """
    eigenvalues = torch.linalg.eigvalsh(second.double().cpu())
    # the root of what is rounded away would count as directions
    rounding = len(eigenvalues) * torch.finfo(torch.float64).eps * eigenvalues[-1].clamp(min=0)
    singular = eigenvalues.where(eigenvalues > rounding, torch.zeros(())).sqrt()
    if singular.sum() <= 0:
        return 0.0
    return float(torch.special.entr(singular / singular.sum()).sum().exp())


def rankme(features: Tensor) -> float:
    """:func:`effective_rank` of features of shape (N, D)."""
    return effective_rank(second_moments(features))


def percent(correct: Tensor) -> float:
    """The share of true entries, in percent."""
    return 100.0 * int(correct.sum()) / len(correct)


def mean_over_classes(correct: Tensor, labels: Tensor) -> float:
    """The mean of the accuracies of the classes in percent; balanced accuracy.

    Args:
        correct: which images are right, shape (M,), booleans.
        labels: of these images, shape (M,), integers.
    """
    classes = labels.unique()
    return sum(percent(correct[labels == label]) for label in classes) / len(classes)


def imbalance_note(accuracy: float, train_labels: Tensor, val_labels: Tensor) -> str | None:
    """A line where classes are of unequal size and an accuracy says no more than that they are.

    Args:
        accuracy: in percent of the validation images.
        train_labels: shape (N,), integers.
        val_labels: shape (M,), integers.

    Returns:
        None where the accuracy is above that of always naming the largest class.
    """
    largest = percent(val_labels == train_labels.mode().values)
    unequal = len(val_labels.unique(return_counts=True)[1].unique()) > 1
    if not unequal or accuracy > largest:
        return None
    return (
        f"this accuracy ({accuracy:.2f} %) is not above that of always guessing the largest class "
        f"of the training images ({largest:.2f} %)"
    )


def check_finite(**splits: Tensor) -> None:
    """Raises NotFinite unless the features of each split are finite."""
    for split, features in splits.items():
        if not features.isfinite().all():
            raise NotFinite(f"{split} features: some are not finite")
