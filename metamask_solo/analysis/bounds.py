"""The bracket that the contrastive loss puts around the downstream cross-entropy.

Wang et al., ICLR 2022 (arXiv 2203.13457), theorem 4.2; theorems 5.1 and 5.2 of MetaMask build on
it. It holds for unit-norm features, temperature 1, and positives that share their label.
"""

import math
from dataclasses import dataclass, field

import numpy as np
from scipy.special import logsumexp

from metamask_solo.analysis.measures import Array, IntArray, blocks, one_hot


@dataclass(frozen=True)
class Bracket:
    """Terms and sides of L_con − √V − V/2 − log(K/C) ≤ L_CE ≤ L_con + √V − log(K/C).

    All but the two counts and V (squared length, 0 to 1) are in nats. ``inside`` says whether the
    cross-entropy lies between both sides, up to rounding.
    """

    contrastive_loss: float
    intra_class_variance: float
    classes: int
    negatives: int
    cross_entropy: float
    lower: float
    upper: float
    width: float
    inside: bool = field(init=False)

    def __post_init__(self) -> None:
        rounding = 1e-9  # both sides coincide when V = 0
        inside = self.lower - rounding <= self.cross_entropy <= self.upper + rounding
        object.__setattr__(self, "inside", inside)


def bracket(features: Array, labels: IntArray, positives: Array | None = None) -> Bracket:
    """Computes both sides of the bracket, and the cross-entropy that should lie between them.

    Every expectation is taken over the given images, each as likely as any other, so nothing is
    estimated and the theorem's O(K^-1/2) term is absent:

    - the embeddings are ``features`` and, where given, ``positives``, scaled to length 1;
    - the negatives of an embedding are all K embeddings, itself included, as K independent draws
      would have it;
    - the positive is the other view of the same image where ``positives`` are given. Without them
      it is any image of the same class, itself included, and the loss is the exact mean over
      all of these. In both cases the pair shares its label, which is what the theorem assumes;
    - the mean classifier scores an embedding by its inner product with each class mean.

    In this form the upper side holds exactly (Jensen's inequality, and a covariance of the pairs
    within ± V ≤ √V); the lower side rests on the theorem's bound V/2 of the gap in that
    inequality.

    Args:
        features: shape (N, D).
        labels: shape (N,), 0 to C − 1, each as often as the others (the theorem's log(K/C) is for
            classes of equal size).
        positives: shape (N, D), or None.

    Raises:
        ValueError: the classes are not of equal size, or an embedding is zero.
    """
    sizes = np.bincount(labels)
    if len(set(sizes.tolist())) != 1:
        raise ValueError(f"classes of {sizes.min()} to {sizes.max()} images: must be of equal size")
    classes, pairs = len(sizes), len(features)
    unit = _unit(features)
    if positives is not None:
        unit = np.concatenate([unit, _unit(positives)])
        labels = np.concatenate([labels, labels])
    negatives = len(unit)

    means = one_hot(labels, classes).T @ unit * (classes / negatives)
    scores = unit @ means.T
    own_score = scores[np.arange(negatives), labels]
    cross_entropy = float(np.mean(logsumexp(scores, axis=1) - own_score))
    variance = float(np.mean(np.sum((unit - means[labels]) ** 2, axis=1)))
    if positives is None:
        alignment = float(own_score.mean())
    else:
        alignment = float(np.mean(np.sum(unit[:pairs] * unit[pairs:], axis=1)))
    spread = sum(
        float(logsumexp(unit[rows] @ unit.T, axis=1).sum()) for rows in blocks(negatives, negatives)
    )
    contrastive_loss = spread / negatives - alignment

    centre = contrastive_loss - math.log(negatives / classes)
    lower = centre - math.sqrt(variance) - variance / 2
    upper = centre + math.sqrt(variance)
    return Bracket(
        contrastive_loss=contrastive_loss,
        intra_class_variance=variance,
        classes=classes,
        negatives=negatives,
        cross_entropy=cross_entropy,
        lower=lower,
        upper=upper,
        width=2 * math.sqrt(variance) + variance / 2,
    )


def balanced_indices(labels: IntArray, limit: int, rng: np.random.Generator) -> IntArray:
    """Draws the same number of images from each class, at most ``limit`` in all.

    Returns:
        Sorted indices into ``labels``.
    """
    classes = int(labels.max()) + 1
    each = min(int(np.bincount(labels, minlength=classes).min()), max(1, limit // classes))
    chosen = [
        rng.choice(np.flatnonzero(labels == label), each, replace=False) for label in range(classes)
    ]
    return np.sort(np.concatenate(chosen))


def _unit(features: Array) -> Array:
    features = features.astype(np.float64)
    length = np.linalg.norm(features, axis=1, keepdims=True)
    if np.any(length == 0):
        raise ValueError("an image has features that are all zero: it has no direction")
    return features / length
