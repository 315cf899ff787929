"""The bounds that the contrastive loss sets to the downstream cross-entropy.

Wang et al., ICLR 2022 (arXiv 2203.13457), theorem 4.2, on which MetaMask's theorems 5.1 and 5.2
build. It holds for unit-norm features, temperature 1, and positives that share their label.
"""

import math

import numpy as np
from scipy.special import logsumexp

from metamask_solo.analysis.measures import Array, IntArray


def bounds(
    features: Array, labels: IntArray, limit: int = 2_000, seed: int = 0
) -> dict[str, float]:
    """Computes L_con − √V − V/2 − log(K/C) ≤ L_CE ≤ L_con + √V − log(K/C), with all its terms.

    L_CE is the cross-entropy of the classifier made of the class means. The theorem's log(K/C) is
    for classes of equal size, so as many images of each are drawn by ``seed``, ``limit`` in all at
    most. Every expectation is the exact mean over these K images, scaled to length 1, so the
    theorem's O(K^-1/2) term is absent. The positives of an image are all of its class, the
    negatives are all images. The upper bound then holds exactly (Jensen's inequality, and a
    covariance of the pairs within ± V ≤ √V), the lower one rests on the theorem's bound V/2 of the
    gap in that inequality.

    Args:
        features: shape (N, D).
        labels: shape (N,), 0 to C − 1.

    Returns:
        ``contrastive_loss`` L_con, ``cross_entropy`` L_CE, ``lower``, ``upper`` and ``width`` in
        nats, ``intra_class_variance`` V (0 to 1), ``classes`` C, ``negatives`` K, and ``inside``:
        whether L_CE lies between both bounds, up to rounding.

    Raises:
        ValueError: a class has fewer than two images, or an embedding is zero.
    """
    classes, rng = int(labels.max()) + 1, np.random.default_rng(seed)
    each = min(int(np.bincount(labels).min()), max(2, limit // classes))
    if each < 2:
        raise ValueError("a class has fewer than two images")
    images = [np.flatnonzero(labels == label) for label in range(classes)]
    drawn = np.sort(np.concatenate([rng.choice(one, each, replace=False) for one in images]))
    unit, labels, negatives = features[drawn].astype(np.float64), labels[drawn], len(drawn)
    length = np.linalg.norm(unit, axis=1, keepdims=True)
    if np.any(length == 0):
        raise ValueError("an image has features that are all zero, and so no direction")
    unit /= length

    means = np.eye(classes)[labels].T @ unit / each
    scores = unit @ means.T
    true_score = scores[np.arange(negatives), labels]
    loss = float(np.mean(logsumexp(unit @ unit.T, axis=1)) - np.mean(true_score))
    cross_entropy = float(np.mean(logsumexp(scores, axis=1) - true_score))
    v = float(np.mean(np.sum((unit - means[labels]) ** 2, axis=1)))
    centre = loss - math.log(negatives / classes)
    lower, upper = centre - math.sqrt(v) - v / 2, centre + math.sqrt(v)
    return {
        "contrastive_loss": loss,
        "intra_class_variance": v,
        "classes": classes,
        "negatives": negatives,
        "lower": lower,
        "cross_entropy": cross_entropy,
        "upper": upper,
        "width": upper - lower,
        "inside": lower - 1e-9 <= cross_entropy <= upper + 1e-9,  # both coincide when V = 0
    }
