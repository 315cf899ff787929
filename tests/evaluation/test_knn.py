"""Nearest-neighbour accuracy, against a plain computation of the same vote."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from metamask_solo.evaluation import knn
from metamask_solo.evaluation.knn import knn_hits


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
    top1, top5 = [], []
    for feature, label in zip(val, val_labels.tolist(), strict=True):
        if distance == "cosine":
            lengths = np.linalg.norm(train, axis=1) * np.linalg.norm(feature)
            similarity = train @ feature / lengths
            weights = np.exp((similarity - similarity.max()) / temperature)
        else:
            similarity = weights = 1 / (np.linalg.norm(train - feature, axis=1) + 1e-5)
        votes = np.zeros(7)
        for neighbour in np.argsort(-similarity)[:k]:
            votes[train_labels[neighbour]] += weights[neighbour]
        order = np.argsort(-votes, kind="stable")
        top1.append(order[0] == label)
        top5.append(label in order[: min(5, k)])
    return top1, top5


@pytest.mark.parametrize("k", [1, 20, 1000])
@pytest.mark.parametrize(
    ("distance", "temperature"),
    [("cosine", 0.07), ("cosine", 0.5), ("cosine", 1e-4), ("euclidean", 0.07)],
)
def test_it_is_the_weighted_vote(k: int, distance: str, temperature: float) -> None:
    features = make_features()

    top1, top5 = knn_hits(*features, k=k, distance=distance, temperature=temperature)

    expected_top1, expected_top5 = expected(*features, k, distance, temperature)
    assert top1.tolist() == expected_top1
    if k >= 20:  # with few neighbours most classes tie with no vote at all
        assert top5.tolist() == expected_top5


def test_labels_may_be_any_integers_and_classes_missing_from_either_side() -> None:
    train, train_labels, val, val_labels = make_features()
    whole = knn_hits(train, train_labels, val, val_labels)[0]
    renamed = knn_hits(train, train_labels * 10 + 3, val, val_labels * 10 + 3)[0]
    assert torch.equal(renamed, whole)
    known, seen = train_labels < 4, val_labels < 4
    few = knn_hits(train[known], train_labels[known], val, val_labels, k=3)
    assert not (few[0] | few[1])[~seen].any()
    # a class that is not validated still takes votes
    voted = knn_hits(train, train_labels, val[seen], val_labels[seen], k=20)[0]
    assert torch.equal(voted, whole[seen])


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that is made."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, tuple | list) else [out]
        self.most = max(self.most, *(t.nbytes for t in made if isinstance(t, Tensor)), 0)
        return out


def test_memory_is_bounded_and_blocks_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    features = make_features()
    whole = [knn_hits(*features, distance=d)[0] for d in ("cosine", "euclidean")]
    monkeypatch.setattr(knn, "MOST_AT_ONCE", 200)
    blocks = [knn_hits(*features, distance=d)[0] for d in ("cosine", "euclidean")]
    assert all(torch.equal(a, b) for a, b in zip(whole, blocks, strict=True))

    monkeypatch.setattr(knn, "MOST_AT_ONCE", 100_000)
    train, labels = torch.randn(1_500, 16), torch.arange(1_500) % 500
    with Largest() as largest:
        knn_hits(train, labels, torch.randn(1_000, 16), labels[:1_000], k=200)
    assert largest.most <= 8 * knn.MOST_AT_ONCE


@pytest.mark.parametrize(
    ("distance", "scale"),
    [("cosine", 1e-36), ("cosine", 1e-15)]  # in the Euclidean weight 1e-5 is added
    + [(d, s) for d in ("cosine", "euclidean") for s in (1e15, 1e36)],
)
def test_tiny_and_huge_features_are_features(distance: str, scale: float) -> None:
    train, train_labels, val, val_labels = make_features()
    scaled = train * scale, train_labels, val * scale, val_labels
    hits = knn_hits(*scaled, k=5, distance=distance)[0]
    assert hits.tolist() == expected(*scaled, 5, distance, 0.07)[0]
    # ordinary ones among them stay what they are
    train[::2] *= scale
    val[1::2] *= scale
    if distance == "cosine":
        assert torch.equal(knn_hits(train, train_labels, val, val_labels, k=5)[0], hits)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_a_large_common_offset_hides_no_differences(distance: str) -> None:
    train, train_labels, val, val_labels = make_features()
    far = train + 1e4, train_labels, val + 1e4, val_labels
    hits = knn_hits(*far, distance=distance)[0]
    assert hits.tolist() == expected(*far, 20, distance, 0.07)[0]
    assert hits.sum() > 20
