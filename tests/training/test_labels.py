"""Runs without labels, and the online kNN: what is logged, and how much is kept."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import pretrain_config, train

from metamask_solo.hosts import WeightedKNNClassifier, pl
from metamask_solo.training.pretraining import prepare_pretraining
from metamask_solo.training.resume import read_metrics

SIMCLR = {"proj_hidden_dim": 16, "proj_output_dim": 16, "temperature": 0.2}
BYOL = {"proj_hidden_dim": 16, "proj_output_dim": 16, "pred_hidden_dim": 16}


@pytest.mark.parametrize("method", ["metamask", "simclr", "byol"])
def test_training_without_labels_goes_on_and_logs_no_classifier(
    method: str, images: Path, tmp_path: Path
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, image in enumerate(sorted((images / "train").rglob("*.png"))):
        (flat / f"{i}.png").symlink_to(image)
    cfg = pretrain_config(images, tmp_path, method, max_epochs=2, data__no_labels=True)
    cfg.data.train_path = str(flat)
    cfg.log_every_n_steps = 1
    cfg.knn_eval = {"enabled": True, "k": 3}
    if method == "byol":
        cfg.method_kwargs, cfg.momentum = BYOL, {"classifier": True}
    elif method == "simclr":
        cfg.method_kwargs = SIMCLR
    model, fit = train(cfg)

    assert model.trainer.global_step == 4
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    rows = read_metrics(fit.folder)
    columns = {name for row in rows for name in row}
    assert any(name.startswith("train_") for name in columns)
    assert not {name for name in columns if "class_loss" in name or "acc" in name}
    assert all(np.isfinite(float(value)) for row in rows for value in row.values() if value)
    assert not model.knn_eval


def test_a_batch_without_labels_among_others_adds_nothing(images: Path, tmp_path: Path) -> None:
    """As in STL-10, of which most images have no label."""
    model, *_ = prepare_pretraining(
        pretrain_config(images, tmp_path, "simclr", method_kwargs=SIMCLR)
    )
    torch.manual_seed(0)
    x, labels = torch.randn(6, 3, 32, 32), torch.tensor([1, -1, 3, -1, -1, 0])
    out = model._base_shared_step(x, labels)
    known = labels >= 0
    logits = out["logits"].detach()[known].double().numpy()
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    chosen = shifted[np.arange(3), labels[known].numpy()] / shifted.sum(1)
    assert float(out["loss"]) == pytest.approx(-np.log(chosen).mean(), rel=1e-5)
    right = (logits.argmax(1) == labels[known].numpy()).mean()
    assert float(out["acc1"]) == pytest.approx(100 * right)

    nothing = model._base_shared_step(x, torch.full((6,), -1))
    nothing["loss"].backward()
    assert nothing["loss"] == 0 and nothing["acc1"] == 0
    assert torch.count_nonzero(model.classifier.weight.grad) == 0


class Bank(pl.Callback):  # type: ignore[name-defined]
    """The number of features in the online kNN after each step, and at each validation."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.validated: list[int] = []

    def on_train_batch_start(self, trainer: Any, model: Any, batch: Any, batch_idx: int) -> None:
        self.sizes.append(sum(map(len, model.knn.train_features)))

    def on_validation_batch_start(self, trainer: Any, model: Any, *_: Any) -> None:
        self.validated.append(sum(map(len, model.knn.train_features)))


def run_with_knn(images: Path, out: Path, **overrides: Any) -> tuple[Bank, Any]:
    cfg = pretrain_config(images, out, "simclr", method_kwargs=SIMCLR, **overrides)
    cfg.knn_eval = {"enabled": True, "k": 3}
    bank = Bank()
    model, _ = train(cfg, bank)
    return bank, model


def test_the_bank_of_the_online_knn_holds_an_epoch_at_most(images: Path, tmp_path: Path) -> None:
    # an epoch is 2 steps of 10 images, two views each
    bank, _ = run_with_knn(images, tmp_path / "a", max_epochs=3, check_val_every_n_epoch=3)
    assert bank.sizes == [0, 20, 40, 40, 40, 40]
    assert bank.validated == [40]
    bank, _ = run_with_knn(images, tmp_path / "b", max_epochs=2)
    assert bank.sizes == [0, 20, 0, 20] and bank.validated == [40, 40]


@pytest.mark.parametrize("off", [{"data__val_path": None}, {"limit_val_batches": 0}])
def test_without_validation_there_is_no_online_knn(
    off: dict[str, Any], images: Path, tmp_path: Path
) -> None:
    bank, model = run_with_knn(images, tmp_path, max_epochs=3, **off)
    assert not any(bank.sizes) and not model.knn_eval


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("validated", [[0, 1, 2, 3], [1, 3], [0, 1, 2, 3, 5]])
def test_the_online_knn_knows_classes_that_one_side_lacks(
    distance: str, validated: list[int]
) -> None:
    rng = np.random.default_rng(0)
    bank, labels = rng.normal(size=(40, 6)), rng.integers(0, 4, 40)
    tests, truth = (
        rng.normal(size=(25, 6)),
        np.array(validated)[rng.integers(len(validated), size=25)],
    )
    truth[: len(validated)] = validated
    labels_and_none = np.concatenate([labels, [-1, -1]])
    knn = WeightedKNNClassifier(k=7, distance_fx=distance)
    with_unlabelled = np.concatenate([bank, tests[:2]])  # would be the nearest of all
    knn(train_features=torch.tensor(with_unlabelled), train_targets=torch.tensor(labels_and_none))
    knn(test_features=torch.tensor(tests), test_targets=torch.tensor(truth))
    top1, top5 = knn.compute()

    if distance == "cosine":
        unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (tests, bank)]
        near = np.exp(unit[0] @ unit[1].T / 0.07)
    else:
        near = 1 / (np.linalg.norm(tests[:, None] - bank[None], axis=2) + 1e-5)
    right1 = right5 = 0
    for weights, label in zip(near, truth, strict=True):
        best = np.argsort(-weights)[:7]
        votes = np.bincount(labels[best], weights[best], minlength=6)
        right1 += votes.argmax() == label
        right5 += votes[label] > 0
    assert float(top1) == pytest.approx(100 * right1 / 25)
    if distance == "euclidean" and validated == [1, 3]:
        assert float(top5) >= 100 * right5 / 25  # among five of four classes are all
