"""The online classifier and kNN of both releases where labels or validated classes are missing."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

UNLABELLED = -1
# what the online classifiers log while training
OF_LABELS = ("train_class_loss", "train_acc", "train_momentum_class_loss", "train_momentum_acc")


def bridge_labels(cls: Any, name: str) -> None:
    """Lets the online classifier take images without labels.

    The host's loss of a batch without any label is 0/0, and its accuracy counts such an image as a
    wrong answer. Here the loss is 0, and the accuracy that of the labelled images.

    Args:
        cls: the host's base class.
        name: its method that takes images and labels and returns ``loss``, ``acc1`` and ``acc5``.
    """
    step = getattr(cls, name)

    @functools.wraps(step)
    def bridged(self: Any, X: Tensor, targets: Tensor) -> dict[str, Any]:
        out: dict[str, Any] = step(self, X, targets)
        if "loss" in out:
            labelled = targets != UNLABELLED
            # the classifier stays part of the loss: DDP waits for its gradient
            nothing = 0.0 * out["logits"].flatten()[0]
            out["loss"] = torch.where(labelled.any(), out["loss"], nothing)
            share = labelled.sum().clamp(min=1) / len(targets)
            out["acc1"], out["acc5"] = out["acc1"] / share, out["acc5"] / share
        return out

    setattr(cls, name, bridged)


def bridge_accuracy(module: Any) -> None:
    """Lets the host's top-5 accuracy be asked of fewer than five classes, as momentum methods do.

    Args:
        module: the host's module that calls ``accuracy_at_k``.
    """
    accuracy = module.accuracy_at_k

    @functools.wraps(accuracy)
    def bridged(outputs: Tensor, targets: Tensor, top_k: Any = (1, 5)) -> Any:
        return accuracy(outputs, targets, [min(k, outputs.shape[1]) for k in top_k])

    module.accuracy_at_k = bridged


def log_nothing_of_labels(model: Any) -> None:
    """Keeps the online classifier, which there is not without labels, out of a model's log."""
    # a partial of a function of this module: a spawned process must be able to unpickle it
    model.log_dict = functools.partial(_log_the_rest, model)


def _log_the_rest(model: Any, metrics: dict[str, Any], *args: Any, **kwargs: Any) -> None:
    rest = {name: value for name, value in metrics.items() if not name.startswith(OF_LABELS)}
    type(model).log_dict(model, rest, *args, **kwargs)


def bridge_neighbours(cls: Any) -> None:
    """Lets the online kNN work with images without labels, and with classes that one side lacks.

    The host takes the number of validated classes for that of all: where one is missing from the
    images that are validated, it fails or is wrong. And it keeps a number for each validated image,
    neighbour and class at once: gigabytes where there are many classes.
    """
    update = cls.update

    @functools.wraps(update)
    def bridged_update(
        self: Any,
        train_features: Tensor | None = None,
        train_targets: Tensor | None = None,
        test_features: Tensor | None = None,
        test_targets: Tensor | None = None,
    ) -> None:
        if train_features is not None and train_targets is not None:
            labelled = train_targets != UNLABELLED
            train_features, train_targets = train_features[labelled], train_targets[labelled]
        update(self, train_features, train_targets, test_features, test_targets)

    @functools.wraps(cls.compute)
    def bridged_compute(self: Any) -> Any:
        if not sum(map(len, self.train_targets)) or not sum(map(len, self.test_targets)):
            return -1, -1
        return _accuracies(self)

    cls.update, cls.compute = bridged_update, bridged_compute


@torch.no_grad()
def _accuracies(knn: Any) -> tuple[float, float]:
    """Top-1 and top-5 accuracy in percent of a kNN's banks, whichever classes these hold."""
    bank, labels = torch.cat(list(knn.train_features)), torch.cat(list(knn.train_targets))
    tests, truth = torch.cat(list(knn.test_features)), torch.cat(list(knn.test_targets))
    cosine = knn.distance_fx == "cosine"
    if cosine:
        bank, tests = F.normalize(bank), F.normalize(tests)
    k = min(knn.k, len(bank))
    classes = int(max(labels.max(), truth.max())) + 1
    found = [0, 0]
    rows = max(1, knn.max_distance_matrix_size // len(bank))
    for features, targets in zip(tests.split(rows), truth.split(rows), strict=True):
        if cosine:
            closeness, nearest = (features @ bank.T).topk(k)
            weight = (closeness / knn.T).exp()
        else:
            weight, nearest = (1 / (torch.cdist(features, bank) + knn.epsilon)).topk(k)
        votes = torch.zeros(len(features), classes, device=weight.device, dtype=weight.dtype)
        votes.scatter_add_(1, labels[nearest], weight)
        right = votes.argsort(1, descending=True) == targets[:, None]
        for i, most in enumerate((1, min(5, k, classes))):
            found[i] += int(right[:, :most].sum())
    knn.reset()
    return 100.0 * found[0] / len(truth), 100.0 * found[1] / len(truth)
