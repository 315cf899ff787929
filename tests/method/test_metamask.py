"""The method on the installed release of solo-learn."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from definitions import plain_barlow, plain_nt_xent
from omegaconf import DictConfig, OmegaConf
from runs import SMALL_HEADS, pretrain_config, train, use_small_backbone
from torch import Tensor

from metamask_solo import MetaMask, mask_hypergradient
from metamask_solo.errors import UserError
from metamask_solo.hosts import RELEASE, pl
from metamask_solo.method.mask import mask_statistics
from metamask_solo.training.callbacks import SafeCheckpointIO
from metamask_solo.training.pretrain import prepare_pretraining
from metamask_solo.training.resume import read_metrics

Config = Callable[..., DictConfig]


@pytest.fixture
def config(images: Path, tmp_path: Path) -> Config:
    """Makes the config of a run of two steps without validation, that logs each step."""

    def made(folder: str = ".", **overrides: Any) -> DictConfig:
        cfg = pretrain_config(images, tmp_path / folder, log_every_n_steps=1, **overrides)
        cfg.data.val_path = None
        return cfg

    return made


class Updates(pl.Callback):  # type: ignore[name-defined]
    """Watches each update of the mask, which must change nothing else."""

    def __init__(self, measure: Callable[[Any, list[Tensor]], Any] = lambda model, batch: None):
        self.measure = measure  # of the model and the batch, just before an update
        self.reference: list[Any] = []
        self.masks: list[tuple[Tensor, Tensor]] = []  # logits before and after
        self.at: list[tuple[int, int]] = []  # the trainer's step and the index of the batch
        self.saved: list[Tensor] = []  # the logits that a checkpoint of each batch would hold

    def all_but_the_mask(self, model: Any) -> list[Tensor]:
        tensors = [t for name, t in model.state_dict().items() if name != "mask.logits"]
        tensors += [p.grad for p in model.parameters() if p.grad is not None]
        for state in model.trainer.optimizers[0].state.values():
            tensors += [v for v in state.values() if isinstance(v, Tensor)]
        return [t.clone() for t in [*tensors, torch.get_rng_state()]]

    def on_train_start(self, trainer: Any, model: Any) -> None:
        update = model._update_mask

        def watched(batch: Any) -> None:
            self.reference.append(self.measure(model, batch))
            before, mask = self.all_but_the_mask(model), model.mask.logits.clone()
            update(batch)
            for a, b in zip(self.all_but_the_mask(model), before, strict=True):
                assert torch.equal(a, b)
            self.masks.append((mask, model.mask.logits.clone()))
            self.at.append((trainer.global_step, self.batch))

        model._update_mask = watched

    def on_train_batch_start(self, trainer: Any, model: Any, batch: Any, i: int) -> None:
        self.batch = i

    def on_train_batch_end(self, trainer: Any, model: Any, *_: Any) -> None:
        self.saved.append(model.mask.logits.clone())


EACH_STEP = [(0, 0), (1, 1)]
FEW = {"limit_train_batches": 2, "method_kwargs__meta": {"batch_fraction": 0.3}}
NOT_FINITE = {"method_kwargs__meta": {"trial_lr": 1e38}}  # the loss after such a trial step is NaN


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "at"),
    [
        ({"method_kwargs__meta": {"hypergradient": "finite_difference"}}, EACH_STEP),
        ({"method_kwargs__meta": {"hypergradient": "first_order"}}, EACH_STEP),
        ({"method_kwargs__meta": {"hypergradient": "plain"}}, EACH_STEP),
        ({"method_kwargs__meta": {"trial_scope": "heads", "batch_fraction": 0.5}}, EACH_STEP),
        ({"optimizer__name": "adamw", "optimizer__lr": 1e-3}, EACH_STEP),
        ({"optimizer__name": "adamw", "method_kwargs__meta": {"trial_lr": 0.01}}, EACH_STEP),
        (NOT_FINITE, EACH_STEP),
        # clipping to nothing stops the network, not the mask
        ({"gradient_clip_val": 1e-12}, EACH_STEP),
        # real optimiser steps count, and the last accumulated batch
        (
            {
                **{"accumulate_grad_batches": 2, "max_epochs": 2, "optimizer__batch_size": 5},
                "method_kwargs__meta": {"every_n_steps": 2},
            },
            [(1, 3), (3, 3)],
        ),
        # the mask moves on four images or more
        ({**FEW, "optimizer__batch_size": 2}, []),
        ({**FEW, "optimizer__batch_size": 20}, [(0, 0)]),
    ],
    ids=str,
)
def test_updates_follow_the_steps_and_leave_everything_but_the_mask(
    overrides: dict[str, Any], at: list[tuple[int, int]], config: Config
) -> None:
    updates, lost = Updates(), len(at) if overrides is NOT_FINITE else 0
    model, _ = train(config(**overrides), updates, small=True)
    assert updates.at == at
    assert (model.mask_optimizer.updates, model.mask_optimizer.skipped) == (len(at) - lost, lost)
    assert model.trainer.callback_metrics.get("mask_skipped_updates", 0) == lost
    for before, after in updates.masks:
        assert torch.equal(before, after) if lost else (after - before).abs().max() > 1e-9


def by_definition(model: Any, views: list[Tensor], method: Any = "double_backward") -> Tensor:
    """The hypergradient of the loss as it is defined, by another way, without autocast."""
    modules, optimizer = [model.backbone, model.projector], model.trainer.optimizers[0]

    def loss() -> Tensor:
        z1, z2 = (model.projector(model.mask(model.backbone(x))) for x in views)
        return plain_nt_xent(z1, z2, model.settings.temperature)

    return mask_hypergradient(loss, modules, model.mask, optimizer, method)


@pytest.mark.slow
def test_a_whole_run_in_double_precision(config: Config) -> None:
    """Joint loss, mask update, checkpointed mask, logged statistics and output, by definition."""
    cfg = config(precision="64-true")
    cfg.method_kwargs.update(alpha=3.0, scale_loss=0.1, lamb=0.02, temperature=0.3)
    cfg.method_kwargs.mask = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1}
    losses: list[tuple[float, float]] = []

    def keep_losses(trainer: Any, model: Any, batch: Any, i: int) -> None:
        twin = copy.deepcopy(model)  # as averages of weights make it
        assert twin._trainer is None
        u = [twin.backbone(x.double()) * torch.sigmoid(twin.mask.logits) for x in batch[1]]
        barlow = 0.1 * plain_barlow(*(twin.redundancy_projector(x) for x in u), 0.02)
        contrastive = plain_nt_xent(*(twin.projector(x) for x in u), 0.3)
        losses.append((float(barlow), float(contrastive)))

    updates = Updates(by_definition)
    first = pl.callbacks.LambdaCallback(on_train_batch_start=keep_losses)
    model, result = train(cfg, first, updates, small=True)
    logged = read_metrics(result.folder)
    for name, expected in zip(("barlow", "nce"), losses[0], strict=True):
        first = logged[f"train_{name}_loss_step"].dropna().iloc[0]
        assert math.isclose(first, expected, rel_tol=1e-9)

    assert updates.at == EACH_STEP
    buffer = torch.zeros(512, dtype=torch.float64)
    for (before, after), g, saved in zip(
        updates.masks, updates.reference, updates.saved, strict=True
    ):
        buffer = 0.9 * buffer + g + 0.1 * before
        torch.testing.assert_close(after, before - 0.5 * buffer, rtol=1e-9, atol=1e-12)
        assert torch.equal(after, saved)  # a callback of a step sees the mask of that step

    last = logged.dropna(subset="mask_mean").iloc[-1]
    for name, value in mask_statistics(model.mask.mask()).items():
        assert math.isclose(float(last[f"mask_{name}"]), float(value), rel_tol=1e-4, abs_tol=1e-6)
    assert last["mask_skipped_updates"] == 0.0
    norm = float(updates.reference[-1].norm())
    assert math.isclose(float(last["hypergradient_norm"]), norm, rel_tol=1e-4)

    model.eval()
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    out = model(x)
    expected = model.backbone(x) * torch.sigmoid(model.mask.logits)
    torch.testing.assert_close(out["feats"], expected)
    torch.testing.assert_close(out["logits"], model.classifier(expected))
    torch.testing.assert_close(out["z"], model.projector(expected))


def test_differences_of_a_run_in_bf16_are_of_single_precision(config: Config) -> None:
    def compare(model: Any, views: list[Tensor]) -> None:
        expected = by_definition(model, views, "finite_difference")
        error = (model.mask_gradient(views) - expected).norm() / expected.norm()
        assert error < 1e-2

    meta = {"hypergradient": "finite_difference"}
    train(config(precision="bf16-mixed", method_kwargs__meta=meta), Updates(compare), small=True)


def test_a_later_refusal_is_a_skipped_update(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of a loss that is nearly 0, whose derivatives are rounding; a first one ends the run."""

    def refusing(when: int) -> Any:
        def refuse(model: Any, views: list[Tensor]) -> None:
            if model.trainer.global_step == when:
                model.mask_gradient = raising

        return Updates(refuse)

    def raising(batch: Any) -> Tensor:
        raise UserError("exact: cannot")

    model, _ = train(config(), refusing(1), small=True)
    assert "mask updates: 1, and 1 skipped" in capsys.readouterr().out
    assert model.trainer.callback_metrics["mask_skipped_updates"] == 1
    with pytest.raises(UserError, match="exact: cannot"):
        train(config("other"), refusing(0), small=True)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("method_kwargs.tempreature", 0.1, "did you mean method_kwargs.temperature"),
        ("method_kwargs.meta.every_n_setps", 1, "every_n_steps"),
        ("method_kwargs.mask.initial_logit", 17, "mask.initial_logit=17"),
        ("method_kwargs.mask", {"kind": "linear", "initial_logit": 1e-9}, "initial_logit=1e-09"),
        ("augmentations[0].num_crops", 3, "exactly 2"),
        ("optimizer.name", "lars", "trial_lr" if RELEASE == "main" else "optimizer.name=lars"),
    ],
)
def test_configuration_errors(
    key: str, value: Any, words: str, config: Config, tmp_path: Path
) -> None:
    """One line that names the key; nothing is written."""
    cfg = config("out")
    OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    with pytest.raises(UserError) as caught:
        train(cfg)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(RELEASE == "main", reason="GitHub main takes a config")
