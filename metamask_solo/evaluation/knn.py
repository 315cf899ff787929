"""Nearest-neighbour accuracy of features, through solo-learn's own weighted kNN."""

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from metamask_solo.errors import UserError
from metamask_solo.hosts import WeightedKNNClassifier

DISTANCES = ("cosine", "euclidean")
# below it exp(similarity / temperature) exceeds single precision
LOWEST_SINGLE_TEMPERATURE = 1 / 80
LOWEST_TEMPERATURE = 1 / 700


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    k: int = 20,
    distance: str = "cosine",
    temperature: float = 0.07,
) -> tuple[float, float]:
    """Accuracy of a weighted vote of the nearest training images.

    A neighbour's weight is exp(similarity / temperature) with the cosine distance, and one over
    the distance with the Euclidean one. Runs where the features are.

    Args:
        train_features: shape (N, D).
        train_labels: shape (N,), integers.
        val_features: shape (M, D).
        val_labels: shape (M,); every class of the training images occurs.
        k: number of neighbours; all N where there are fewer.
        distance: ``cosine`` or ``euclidean``.
        temperature: at least 1/700; used with the cosine distance only.

    Returns:
        Top-1 and top-5 accuracy in percent. With fewer than five neighbours or classes, top-5
        takes as many guesses as there are.

    Raises:
        UserError: a setting is not allowed, a feature is not finite, or a class of the training
            images has no validation image.
    """
    check_settings(k, distance, temperature)
    for split, features in (("train", train_features), ("val", val_features)):
        if not features.isfinite().all():
            raise UserError(f"{split} features: some are not finite")
    if distance == "cosine":
        if temperature < LOWEST_SINGLE_TEMPERATURE:
            train_features, val_features = train_features.double(), val_features.double()
        # solo-learn 1.0.2 takes the plain dot product for it
        train_features, val_features = normalize(train_features), normalize(val_features)
    train_labels, val_labels = _consecutive(train_labels, val_labels)
    knn = WeightedKNNClassifier(k=k, T=temperature, distance_fx=distance)
    knn.update(train_features, train_labels, val_features, val_labels)
    top1, top5 = knn.compute()
    return float(top1), float(top5)


def check_settings(k: int, distance: str, temperature: float | None) -> None:
    """Raises UserError unless :func:`knn_accuracy` takes these settings."""
    if k < 1:
        raise UserError(f"k={k}: must be at least 1")
    if distance not in DISTANCES:
        raise UserError(f"distance={distance}: allowed are {', '.join(DISTANCES)}")
    if distance != "cosine":
        return
    if temperature is None or not LOWEST_TEMPERATURE <= temperature < math.inf:
        raise UserError(
            f"temperature={temperature}: must be a number of at least {LOWEST_TEMPERATURE:.2g}"
        )


def _consecutive(train: Tensor, val: Tensor) -> tuple[Tensor, Tensor]:
    """Labels 0, 1, …: solo-learn counts the classes of the validation images alone."""
    classes = torch.unique(val)
    missing = sorted(set(train.tolist()) - set(classes.tolist()))
    if missing:
        raise UserError(f"class {missing[0]}: has training images, but no validation image")
    return torch.searchsorted(classes, train), torch.searchsorted(classes, val)
