"""Nearest-neighbour accuracy of features: the weighted vote of solo-learn, in bounded memory."""

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from metamask_solo.errors import UserError

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
    """Accuracy of a weighted vote of the nearest training images.

    A neighbour's weight is exp(similarity / temperature) with the cosine distance, and one over
    the distance with the Euclidean one. Runs where the features are, in blocks of validation
    images; beside the features it holds a few times ``MOST_AT_ONCE`` numbers, however many classes,
    neighbours and images there are.

    Args:
        train_features: shape (N, D).
        train_labels: shape (N,), integers.
        val_features: shape (M, D).
        val_labels: shape (M,); a class without training images is never found.
        k: number of neighbours; all N where there are fewer.
        distance: ``cosine`` or ``euclidean``.
        temperature: at least 1/700; used with the cosine distance only.

    Returns:
        Top-1 and top-5 accuracy in percent. With fewer than five neighbours or classes, top-5
        takes as many guesses as there are.

    Raises:
        UserError: a setting is not allowed, a feature is not finite, or features and labels do
            not fit each other.
    """
    check_settings(k, distance, temperature)
    check_features(train_features, train_labels, val_features, val_labels)
    prepare = _directions if distance == "cosine" else _places
    train_features, val_features = prepare(train_features, val_features)
    classes, labels = torch.cat((train_labels, val_labels)).unique(return_inverse=True)
    train_labels, val_labels = labels[: len(train_labels)], labels[len(train_labels) :]
    trained = torch.zeros_like(classes, dtype=torch.bool).index_fill_(0, train_labels, True)
    k, guesses = min(k, len(train_labels)), min(5, k, len(classes))
    block = max(1, MOST_AT_ONCE // max(len(train_labels), len(classes)))
    top1 = top5 = 0
    for features, truth in zip(val_features.split(block), val_labels.split(block), strict=True):
        near, weights = _neighbours(features, train_features, k, distance, temperature)
        votes = weights.new_zeros(len(features), len(classes))
        votes.scatter_add_(1, train_labels[near], weights)
        # stable: classes with equal votes in their own order, on every device
        order = votes.argsort(dim=1, descending=True, stable=True)[:, :guesses]
        # classes without votes fill up the guesses; one that no training image has is none
        found = (order == truth.unsqueeze(1)) & trained[order]
        top1 += int(found[:, 0].sum())
        top5 += int(found.sum())
    return 100.0 * top1 / len(val_labels), 100.0 * top5 / len(val_labels)


def _directions(train: Tensor, val: Tensor) -> tuple[Tensor, Tensor]:
    """Features of length 1, however small or large they were."""
    train, val = _moderate(train), _moderate(val)
    directions = normalize(train)
    # where all point the same way, single precision does not tell their cosines apart
    if train.dtype != torch.float64 and 1 - directions.mean(0).square().sum() < LEAST_SPREAD:
        return normalize(train.double()), normalize(val.double())
    return directions, normalize(val)


def _places(train: Tensor, val: Tensor) -> tuple[Tensor, Tensor]:
    """Features seen from the middle of the training images, in double precision.

    The distances are computed from products, which must not be large beside the distances.
    """
    middle = train.double().mean(0)
    return train.double() - middle, val.double() - middle


def _moderate(features: Tensor) -> Tensor:
    """Rows whose squares would be no numbers of this precision, divided by their largest entry."""
    largest = features.abs().amax(1, keepdim=True)
    usual = (largest == 0) | ((largest > 1e-10) & (largest < 1e15))
    return features if usual.all() else features / largest.masked_fill(usual, 1.0)


def _neighbours(
    features: Tensor, bank: Tensor, k: int, distance: str, temperature: float
) -> tuple[Tensor, Tensor]:
    """The k nearest of a bank and their weights in double precision, both block × k."""
    if distance == "euclidean":
        far, near = torch.cdist(features, bank).topk(k, largest=False)
        return near, 1 / (far.double() + EPSILON)
    similarity, near = (features @ bank.T).topk(k)
    exponents = similarity.double() / temperature
    # relative to the nearest: only the proportions of the weights count, and none is infinite
    return near, (exponents - exponents[:, :1]).exp()


def check_features(
    train_features: Tensor, train_labels: Tensor, val_features: Tensor, val_labels: Tensor
) -> None:
    """Raises UserError unless these are finite features of one size, each with its label."""
    for split, features, labels in (
        ("train", train_features, train_labels),
        ("val", val_features, val_labels),
    ):
        if features.dim() != 2 or not features.is_floating_point() or not len(features):
            raise UserError(
                f"{split} features: {features.dtype} of shape {tuple(features.shape)}; must be "
                "floating-point numbers, N × D, of one image at least"
            )
        if labels.shape != features.shape[:1] or labels.is_floating_point():
            raise UserError(
                f"{split} labels: {labels.dtype} of shape {tuple(labels.shape)}; must be "
                f"{len(features)} integers, one for each of the {split} features"
            )
        if not features.isfinite().all():
            raise UserError(f"{split} features: some are not finite")
    if train_features.shape[1] != val_features.shape[1]:
        raise UserError(
            f"val features: of size {val_features.shape[1]}; must be of that of the train "
            f"features, {train_features.shape[1]}"
        )
    if train_features.dtype != val_features.dtype:
        raise UserError(
            f"val features: {val_features.dtype}; must be {train_features.dtype}, as the train "
            "features are"
        )


def check_settings(k: int, distance: str, temperature: float | None) -> None:
    """Raises UserError unless :func:`knn_accuracy` takes these settings."""
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
