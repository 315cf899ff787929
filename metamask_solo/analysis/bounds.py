"""The bounds that the contrastive loss sets to the downstream cross-entropy.

Wang et al., ICLR 2022 (arXiv 2203.13457), theorem 4.2, on which MetaMask's theorems 5.1 and 5.2
build. It holds for unit-norm features, temperature 1, and positives that share their label.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp

from metamask_solo.analysis.measures import Array, IntArray, blocks


@dataclass(frozen=True)
class Bounds:
    """Terms and sides of L_con − √V − V/2 − log(K/C) ≤ L_CE ≤ L_con + √V − log(K/C).

    In nats, but for V (squared length, 0 to 1), C classes and K negatives. ``inside`` says whether
    the cross-entropy lies between both sides, up to rounding.
    """

    contrastive_loss: float
    intra_class_variance: float
    classes: int
    negatives: int
    cross_entropy: float
    lower: float
    upper: float
    width: float
    inside: bool


def bounds(features: Array, labels: IntArray, positives: Array | None = None) -> Bounds:
    """Computes both bounds, and the cross-entropy of the class means that should lie between them.

    Every expectation is the exact mean over the N embeddings (2 N with ``positives``), scaled to
    length 1, so the theorem's O(K^-1/2) term is absent. All of them are the negatives of each. The
    positive is the other view of the image in ``positives``, or else any image of its class. The
    upper bound then holds exactly (Jensen's inequality, and a covariance of the pairs within
    ± V ≤ √V), the lower one rests on the theorem's bound V/2 of the gap in that inequality.

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
        raise ValueError("the classes are not of equal size")
    classes, pairs = len(sizes), len(features)
    unit = features.astype(np.float64)
    if positives is not None:
        unit, labels = np.concatenate([unit, positives]), np.concatenate([labels, labels])
    length = np.linalg.norm(unit, axis=1, keepdims=True)
    if np.any(length == 0):
        raise ValueError("an image has features that are all zero, and so no direction")
    unit, negatives = unit / length, len(unit)

    means = np.eye(classes)[labels].T @ unit * (classes / negatives)
    scores = unit @ means.T
    true_score = scores[np.arange(negatives), labels]
    aligned = true_score if positives is None else np.sum(unit[:pairs] * unit[pairs:], axis=1)
    spread = [logsumexp(unit[rows] @ unit.T, axis=1) for rows in blocks(negatives, negatives)]
    loss = float(np.mean(np.concatenate(spread)) - np.mean(aligned))
    cross_entropy = float(np.mean(logsumexp(scores, axis=1) - true_score))
    v = float(np.mean(np.sum((unit - means[labels]) ** 2, axis=1)))
    centre = loss - math.log(negatives / classes)
    lower, upper = centre - math.sqrt(v) - v / 2, centre + math.sqrt(v)
    inside = lower - 1e-9 <= cross_entropy <= upper + 1e-9  # both sides coincide when V = 0
    width = 2 * math.sqrt(v) + v / 2
    return Bounds(loss, v, classes, negatives, cross_entropy, lower, upper, width, inside)


def balanced_indices(labels: IntArray, limit: int, seed: int) -> IntArray:
    """Draws as many images of each class, at most ``limit`` in all; sorted, of 2 a class at least.

    Without two images of each class there are none.
    """
    sizes, rng = np.bincount(labels), np.random.default_rng(seed)
    each = min(int(sizes.min()), max(2, limit // len(sizes)))
    if each < 2:
        return np.zeros(0, dtype=int)
    classes = [np.flatnonzero(labels == label) for label in range(len(sizes))]
    return np.sort(np.concatenate([rng.choice(images, each, replace=False) for images in classes]))
