"""Nearest-neighbour accuracy of features: the weighted vote of solo-learn, in bounded memory."""

from typing import Literal

import torch
from torch import Tensor

from metamask_solo.evaluation.features import check_finite

# of every kNN here but the official protocol's (k = 5, temperature 1)
DEFAULT_K, DEFAULT_TEMPERATURE = 20, 0.07
EPSILON = 1e-5  # solo-learn's, in the Euclidean weight
LEAST_SPREAD = 1e-3  # of directions; below it, single precision blurs which is nearest
MOST_AT_ONCE = 4_000_000  # similarities or votes


def knn_hits(
    train_features: Tensor,
    train_labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    k: int = DEFAULT_K,
    distance: Literal["cosine", "euclidean"] = "cosine",
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
        k: number of neighbours, at least 1; all N where there are fewer.
        temperature: above 0; used with the cosine distance only.

    Returns:
        Whether the first guess is right, and whether one of the first five is; both booleans of
        shape (M,). With fewer than five neighbours or classes there are as many guesses as these.

    Raises:
        NotFinite: a feature is not finite.
    """
    check_finite(train=train_features, val=val_features)
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
        # only the proportions of the weights count, and so none is infinite
        weights = ((nearest.double() - nearest[:, :1].double()) / temperature).exp()
    votes = weights.new_zeros(len(similarity), classes)
    return votes.scatter_add_(1, labels[neighbours], weights)


def _directions(train: Tensor, val: Tensor) -> tuple[Tensor, Tensor]:
    """Features of length 1, however small or large they were."""
    directions = _unit(train)
    # where all point the same way, single precision does not tell their cosines apart
    if train.dtype != torch.float64 and 1 - directions.mean(0).square().sum() < LEAST_SPREAD:
        return _unit(train.double()), _unit(val.double())
    return directions, _unit(val)


def _unit(features: Tensor) -> Tensor:
    lengths = torch.linalg.vector_norm(features, dim=1, keepdim=True, dtype=torch.float64)
    lengths = lengths.clamp_min(torch.finfo(features.dtype).tiny).to(features.dtype)
    return features / lengths


def _centred(train: Tensor, val: Tensor) -> tuple[Tensor, Tensor]:
    """Features seen from the mean of the training images, in double precision.

    The distances are computed from products, which must not be large beside the distances.
    """
    mean = train.double().mean(0)
    return train.double() - mean, val.double() - mean