def test_keywords_of_the_release() -> None:
    base = {
        **{"encoder": "resnet18", "num_classes": 2, "backbone_args": {}, "max_epochs": 1},
        **{"batch_size": 8, "optimizer": "sgd", "lars": False, "lr": 0.1, "weight_decay": 0.0},
        **{"classifier_lr": 0.1, "exclude_bias_n_norm": False, "accumulate_grad_batches": 1},
        **{"extra_optimizer_args": {}, "scheduler": "none", "min_lr": 0.0},
        **{"warmup_start_lr": 0.0, "warmup_epochs": 0},
        **{"num_large_crops": 2, "num_small_crops": 0},
    }
    # what solo-learn's own script passes to every method
    script = {"dataset": "custom", "data_dir": "x", "num_workers": 4, "gpus": [0], "precision": 16}
    assert MetaMask(**base, **SMALL_HEADS, **script).settings.alpha == 10
    for wrong, words in (
        ({"lars": True}, "lars=True"),
        ({"alhpa": 3}, "alhpa: unknown setting; did you mean alpha"),
        ({"mask": {"lrr": 3}}, "^mask.lrr: unknown setting; did you mean mask.lr"),
    ):
        with pytest.raises(UserError, match=words):
            MetaMask(**{**base, **wrong})


@pytest.mark.slow
def test_settings_that_do_nothing_get_one_warning(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config()
    meta = {"hypergradient": "plain", "trial_lr": 0.1, "radius": 0.5}
    cfg.method_kwargs.meta = {**meta, "every_n_steps": 3, "batch_fraction": 0.2}
    train(cfg, small=True)
    out, err = capsys.readouterr()
    (warning,) = [
        line for line in err.splitlines() if line.startswith("warning: these settings have")
    ]
    for name in ("every_n", "trial_lr", "radius", "fraction"):
        assert name in warning
    assert "mask updates: none" in out


def test_a_run_is_resumed_with_the_rates_of_its_file(
    config: Config, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another rate is taken from the file, another kind is refused in one line.

    A new fit, on the weights of a checkpoint, is another run.
    """
    _, first = train(config("first"), small=True)
    out, err = capsys.readouterr()
    assert "mask updates: 2" in out and "settings that do" not in err
    cfg = config("second", max_epochs=2, resume_from_checkpoint=str(first.checkpoint))
    cfg.method_kwargs.mask = {"kind": "linear"}
    with pytest.raises(UserError, match="mask.kind=linear: the checkpoint has sigmoid"):
        train(cfg, small=True)
    assert not (tmp_path / "second").exists()
    cfg.method_kwargs.mask = {"lr": 0.5}
    model, _ = train(cfg, small=True)
    assert model.mask_optimizer.updates == 4

    cfg = config("third")
    cfg.data.val_path = str(images / "val")
    model, cfg, loader, val_loader = prepare_pretraining(cfg)
    use_small_backbone(model)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", plugins=[SafeCheckpointIO()], **quiet)
    trainer.validate(model, val_loader, ckpt_path=str(first.checkpoint))
    trainer.fit(model, loader)
    assert model.mask_optimizer.updates == 2
    assert [step for step, _ in model.mask_optimizer.history] == [0, 2]
