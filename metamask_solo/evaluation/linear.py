"""The linear probe: logistic regression on frozen features that were computed once."""

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metamask_solo.data.datasets import say
from metamask_solo.errors import UserError
from metamask_solo.evaluation.features import check_finite

# the C of the penalty ‖W‖² / 2C, each ten times weaker than the one before
CS = (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
WEAKER_CS = (1e2, 1e3, 1e4)  # tried where the last of CS is the best
# of each class, one image in so many is held out to choose among them
HELD_OUT = 5
SEARCH_STEPS, FINAL_STEPS = 500, 2_000


def linear_probe(
    train_features: Tensor, train_labels: Tensor, val_features: Tensor, val_labels: Tensor
) -> tuple[Tensor, float]:
    """Logistic regression on features that are centred and divided by one number.

    That number is the root of their mean square over all images *and* dimensions. So the probe is
    blind to the scale of a whole network, which the methods do not share, but not to that of one
    dimension against another: with a small weight in the mask, a dimension is dear to use, as the
    penalty counts the squares of the probe's weights.

    scikit-learn's ``LogisticRegressionCV`` chooses C: trained on four fifths of each class of the
    *training* images, that of the highest accuracy on the others (the smallest of equal ones). Then
    the probe is trained on all of them. A note says so where that does not converge.

    Args:
        train_features: shape (N, D).
        train_labels: shape (N,), integers; at least two classes.
        val_features: shape (M, D).
        val_labels: shape (M,).

    Returns:
        Which validation images are right, booleans of shape (M,), and the chosen C.

    Raises:
        UserError: a feature is not finite, the training images are of one class, or no class has
            two of them.
    """
    from sklearn.linear_model import LogisticRegression

    check_finite(train=train_features, val=val_features)
    train, val = (f.detach().double().cpu().numpy() for f in (train_features, val_features))
    labels, classes = train_labels.cpu().numpy(), len(train_labels.unique())
    if classes < 2:
        raise UserError("linear probe: the training images are of one class")
    if classes == len(labels):
        raise UserError("linear probe: no class has two training images")
    mean = train.mean(axis=0)
    train, val = train - mean, val - mean
    scale = np.sqrt(np.square(train).mean()) or 1.0  # all features equal: nothing to divide by
    train, val = train / scale, val / scale

    c = _best_c(train, labels, CS)
    if c == CS[-1]:
        c = _best_c(train, labels, (c, *WEAKER_CS))
    model = LogisticRegression(C=c, max_iter=FINAL_STEPS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(train, labels)
    if any("converge" in str(warning.message) for warning in caught):
        say(
            f"linear probe: not converged after {FINAL_STEPS} steps (C = {c:g}); its accuracy may "
            "be a little off"
        )
    return torch.from_numpy(model.predict(val) == val_labels.cpu().numpy()), c


def _best_c(features: NDArray[np.float64], labels: NDArray[np.int64], cs: Any) -> float:
    from sklearn.linear_model import LogisticRegressionCV

    model = LogisticRegressionCV(
        Cs=cs, cv=[_folds(labels)], scoring="accuracy", refit=False, max_iter=SEARCH_STEPS
    )
    with warnings.catch_warnings():
        # of weak penalties: the held-out images judge what was reached; and of coming defaults
        warnings.simplefilter("ignore")
        model.fit(features, labels)
    return float(np.ravel(model.C_)[0])


def _folds(labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the images to train on, and of those that choose C: the same at every call."""
    drawn = np.random.default_rng(0).permutation(len(labels))
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        images = drawn[labels[drawn] == label]
        # of a class of two or more at least one is held out, and one is left to learn from
        held_out[images[1::HELD_OUT]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
