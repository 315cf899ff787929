"""The linear probe: against scikit-learn's cross-validated one, and what it can and cannot see."""

import time

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from metamask_solo.errors import UserError
from metamask_solo.evaluation.linear import STRENGTHS, WEAKER, LinearProbe, linear_probe

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


def scaled(features: Features, weights: Tensor | float) -> LinearProbe:
    train, train_labels, val, val_labels = features
    return linear_probe(train * weights, train_labels, val * weights, val_labels)


def test_a_mask_that_silences_the_informative_dimensions_lowers_it(features: Features) -> None:
    plain = scaled(features, 1.0).accuracy
    assert plain > 90
    mask = torch.ones(DIMS)
    mask[:INFORMATIVE] = 1e-3

    silenced = scaled(features, mask).accuracy

    assert silenced < plain - 20
    # and one that silences the others does no harm
    mask = torch.full((DIMS,), 1e-3)
    mask[:INFORMATIVE] = 1.0
    assert scaled(features, mask).accuracy > plain - 1


def test_a_graded_mask_is_seen_too(features: Features) -> None:
    """Weights as a mask has them after training, from 0.1 to 0.9."""
    for_it, against_it = torch.full((DIMS,), 0.1), torch.full((DIMS,), 0.9)
    for_it[:INFORMATIVE], against_it[:INFORMATIVE] = 0.9, 0.1

    few = tuple(t[:60] if i < 2 else t for i, t in enumerate(features))
    assert scaled(few, for_it).accuracy > scaled(few, against_it).accuracy + 2  # type: ignore[arg-type]


@pytest.mark.parametrize("factor", [2.0**-20, 0.5, 1.0, 3.0, 1000.0])
def test_one_number_for_all_dimensions_changes_nothing(features: Features, factor: float) -> None:
    assert scaled(features, factor) == scaled(features, 1.0)


def test_an_offset_changes_nothing(features: Features) -> None:
    train, train_labels, val, val_labels = features
    moved = linear_probe(train.double() + 5, train_labels, val.double() + 5, val_labels)
    assert moved == scaled(features, 1.0)


def test_it_is_the_logistic_regression_of_the_chosen_penalty(features: Features) -> None:
    """Against scikit-learn's other solver, from a cold start and to a narrow tolerance."""
    found = scaled(features, 1.0)
    assert STRENGTHS[0] < found.strength < STRENGTHS[-1]  # the grid's ends are not needed
    train, train_labels, val, val_labels = (t.double().numpy() for t in features)
    centre = train.mean(0)
    scale = np.sqrt(((train - centre) ** 2).sum() / train.size)
    model = LogisticRegression(C=found.strength, solver="newton-cg", tol=1e-8, max_iter=1000)
    model.fit((train - centre) / scale, train_labels)

    expected = 100 * model.score((val - centre) / scale, val_labels)

    assert found.accuracy == pytest.approx(expected, abs=0.2)  # two of the 1,000 images


def test_a_weaker_penalty_than_the_usual_ones_is_found(features: Features) -> None:
    train, train_labels, val, val_labels = features
    spread = 1 / torch.arange(1, train.shape[1] + 1) ** 3.0
    found = linear_probe(train * spread, train_labels, val * spread, val_labels)
    assert found.strength in WEAKER
    middle, usual = train.double().mean(0), LogisticRegression(C=STRENGTHS[-1], max_iter=1000)
    train, val = ((each - middle) * spread for each in (train, val))
    scale = train.square().mean().sqrt()
    usual.fit((train / scale).numpy(), train_labels.numpy())
    before = 100 * usual.score((val / scale).numpy(), val_labels.numpy())
    assert found.accuracy > before + 1


def test_the_validation_images_do_not_choose_the_penalty(features: Features) -> None:
    train, train_labels, val, val_labels = features
    for labels in (val_labels.flip(0), torch.zeros_like(val_labels)):
        assert linear_probe(train, train_labels, val, labels).strength == (
            scaled(features, 1.0).strength
        )


def test_small_and_odd_features() -> None:
    same, labels = torch.ones(8, 3), torch.arange(8) % 2
    assert linear_probe(same, labels, same, labels).accuracy == 50.0
    with pytest.raises(UserError, match="of one class"):
        linear_probe(same, torch.zeros(8, dtype=torch.long), same, labels)
    with pytest.raises(UserError, match="no class has two"):
        linear_probe(same[:2], torch.tensor([0, 1]), same, labels)
    with pytest.raises(UserError, match="val features: some are not finite"):
        linear_probe(same, labels, same * float("nan"), labels)


@pytest.mark.slow
def test_the_features_of_cifar_take_seconds() -> None:
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(10_000) % 10
    mixed = torch.randn(64, 512, generator=draw) * torch.linspace(2, 0.1, 64)[:, None]
    hidden = torch.randn(10_000, 64, generator=draw)
    hidden[:, :10] += 2 * torch.eye(10)[labels]
    x = (hidden @ mixed).relu()
    begin = time.process_time()

    accuracy = linear_probe(x[:8000], labels[:8000], x[8000:], labels[8000:]).accuracy

    assert accuracy > 50
    assert time.process_time() - begin < 60


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_tiny_and_huge_features_in_double_precision(features: Features, scale: float) -> None:
    train, train_labels, val, val_labels = features
    found = linear_probe(train.double() * scale, train_labels, val.double() * scale, val_labels)
    assert found == scaled(features, 1.0)
