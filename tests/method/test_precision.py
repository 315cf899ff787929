"""The meta-update in half precision against single precision, on a trained state."""

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import pretrain_config, train
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cosine_similarity

from metamask_solo.hosts import pl
from metamask_solo.method.hypergradient import TrialStep, hypergradient

pytestmark = pytest.mark.precision


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, list[Any]]]:
    """Models of several seeds after some steps, and the views of a batch of each."""
    states = []
    for seed in range(1, 5):
        cfg = pretrain_config(images, tmp_path_factory.mktemp("trained"), max_epochs=30, seed=seed)
        cfg.optimizer.lr, cfg.optimizer.batch_size = 0.3, 20
        cfg.data.val_path = None
        cfg.method_kwargs.temperature = 0.2
        cfg.checkpoint.enabled = False
        views = _LastViews()
        model, _ = train(cfg, views)
        states.append((model, views.views))
    return states


class _LastViews(pl.Callback):  # type: ignore[name-defined]
    def on_train_batch_end(self, trainer: Any, model: Any, out: Any, batch: Any, i: int) -> None:
        self.views = batch[1]


@pytest.mark.parametrize("method", ["exact", "plain"])
def test_cosine_to_single_precision(
    trained: list[tuple[Any, list[Any]]], method: str, record_property: Any
) -> None:
    """By the median over states: in some, bf16 loses more, with and without the trial step."""
    cosines = []
    for model, views in trained:
        model.meta["hypergradient"] = method
        single = model._mask_gradient(views)
        with torch.autocast("cpu", torch.bfloat16):
            half = model._mask_gradient(views)
        assert half.isfinite().all()
        assert half.dtype == torch.float32
        cosines.append(float(cosine_similarity(single, half, dim=0)))
    record_property("cosines", cosines)
    print(f"{method}: cosines of bf16 to single precision {cosines}")
    assert statistics.median(cosines) >= 0.98
    assert min(cosines) >= 0.8


def test_fp16_needs_the_loss_scale_and_gets_it(record_property: Any) -> None:
    """A loss so flat that its fp16 gradients vanish: the scale brings them back, and goes again.

    On a multilayer perceptron: convolutions in fp16 take minutes on a CPU.
    """
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))
    params = {name: p.detach() for name, p in network.named_parameters()}
    x = torch.randn(64, 16)

    def loss(p: dict[str, torch.Tensor], a: torch.Tensor) -> torch.Tensor:
        u = functional_call(network, p, (x,)) * torch.sigmoid(a)
        return 1e-4 * (u @ u.t()).pow(2).mean()

    logits = 0.3 * torch.randn(8)
    trial = TrialStep(1e3)
    single = hypergradient(loss, params, logits, trial)
    with torch.autocast("cpu", torch.float16):
        plain, scaled = (
            hypergradient(loss, params, logits, trial, loss_scale=scale) for scale in (1.0, 1024.0)
        )
    cosines = [float(cosine_similarity(single, g, dim=0)) for g in (plain, scaled)]
    record_property("cosine", cosines[1])
    print(f"cosine of fp16 to single precision: {cosines[0]:.5f}, with the scale {cosines[1]:.5f}")
    assert scaled.isfinite().all() and cosines[1] >= 0.98
    assert cosines[1] > cosines[0]
    ratio = float(scaled.norm() / single.norm())
    assert 0.9 < ratio < 1.1


def test_overflow_falls_back_to_single_precision(
    trained: list[tuple[Any, list[Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where half precision gives a NaN, the single-precision result is used."""
    from metamask_solo.method import metamask

    model, views = trained[0]
    model.meta["hypergradient"] = "exact"
    single = model._mask_gradient(views)
    seen: list[bool] = []

    def overflowing(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        if seen[-1]:
            return torch.full((512,), float("nan"))
        return hypergradient(*args, **kwargs)

    monkeypatch.setattr(metamask, "hypergradient", overflowing)
    monkeypatch.setattr(
        metamask, "forward_context", lambda trainer: torch.autocast("cpu", torch.bfloat16)
    )
    torch.testing.assert_close(model.mask_gradient(views), single)
    assert seen == [True, False]


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_training_in_other_precisions(precision: str, images: Path, tmp_path: Path) -> None:
    cfg = pretrain_config(images, tmp_path, precision=precision, limit_train_batches=1)
    cfg.data.val_path = None
    model, _ = train(cfg)
    assert model.mask.logits.isfinite().all()
    assert not torch.equal(model.mask.logits, torch.zeros_like(model.mask.logits))
    assert model.mask_learner.skipped == 0


def test_a_dropped_optimiser_step_gives_no_mask_update(images: Path, tmp_path: Path) -> None:
    """fp16 loss scaling drops a step on overflow; the trainer counts it all the same."""

    class Scaler:
        scale = 4.0

        def is_enabled(self) -> bool:
            return True

        def get_scale(self) -> float:
            return self.scale

    calls: list[int] = []

    class Watch(pl.Callback):  # type: ignore[name-defined]
        def on_train_start(self, trainer: Any, model: Any) -> None:
            trainer.precision_plugin.scaler = Scaler()
            update = model._update_mask
            model._update_mask = lambda views: (calls.append(trainer.global_step), update(views))

        def on_train_batch_start(self, trainer: Any, model: Any, batch: Any, i: int) -> None:
            if trainer.global_step == 1:
                trainer.precision_plugin.scaler.scale /= 2

    cfg = pretrain_config(images, tmp_path, max_epochs=2)
    cfg.data.val_path = None
    train(cfg, Watch())
    assert calls == [1, 3, 4]


@pytest.mark.parametrize("scope", ["all", "heads"])
def test_channels_last_is_kept(scope: str, images: Path, tmp_path: Path) -> None:
    cfg = pretrain_config(images, tmp_path)
    cfg.data.val_path = None
    cfg.method_kwargs.meta = {"trial_scope": scope}
    layouts: list[bool] = []

    class Watch(pl.Callback):  # type: ignore[name-defined]
        def on_train_start(self, trainer: Any, model: Any) -> None:
            model.backbone.to(memory_format=torch.channels_last)

        def on_train_end(self, trainer: Any, model: Any) -> None:
            layouts.extend(
                p.is_contiguous(memory_format=torch.channels_last)
                for p in model.backbone.parameters()
                if p.dim() == 4
            )

    train(cfg, Watch())
    assert layouts and all(layouts)
