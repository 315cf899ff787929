"""Nearest-neighbour accuracy, against a plain computation of the same vote."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from metamask_solo.errors import UserError
from metamask_solo.evaluation import knn as neighbours
from metamask_solo.evaluation.knn import knn_accuracy
from metamask_solo.evaluation.linear import linear_probe


def make_features(classes: int = 7, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """60 training and 40 validation features of 12 dimensions, of overlapping classes."""
    torch.manual_seed(seed)
    centres = torch.randn(classes, 12)
    train_labels, val_labels = torch.arange(60) % classes, torch.arange(40) % classes
    train = centres[train_labels] + torch.randn(60, 12)
    return train, train_labels, centres[val_labels] + torch.randn(40, 12), val_labels


def expected(train, train_labels, val, val_labels, k, distance, temperature):
    """The weighted vote, one image at a time."""
    train, val = train.double().numpy(), val.double().numpy()
    top1 = top5 = 0
    for feature, label in zip(val, val_labels.tolist(), strict=True):
        if distance == "cosine":
            lengths = np.linalg.norm(train, axis=1) * np.linalg.norm(feature)
            similarity = train @ feature / lengths
            weights = np.exp(similarity / temperature)
        else:
            similarity = weights = 1 / (np.linalg.norm(train - feature, axis=1) + 1e-5)
        votes = np.zeros(7)
        for neighbour in np.argsort(-similarity)[:k]:
            votes[train_labels[neighbour]] += weights[neighbour]
        order = np.argsort(-votes, kind="stable")
        top1 += order[0] == label
        top5 += label in order[: min(5, k)]
    return 100 * top1 / len(val), 100 * top5 / len(val)


@pytest.mark.parametrize("k", [1, 5, 20, 60])
@pytest.mark.parametrize(
    ("distance", "temperature"),
    [("cosine", 0.07), ("cosine", 0.5), ("cosine", 0.01), ("cosine", 0.002), ("euclidean", 0.07)],
)
def test_it_is_the_weighted_vote(k: int, distance: str, temperature: float) -> None:
    features = make_features()

    top1, top5 = knn_accuracy(*features, k=k, distance=distance, temperature=temperature)

    expected_top1, expected_top5 = expected(*features, k, distance, temperature)
    assert top1 == pytest.approx(expected_top1)
    if k >= 20:  # with few neighbours most classes tie with no vote at all
        assert top5 == pytest.approx(expected_top5)
    assert 0 < top1 <= top5 <= 100


def test_the_length_of_features_does_not_count_for_the_cosine_distance() -> None:
    train, train_labels, val, val_labels = make_features()
    lengths = torch.logspace(-2, 2, len(train)).unsqueeze(1)

    longer = knn_accuracy(train * lengths, train_labels, val * 300, val_labels)

    assert longer == knn_accuracy(train, train_labels, val, val_labels)


def test_labels_may_be_any_integers() -> None:
    train, train_labels, val, val_labels = make_features()

    renamed = knn_accuracy(train, train_labels * 10 + 3, val, val_labels * 10 + 3)

    assert renamed == knn_accuracy(train, train_labels, val, val_labels)


def test_more_neighbours_than_images_are_all_of_them() -> None:
    features = make_features()

    assert knn_accuracy(*features, k=1000) == knn_accuracy(*features, k=60)


def test_classes_may_be_missing_from_either_side() -> None:
    train, train_labels, val, val_labels = make_features()
    known = train_labels < 4
    top1, _ = knn_accuracy(train[known], train_labels[known], val, val_labels, k=3)
    inner = val_labels < 4
    own, _ = knn_accuracy(train[known], train_labels[known], val[inner], val_labels[inner], k=3)
    assert top1 * len(val) == pytest.approx(own * int(inner.sum()))
    # a class that is not validated still takes votes
    few, _ = knn_accuracy(train, train_labels, val[inner], val_labels[inner], k=3)
    assert few == pytest.approx(
        expected(train, train_labels, val[inner], val_labels[inner], 3, "cosine", 0.07)[0]
    )


@pytest.mark.parametrize("temperature", [0.05, 1.0])
@pytest.mark.parametrize("k", [1, 7, 30])
def test_it_is_scikit_learns_weighted_neighbours(k: int, temperature: float) -> None:
    from sklearn.neighbors import KNeighborsClassifier

    features = make_features(seed=3)
    train, train_labels, val, val_labels = (part.numpy() for part in features)
    unit = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in (train, val)]
    peer = KNeighborsClassifier(
        k, weights=lambda far: np.exp((1 - far**2 / 2) / temperature), algorithm="brute"
    ).fit(unit[0], train_labels)
    assert knn_accuracy(*features, k=k, temperature=temperature)[0] == pytest.approx(
        100 * peer.score(unit[1], val_labels)
    )


def test_blocks_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    features = make_features()
    whole = [knn_accuracy(*features, k=20, distance=d) for d in ("cosine", "euclidean")]
    monkeypatch.setattr(neighbours, "MOST_AT_ONCE", 200)
    assert [knn_accuracy(*features, k=20, distance=d) for d in ("cosine", "euclidean")] == whole


def test_memory_does_not_grow_with_classes_times_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    classes, images = 2_000, 6_000
    train = torch.randn(images, 16, generator=generator)
    val = torch.randn(2_000, 16, generator=generator)
    labels = torch.arange(images) % classes
    sizes: list[int] = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            made = out if isinstance(out, tuple | list) else [out]
            sizes.extend(t.numel() * t.element_size() for t in made if isinstance(t, Tensor))
            return out

    with Largest():
        knn_accuracy(train, labels, val, labels[: len(val)], k=200)
    assert max(sizes) <= 8 * neighbours.MOST_AT_ONCE


@pytest.mark.parametrize(
    "settings",
    [
        {"k": 0},
        {"k": 2.5},
        {"distance": "manhattan"},
        {"temperature": 0.0},
        {"temperature": 0.001},
        {"temperature": float("nan")},
    ],
)
def test_wrong_settings_are_named(settings: dict[str, object]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        knn_accuracy(*make_features(), **settings)


@pytest.mark.parametrize(("place", "name"), [(0, "train"), (2, "val")])
def test_features_that_are_not_finite_are_refused(place: int, name: str) -> None:
    features = list(make_features())
    features[place][3, 4] = float("inf")

    with pytest.raises(UserError, match=f"{name} features"):
        knn_accuracy(*features)


@pytest.mark.parametrize(
    ("distance", "scale"),
    [("cosine", s) for s in (1e-36, 1e-25, 1e-15)]  # in the Euclidean weight 1e-5 is added
    + [(d, s) for d in ("cosine", "euclidean") for s in (1e15, 1e25, 1e36)],
)
def test_tiny_and_huge_features_are_features(distance: str, scale: float) -> None:
    train, train_labels, val, val_labels = make_features()
    small = train * scale, train_labels, val * scale, val_labels
    found = knn_accuracy(*small, k=5, distance=distance)
    assert found[0] == pytest.approx(expected(*small, 5, distance, 0.07)[0])
    # ordinary ones among them stay what they are
    train[::2] *= scale
    val[1::2] *= scale
    if distance == "cosine":
        assert knn_accuracy(train, train_labels, val, val_labels, k=5) == found


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_a_large_common_offset_hides_no_differences(distance: str) -> None:
    train, train_labels, val, val_labels = make_features()
    far = train + 1e4, train_labels, val + 1e4, val_labels
    found = knn_accuracy(*far, distance=distance)
    assert found[0] == pytest.approx(expected(*far, 20, distance, 0.07)[0])
    assert found[0] > 50


@pytest.mark.parametrize("evaluate", [knn_accuracy, linear_probe])
@pytest.mark.parametrize(
    ("place", "change", "said"),
    [
        (1, lambda labels: labels.repeat(2), "train labels"),
        (3, lambda labels: labels[:1], "val labels"),
        (1, lambda labels: labels[:, None], "train labels"),
        (3, lambda labels: labels + 0.5, "val labels"),
        (2, lambda features: features[:0], "val features"),
        (0, lambda features: features[:0], "train features"),
        (2, lambda features: features[:, :5], "val features"),
        (2, lambda features: features.double(), "val features"),
        (0, lambda features: features.long(), "train features"),
    ],
)
def test_what_does_not_fit_is_named(evaluate: Any, place: int, change: Any, said: str) -> None:
    features = list(make_features())
    features[place] = change(features[place])

    with pytest.raises(UserError, match=said):
        evaluate(*features)


def test_a_class_without_training_images_is_in_no_guess() -> None:
    train = torch.eye(3)[[1, 2, 1, 2]] + 0.01
    found = knn_accuracy(train, torch.tensor([1, 2, 1, 2]), train[:2], torch.tensor([0, 0]))
    assert found == (0.0, 0.0)
