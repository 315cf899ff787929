"""Nearest-neighbour accuracy of features: the weighted vote of solo-learn, in bounded memory."""

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from metamask_solo.errors import UserError
from metamask_solo.evaluation.features import check_features, percent

# of every kNN here but the official protocol's (k = 5, temperature 1)
DEFAULT_K, DEFAULT_TEMPERATURE = 20, 0.07
DISTANCES = ("cosine", "euclidean")
LOWEST_TEMPERATURE = 1 / 700
EPSILON = 1e-5  # solo-learn's, in the Euclidean weight
LEAST_SPREAD = 1e-3  # of directions; below it, single precision blurs which is nearest
MOST_AT_ONCE = 4_000_000  # similarities or votes


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    k: int = DEFAULT_K,
    distance: str = "cosine",
    temperature: float = DEFAULT_TEMPERATURE,
) -> tuple[float, float]:
    """Top-1 and top-5 accuracy in percent of the vote of :func:`knn_hits`."""
    top1, top5 = knn_hits(
        train_features, train_labels, val_features, val_labels, k, distance, temperature
    )
    return percent(top1), percent(top5)


def knn_hits(
    train_features: Tensor,
    train_labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    k: int = DEFAULT_K,
    distance: str = "cosine",
    temperature: float = DEFAULT_TEMPERATURE,
) -> tuple[Tensor, Tensor]:
    """Which validation images a weighted vote of their nearest training images gets right.

    A neighbour's weight is exp(similarity / temperature) with the cosine distance, and one over
    the distance with the Euclidean one. Runs where the features are, in blocks of validation
    images; beside the features it holds a few times ``MOST_AT_ONCE`` numbers, however many classes,
    neighbours and images there are.

    Args:
        train_features: shape (N, D).
        train_labels: shape (N,), integers.
        val_features: shape (M, D).
        val_labels: shape (M,); a class without training images is never right.
        k: number of neighbours; all N where there are fewer.
        distance: ``cosine`` or ``euclidean``.
        temperature: at least 1/700; used with the cosine distance only.

    Returns:
        Whether the first guess is right, and whether one of the first five is; both booleans of
        shape (M,). With fewer than five neighbours or classes there are as many guesses as these.

    Raises:
        UserError: a setting is not allowed, a feature is not finite, or features and labels do
            not fit each other.
    """
    check_settings(k, distance, temperature)
    check_features(train_features, train_labels, val_features, val_labels)
    cosine = distance == "cosine"
    train, val = (_directions if cosine else _centred)(train_features, val_features)
    classes, labels = torch.cat((train_labels, val_labels)).unique(return_inverse=True)
    train_labels, val_labels = labels[: len(train)], labels[len(train) :]
    trained = torch.zeros_like(classes, dtype=torch.bool).index_fill_(0, train_labels, True)
    k, guesses = min(k, len(train)), min(5, k, len(train), len(classes))
    block = max(1, MOST_AT_ONCE // max(len(train), len(classes)))
    hits = []
    for features, truth in zip(val.split(block), val_labels.split(block), strict=True):
        similarity = features @ train.T if cosine else -torch.cdist(features, train)
        votes = vote(similarity, train_labels, k, temperature if cosine else None, len(classes))
        # stable: classes with equal votes in their own order, on every device
        order = votes.argsort(dim=1, descending=True, stable=True)[:, :guesses]
        # classes without votes fill up the guesses; one that no training image has is none
        hits.append((order == truth.unsqueeze(1)) & trained[order])
    right = torch.cat(hits)
    return right[:, 0], right.any(dim=1)


def vote(
    similarity: Tensor, labels: Tensor, k: int, temperature: float | None, classes: int
) -> Tensor:
    """The weighted votes of the k most similar training images, in double precision.

    Args:
        similarity: cosines, or distances with a minus sign; shape (M, N).
        labels: of the training images, integers from 0; shape (N,).
        k: number of neighbours, at most N.
        temperature: of cosines; None for distances.
        classes: number of classes.

    Returns:
        Shape (M, classes); with cosines, relative to the weight of the nearest.
    """
    nearest, neighbours = similarity.topk(k)
    if temperature is None:
        weights = 1 / (EPSILON - nearest.double())
    else:
        exponents = nearest.double() / temperature
        # only the proportions of the weights count, and so none is infinite
        weights = (exponents - exponents[:, :1]).exp()
    votes = weights.new_zeros(len(similarity), classes)
    return votes.scatter_add_(1, labels[neighbours], weights)


def _directions(train: Tensor, val: Tensor) -> tuple[Tensor, Tensor]:
    """Features of length 1, however small or large they were."""
    train, val = _moderate(train), _moderate(val)
    directions = normalize(train)
    # where all point the same way, single precision does not tell their cosines apart
    if train.dtype != torch.float64 and 1 - directions.mean(0).square().sum() < LEAST_SPREAD:
        return normalize(train.double()), normalize(val.double())
    return directions, normalize(val)


def _centred(train: Tensor, val: Tensor) -> tuple[Tensor, Tensor]:
    """Features seen from the mean of the training images, in double precision.

    The distances are computed from products, which must not be large beside the distances.
    """
    mean = train.double().mean(0)
    return train.double() - mean, val.double() - mean


def _moderate(features: Tensor) -> Tensor:
    """Rows whose squares would be no numbers of this precision, divided by their largest entry."""
    largest = features.abs().amax(1, keepdim=True)
    usual = (largest == 0) | ((largest > 1e-10) & (largest < 1e15))
    return features if usual.all() else features / largest.masked_fill(usual, 1.0)


def check_settings(k: int, distance: str, temperature: float | None) -> None:
    """Raises UserError unless :func:`knn_hits` takes these settings."""
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise UserError(f"k={k}: must be an integer of at least 1")
    if distance not in DISTANCES:
        raise UserError(f"distance={distance}: allowed are {', '.join(DISTANCES)}")
    if distance != "cosine":
        return
    if temperature is None or not LOWEST_TEMPERATURE <= temperature < math.inf:
        raise UserError(
            f"temperature={temperature}: must be a number of at least {LOWEST_TEMPERATURE:.2g}"
        )
