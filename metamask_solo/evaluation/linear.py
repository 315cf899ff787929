"""The two standard evaluations of frozen features, on features computed once."""

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from metamask_solo.errors import UserError
from metamask_solo.evaluation.knn import check_features

# inverse strengths of the penalty ½ ‖W‖², each ten times weaker than the one before
STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
WEAKER = (1e2, 1e3, 1e4)  # tried as long as the last one was the best
# every so many images of a class, one is held out to choose among them
HELD_OUT = 5
ITERATIONS = 500
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]


@dataclass(frozen=True)
class LinearProbe:
    """What :func:`linear_probe` found.

    Attributes:
        accuracy: in percent of the validation images.
        strength: the C that was chosen among ``STRENGTHS`` and ``WEAKER``.
    """

    accuracy: float
    strength: float


def linear_probe(
    train_features: Tensor, train_labels: Tensor, val_features: Tensor, val_labels: Tensor
) -> LinearProbe:
    """Logistic regression on features that are divided by one number for all dimensions.

    The features are centred and divided by the root of their mean square over all images *and*
    dimensions. So the probe is blind to the scale of a whole network, which the methods do not
    share, but not to that of one dimension against another: with a small weight in the mask, a
    dimension is dear to use, as the penalty counts the squares of the probe's weights.

    The C of the penalty is that of ``STRENGTHS`` with the highest accuracy on a fifth of each
    class of the *training* images (the smallest of equal ones), after training on the rest; then
    the probe is trained on all of them. Where the last of them is the best, those of ``WEAKER``
    follow until one is no better. ``metamask-solo linear`` trains solo-learn's own probe on
    augmented images instead, which takes longer.

    Args:
        train_features: shape (N, D).
        train_labels: shape (N,), integers; at least two classes.
        val_features: shape (M, D).
        val_labels: shape (M,).

    Raises:
        UserError: a feature is not finite, features and labels do not fit each other, the training
            images are of one class, or no class has two of them.
    """
    check_features(train_features, train_labels, val_features, val_labels)
    train, val = (f.detach().double().cpu().numpy() for f in (train_features, val_features))
    labels, val_classes = train_labels.cpu().numpy(), val_labels.cpu().numpy()
    if len(np.unique(labels)) < 2:
        raise UserError("linear probe: the training images are of one class")
    if len(np.unique(labels)) == len(labels):
        raise UserError("linear probe: no class has two training images")
    # first to a size whose squares are numbers; a power of two rounds nothing
    size = np.ldexp(1.0, -np.frexp(np.abs(train).max())[1].clip(-1000, 1000))
    train, val = train * size, val * size
    mean = train.mean(axis=0)
    train, val = train - mean, val - mean
    scale = np.sqrt(np.square(train).mean()) or 1.0  # all features equal: nothing to divide by
    train, val = train / scale, val / scale

    held_out = _held_out(labels)
    fitted = _Fit()
    scores: dict[float, float] = {}
    best = last = STRENGTHS[0]
    for strength in (*STRENGTHS, *WEAKER):  # each starts where the stronger penalty ended
        if strength in WEAKER and best != last:
            break
        fitted.fit(train[~held_out], labels[~held_out], strength)
        scores[strength] = fitted.accuracy(train[held_out], labels[held_out])
        best, last = max(scores, key=lambda tried: scores[tried]), strength
    fitted = _Fit()
    fitted.fit(train, labels, best)
    return LinearProbe(fitted.accuracy(val, val_classes), best)


def _held_out(labels: Integers) -> Booleans:
    """The images that choose the penalty: drawn in each class, the same ones at every call."""
    drawn = np.random.default_rng(0).permutation(len(labels))
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        images = drawn[labels[drawn] == label]
        # of a class of two or more at least one is held out, and one is left to learn from
        held_out[images[1::HELD_OUT]] = True
    return held_out


class _Fit:
    """scikit-learn's logistic regression, whose next fit starts from the last one."""

    def __init__(self) -> None:
        from sklearn.linear_model import LogisticRegression

        self.model = LogisticRegression(max_iter=ITERATIONS, warm_start=True)

    def fit(self, features: Floats, labels: Integers, strength: float) -> None:
        from sklearn.exceptions import ConvergenceWarning

        self.model.set_params(C=strength)
        with warnings.catch_warnings():
            # a weak penalty on few images: the held-out ones judge what was reached
            warnings.simplefilter("ignore", ConvergenceWarning)
            self.model.fit(features, labels)

    def accuracy(self, features: Floats, labels: Integers) -> float:
        return 100 * float(self.model.score(features, labels))
