"""The two standard evaluations of frozen features, on features computed once."""

from torch import Tensor

from metamask_solo.neighbours import knn_accuracy


def linear_accuracy(
    train_features: Tensor, train_labels: Tensor, val_features: Tensor, val_labels: Tensor
) -> float:
    """Accuracy in percent of a logistic regression on standardised features.

    The features of the plain images, computed once; ``metamask-solo linear`` trains solo-learn's
    own probe on augmented images instead, which takes longer.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
    probe.fit(train_features.numpy(), train_labels.numpy())
    return 100 * float(probe.score(val_features.numpy(), val_labels.numpy()))


def evaluate_features(train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor]) -> dict[str, float]:
    """``knn`` (k = 20, cosine, temperature 0.07) and ``linear`` accuracy in percent.

    Args:
        train, val: features (N × D) and labels (N).
    """
    return {"knn": knn_accuracy(*train, *val)[0], "linear": linear_accuracy(*train, *val)}
