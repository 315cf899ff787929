"""The meta-update in half precision against single precision, on a trained state."""

import itertools
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import pretrain_config, train, use_small_backbone
from torch.nn.functional import cosine_similarity

from metamask_solo.hosts import pl
from metamask_solo.training.callbacks import FiniteLoss
from metamask_solo.training.pretrain import prepare_pretraining

pytestmark = pytest.mark.precision


def test_cosine_to_single_precision(images: Path, tmp_path: Path, record_property: Any) -> None:
    """By the median over trained states: bf16 loses more in some, with a trial step or without."""
    cosines: dict[str, list[float]] = {"exact": [], "plain": []}
    for seed in range(1, 5):
        cfg = pretrain_config(images, tmp_path, max_epochs=30, seed=seed)
        cfg.optimizer.lr, cfg.optimizer.batch_size = 0.3, 20
        cfg.data.val_path = None
        cfg.method_kwargs.temperature = 0.2
        cfg.checkpoint.enabled = False
        cfg.method_kwargs.meta = {"enabled": False}  # quick: the state is of a trained network
        model, _ = train(cfg, small=True)
        views = next(iter(model.trainer.train_dataloader))[1]
        for method, values in cosines.items():
            model.settings.meta.hypergradient = method
            single = model.mask_gradient(views)
            with torch.autocast("cpu", torch.bfloat16):
                half = model.mask_gradient(views)
            assert half.isfinite().all() and half.dtype == torch.float32
            values.append(float(cosine_similarity(single, half, dim=0)))
    record_property("cosines", cosines)
    for values in cosines.values():
        assert statistics.median(values) >= 0.98 and min(values) >= 0.8


@pytest.mark.parametrize(
    ("precision", "dtype", "kind"),
    [
        ("bf16-mixed", torch.float32, "sigmoid"),
        ("bf16-true", torch.bfloat16, "linear"),
        ("16-true", torch.float16, "sigmoid"),
    ],
)
def test_the_mask_keeps_single_precision_at_least(
    precision: str, dtype: torch.dtype, kind: str, images: Path, tmp_path: Path
) -> None:
    """A step of 1e-4 is lost next to 1 in bf16; the network itself may be in half precision."""
    cfg = pretrain_config(images, tmp_path, precision=precision)
    cfg.data.val_path = None
    cfg.method_kwargs.mask = {"kind": kind, "lr": 1e-4, "weight_decay": 0.0, "momentum": 0.0}
    model, result = train(cfg, small=True)
    assert next(model.projector.parameters()).dtype == dtype
    assert model.mask.logits.dtype == torch.float32
    moved = (model.mask.logits - (1.0 if kind == "linear" else 0.0)).abs()
    assert moved.isfinite().all() and model.mask_optimizer.updates == 2
    # as many as can be told apart: most gradients are small, few are zero
    assert (moved > 0).float().mean() > 0.9 and moved.max() < 1e-2
    saved = torch.load(result.checkpoint, weights_only=True)["state_dict"]["mask.logits"]
    assert saved.dtype == model.mask.logits.dtype


def test_a_dropped_optimiser_step_gives_no_mask_update(images: Path, tmp_path: Path) -> None:
    """With torch's own scaler: it drops the first steps, till its scale no longer overflows."""
    cfg = pretrain_config(images, tmp_path)
    cfg.optimizer.batch_size = 5
    model, cfg, loader, _ = prepare_pretraining(cfg)
    use_small_backbone(model)
    weights, masks = [], []

    def keep(trainer: Any, model: Any, *_: Any) -> None:
        weights.append(model.projector[0].weight.detach().clone())
        masks.append(model.mask.logits.clone())

    steps = pl.callbacks.LambdaCallback(on_train_batch_start=keep, on_train_end=keep)
    finite = FiniteLoss(None)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**11)
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = pl.Trainer(
        accelerator="cpu",
        plugins=[pl.plugins.MixedPrecision("16-mixed", "cpu", scaler)],
        max_epochs=3,
        callbacks=[steps, finite],
        **dict.fromkeys(quiet, False),
    )
    trainer.fit(model, loader)
    dropped = [torch.equal(a, b) for a, b in itertools.pairwise(weights)]
    assert dropped[0] and not dropped[-1]
    assert [torch.equal(a, b) for a, b in itertools.pairwise(masks)] == dropped
    assert finite.skipped == sum(dropped)
    assert model.mask_optimizer.updates == len(dropped) - sum(dropped)
