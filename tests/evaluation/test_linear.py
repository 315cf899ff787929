"""The linear probe: against scikit-learn's other solver, and what it can and cannot see."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from metamask_solo.errors import UserError
from metamask_solo.evaluation import linear
from metamask_solo.evaluation.features import percent
from metamask_solo.evaluation.linear import CS, WEAKER_CS, linear_probe

CLASSES, DIMS, INFORMATIVE = 4, 24, 6
Features = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def features() -> Features:
    """Six dimensions tell of the class, eighteen do not; an offset, and a scale of its own."""
    rng = np.random.default_rng(0)
    means = np.zeros((CLASSES, DIMS))
    means[:, :INFORMATIVE] = 1.5 * rng.normal(size=(CLASSES, INFORMATIVE))

    def draw(count: int) -> tuple[Tensor, Tensor]:
        labels = rng.integers(0, CLASSES, count)
        drawn = 7 + 0.01 * (means[labels] + rng.normal(size=(count, DIMS)))
        return torch.from_numpy(drawn).float(), torch.from_numpy(labels)

    return (*draw(300), *draw(1000))


def scaled(
    features: Features, weights: Tensor | float, offset: float = 0.0
) -> tuple[Tensor, float]:
    train, train_labels, val, val_labels = features
    train, val = train * weights + offset, val * weights + offset
    return linear_probe(train, train_labels, val, val_labels)


def accuracy(features: Features, weights: Tensor | float) -> float:
    return percent(scaled(features, weights)[0])


def test_it_sees_a_mask(features: Features) -> None:
    plain = accuracy(features, 1.0)
    assert plain > 90
    silent, kept = torch.full((DIMS,), 1e-3), torch.ones(DIMS)
    kept[:INFORMATIVE], silent[:INFORMATIVE] = 1e-3, 1.0
    assert accuracy(features, kept) < plain - 20  # informative dimensions silenced
    assert accuracy(features, silent) > plain - 1  # the others
    # weights as a mask has them after training, from 0.1 to 0.9
    few: Any = tuple(t[:60] if i < 2 else t for i, t in enumerate(features))
    good, bad = torch.full((DIMS,), 0.1), torch.full((DIMS,), 0.9)
    good[:INFORMATIVE], bad[:INFORMATIVE] = 0.9, 0.1
    assert accuracy(few, good) > accuracy(few, bad) + 2


@pytest.mark.parametrize(("factor", "offset"), [(2.0**-20, 0.0), (1000.0, 0.0), (1.0, 5.0)])
def test_one_number_for_all_dimensions_changes_nothing(
    features: Features, factor: float, offset: float
) -> None:
    wide = (features[0].double(), features[1], features[2].double(), features[3])
    (correct, c), (scaled_correct, scaled_c) = scaled(wide, 1.0), scaled(wide, factor, offset)
    assert c == scaled_c and torch.equal(correct, scaled_correct)


def by_scikit_learn(c: float, train: Any, labels: Any) -> LogisticRegression:
    """The logistic regression of a penalty, by another solver."""
    model = LogisticRegression(C=c, solver="newton-cg", tol=1e-8, max_iter=1000)
    return model.fit(train, labels)


def test_it_is_the_logistic_regression_of_the_c_that_is_best_on_held_out_images(
    features: Features,
) -> None:
    correct, c = scaled(features, 1.0)
    train, train_labels, val, val_labels = (t.double().numpy() for t in features)
    centre = train.mean(0)
    scale = np.sqrt(((train - centre) ** 2).sum() / train.size)
    train, val = (train - centre) / scale, (val - centre) / scale
    kept, held_out = linear._folds(train_labels)
    assert sorted([*kept, *held_out]) == list(range(len(train)))
    judges = train[held_out], train_labels[held_out]
    scores = [by_scikit_learn(c, train[kept], train_labels[kept]).score(*judges) for c in CS]
    assert c == CS[int(np.argmax(scores))] and CS[0] < c < CS[-1]  # the ends are not needed
    expected = by_scikit_learn(c, train, train_labels).predict(val) == val_labels
    assert (correct.numpy() != expected).sum() <= 2  # of 1,000 images
    # the validation images have no say in C
    assert scaled((*features[:3], torch.zeros_like(features[3])), 1.0)[1] == c


def test_of_a_class_of_two_one_image_is_held_out() -> None:
    labels = np.array([0, 1, 0, 1, 2])
    kept, held_out = linear._folds(labels)
    assert sorted(labels[kept]) == [0, 1, 2] and sorted(labels[held_out]) == [0, 1]


def test_a_weaker_penalty_is_tried_where_the_last_is_the_best(features: Features) -> None:
    assert scaled(features, 1 / torch.arange(1, DIMS + 1) ** 3.0)[1] in WEAKER_CS


def test_a_fit_that_does_not_converge_is_said(
    features: Features, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scaled(features, 1.0)
    assert "converged" not in capsys.readouterr().err
    monkeypatch.setattr(linear, "FINAL_STEPS", 2)
    scaled(features, 1.0)
    assert "linear probe: not converged after 2 steps" in capsys.readouterr().err


def test_what_cannot_be_probed_is_refused() -> None:
    same, labels = torch.ones(8, 3), torch.arange(8) % 2
    assert percent(linear_probe(same, labels, same, labels)[0]) == 50.0
    with pytest.raises(UserError, match="of one class"):
        linear_probe(same, torch.zeros(8, dtype=torch.long), same, labels)
    with pytest.raises(UserError, match="no class has two"):
        linear_probe(same[:2], torch.tensor([0, 1]), same, labels)
