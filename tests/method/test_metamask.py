"""The method on the installed release of solo-learn."""

import copy
import math
import pydoc
from pathlib import Path
from typing import Any

import pytest
import torch
from definitions import plain_barlow, plain_nt_xent
from omegaconf import OmegaConf
from runs import SMALL_HEADS, pretrain_config, train
from torch import nn
from torch.func import functional_call

from metamask_solo import MetaMask
from metamask_solo.errors import UserError
from metamask_solo.hosts import METHODS, RELEASE, pl
from metamask_solo.method.mask import mask_statistics
from metamask_solo.method.settings import SETTINGS
from metamask_solo.validation import allowed


class Snapshots(pl.Callback):  # type: ignore[name-defined]
    """Keeps what the mask update must leave alone, from just before each one."""

    def __init__(self) -> None:
        self.before: list[torch.Tensor] = []
        self.moved = 0
        self.same: list[bool] = []

    def watched(self, model: Any) -> list[torch.Tensor]:
        rest = [t for name, t in model.state_dict().items() if name != "mask.logits"]
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        state = [
            v
            for s in model.trainer.optimizers[0].state.values()
            for v in s.values()
            if isinstance(v, torch.Tensor)
        ]
        return [t.clone() for t in [*rest, *grads, *state, torch.get_rng_state()]]

    def wrap(self, model: Any) -> None:
        update = model._update_mask

        def watched_update(views: Any) -> None:
            before, mask = self.watched(model), model.mask.logits.clone()
            update(views)
            after = self.watched(model)
            self.same.append(
                len(before) == len(after)
                and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            )
            self.moved += int(not torch.equal(mask, model.mask.logits))

        model._update_mask = watched_update

    def on_train_start(self, trainer: Any, model: Any) -> None:
        self.wrap(model)


def test_registered() -> None:
    assert METHODS["metamask"] is MetaMask


@pytest.mark.slow
@pytest.mark.parametrize(
    "meta",
    [
        {},
        {"hypergradient": "finite_difference"},
        {"hypergradient": "first_order"},
        {"hypergradient": "plain"},
        {"trial_scope": "heads"},
        {"batch_fraction": 0.5},
    ],
    ids=lambda meta: "-".join(map(str, meta.values())) or "exact",
)
def test_the_update_leaves_everything_but_the_mask(
    meta: dict[str, Any], images: Path, tmp_path: Path
) -> None:
    cfg = pretrain_config(images, tmp_path, method_kwargs__meta=meta)
    cfg.data.val_path = None
    watch = Snapshots()
    train(cfg, watch, small=True)
    assert watch.same == [True, True]
    assert watch.moved == 2


@pytest.mark.slow
def test_the_joint_loss_and_its_gradient(images: Path, tmp_path: Path) -> None:
    """training_step against plain definitions of both losses, in float64."""
    cfg = pretrain_config(images, tmp_path, precision="64-true", log_every_n_steps=1)
    cfg.method_kwargs.update(alpha=3.0, scale_loss=0.1, lamb=0.02, temperature=0.3)
    seen: dict[str, float] = {}

    class Watch(pl.Callback):  # type: ignore[name-defined]
        def on_train_batch_start(self, trainer: Any, model: Any, batch: Any, i: int) -> None:
            if seen:
                return
            twin = copy.deepcopy(model)
            h = [twin.backbone(x.double()) for x in batch[1]]
            u = [x * torch.sigmoid(twin.mask.logits) for x in h]
            r = [twin.redundancy_projector(x) for x in u]
            z = [twin.projector(x) for x in u]
            seen["barlow"] = 0.1 * float(plain_barlow(*r, 0.02))
            seen["contrastive"] = float(plain_nt_xent(*z, 0.3))

    model, result = train(cfg, Watch(), small=True)
    logged = (result.folder / "metrics.csv").read_text()
    assert "train_nce_loss_step" in logged or "train_nce_loss" in logged
    first = next(
        row for row in rows(result.folder) if row.get("train_nce_loss_step") not in (None, "")
    )
    assert math.isclose(float(first["train_barlow_loss_step"]), seen["barlow"], rel_tol=1e-9)
    assert math.isclose(float(first["train_nce_loss_step"]), seen["contrastive"], rel_tol=1e-9)


def rows(folder: Path) -> list[dict[str, str]]:
    from metamask_solo.training.resume import read_metrics

    return read_metrics(folder)


def by_double_backward(model: Any, views: list[torch.Tensor]) -> torch.Tensor:
    """The hypergradient of a sigmoid mask by definition, on copies of the network."""
    own = nn.ModuleList([model.backbone, model.projector])
    twin, optimizer = copy.deepcopy(own).requires_grad_(), model.trainer.optimizers[0]
    logits = model.mask.logits.detach().clone().requires_grad_()

    def loss(params: dict[str, torch.Tensor]) -> torch.Tensor:
        backbone, projector = (
            lambda x, i=i: functional_call(
                twin[i], {n[2:]: p for n, p in params.items() if n[0] == str(i)}, (x,)
            )
            for i in (0, 1)
        )
        z1, z2 = (projector(backbone(x) * torch.sigmoid(logits)) for x in views)
        return plain_nt_xent(z1, z2, model.settings.temperature)

    params = dict(twin.named_parameters())
    gradient = torch.autograd.grad(loss(params), list(params.values()), create_graph=True)
    moved = {}
    for (name, p), g, original in zip(params.items(), gradient, own.parameters(), strict=True):
        (group,) = [x for x in optimizer.param_groups if any(original is q for q in x["params"])]
        buffer = optimizer.state[original].get("momentum_buffer")
        step = g + group["weight_decay"] * p
        step = step if buffer is None else group["momentum"] * buffer + step
        moved[name] = p - group["lr"] * step
    return torch.autograd.grad(loss(moved), logits)[0]


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_update_is_one_optimiser_step_along_the_hypergradient(
    momentum: float, images: Path, tmp_path: Path
) -> None:
    cfg = pretrain_config(images, tmp_path, precision="64-true", log_every_n_steps=1)
    cfg.method_kwargs.mask = {"lr": 0.5, "momentum": momentum, "weight_decay": 0.1}
    steps: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    class Watch(pl.Callback):  # type: ignore[name-defined]
        def on_train_start(self, trainer: Any, model: Any) -> None:
            update = model._update_mask

            def watched(views: Any) -> None:
                g = by_double_backward(model, views)
                before = model.mask.logits.clone()
                update(views)
                steps.append((before, g, model.mask.logits.clone()))

            model._update_mask = watched

    train(cfg, Watch(), small=True)
    buffer = torch.zeros_like(steps[0][0])
    for i, (before, g, after) in enumerate(steps):
        d = g + 0.1 * before
        buffer = d if i == 0 else momentum * buffer + d
        torch.testing.assert_close(after, before - 0.5 * buffer, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_every_n_steps_and_accumulation(images: Path, tmp_path: Path) -> None:
    """The update follows real optimiser steps, and uses the last accumulated batch."""
    calls: list[tuple[int, int]] = []

    class Watch(pl.Callback):  # type: ignore[name-defined]
        def on_train_start(self, trainer: Any, model: Any) -> None:
            update = model._update_mask

            def watched(views: Any) -> None:
                calls.append((trainer.global_step, int(self.batch)))
                update(views)

            model._update_mask = watched

        def on_train_batch_start(self, trainer: Any, model: Any, batch: Any, i: int) -> None:
            self.batch = i

    cfg = pretrain_config(images, tmp_path, accumulate_grad_batches=2, max_epochs=2)
    cfg.optimizer.batch_size = 5
    cfg.method_kwargs.meta = {"every_n_steps": 2}
    train(cfg, Watch(), small=True)
    assert calls == [(1, 3), (3, 3)]


@pytest.mark.slow
def test_gradient_clipping_leaves_the_mask_alone(images: Path, tmp_path: Path) -> None:
    """Clipping to nothing stops the network, not the mask; mask.clip_grad bounds the mask."""
    free, _ = train(pretrain_config(images, tmp_path / "a", gradient_clip_val=1e-12), small=True)
    assert float(free.mask.logits.abs().max()) > 1e-9
    cfg = pretrain_config(images, tmp_path / "b")
    cfg.method_kwargs.mask = {"clip_grad": 1e-6, "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0}
    clipped, _ = train(cfg, small=True)
    assert 0 < float(clipped.mask.logits.norm()) <= 2.1e-6


@pytest.mark.slow
def test_a_bad_hypergradient_is_skipped_counted_and_logged(images: Path, tmp_path: Path) -> None:
    class Poison(pl.Callback):  # type: ignore[name-defined]
        def on_train_start(self, trainer: Any, model: Any) -> None:
            real = model.mask_gradient
            model.mask_gradient = lambda views: (
                real(views) * float("nan") if trainer.global_step == 1 else real(views)
            )

    model, result = train(
        pretrain_config(images, tmp_path, log_every_n_steps=1), Poison(), small=True
    )
    assert model.mask_optimizer.skipped == 1
    assert model.mask.logits.isfinite().all()
    assert int(model.mask_optimizer.optimizer.state[model.mask.logits]["momentum_buffer"].numel())
    logged = [
        r["mask_skipped_updates"] for r in rows(result.folder) if r.get("mask_skipped_updates")
    ]
    assert float(logged[-1]) == 1.0


@pytest.mark.slow
def test_logged_statistics(images: Path, tmp_path: Path) -> None:
    model, result = train(pretrain_config(images, tmp_path, log_every_n_steps=1), small=True)
    last = [r for r in rows(result.folder) if r.get("mask_mean")][-1]
    for name, value in mask_statistics(model.mask.mask()).items():
        assert math.isclose(float(last[f"mask_{name}"]), float(value), rel_tol=1e-4, abs_tol=1e-6)
    assert float(last["hypergradient_norm"]) > 0


@pytest.mark.slow
def test_masked_features_everywhere(images: Path, tmp_path: Path) -> None:
    model, _ = train(pretrain_config(images, tmp_path), small=True)
    model.eval()
    x = torch.randn(3, 3, 32, 32)
    out = model(x)
    expected = model.backbone(x) * torch.sigmoid(model.mask.logits)
    torch.testing.assert_close(out["feats"], expected)
    torch.testing.assert_close(out["logits"], model.classifier(expected))
    torch.testing.assert_close(out["z"], model.projector(expected))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method_kwargs.tempreature": 0.1}, "did you mean method_kwargs.temperature"),
        ({"method_kwargs.temperature": 0}, "temperature=0"),
        ({"method_kwargs.temperature": "warm"}, "temperature=warm: Input should be a valid number"),
        ({"method_kwargs.proj_hidden_dim": 2.5}, "a valid integer"),
        ({"method_kwargs.mask.kind": "relu"}, "'sigmoid' or 'linear'"),
        ({"method_kwargs.mask": 3}, "dictionary"),
        ({"method_kwargs.mask.lr": -1}, "mask.lr=-1"),
        ({"method_kwargs.mask.momentum": 1.0}, "less than 1"),
        ({"method_kwargs.meta.enabled": "yes"}, "valid boolean"),
        ({"method_kwargs.meta.hypergradient": ["exact"]}, "hypergradient=['exact']"),
        ({"method_kwargs.meta.batch_fraction": 0}, "batch_fraction=0"),
        ({"method_kwargs.meta.every_n_steps": 0}, "every_n_steps=0"),
        ({"method_kwargs.meta.every_n_setps": 1}, "every_n_steps"),
        ({"method_kwargs.mask.initial_logit": 17}, "mask.initial_logit=17"),
        (
            {"method_kwargs.mask": {"kind": "linear", "initial_logit": 1e-9}},
            "mask.initial_logit=1e-09",
        ),
        ({"method": "metamsk"}, "method=metamsk"),
        ({"augmentations[0].num_crops": 3}, "exactly 2"),
        ({"optimizer.name": "lars"}, "trial_lr" if RELEASE == "main" else "optimizer.name=lars"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else None,
)
def test_configuration_errors(
    changes: dict[str, Any], words: str, images: Path, tmp_path: Path
) -> None:
    """One line that names the key; nothing is written."""
    cfg = pretrain_config(images, tmp_path / "out")
    for key, value in changes.items():
        OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    with pytest.raises(UserError) as caught:
        train(cfg)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("rate", [None, 0.01])
def test_other_optimisers(rate: float | None, images: Path, tmp_path: Path) -> None:
    cfg = pretrain_config(images, tmp_path, optimizer__name="adamw", optimizer__lr=1e-3)
    cfg.method_kwargs.meta = {"trial_lr": rate}
    watch = Snapshots()
    train(cfg, watch, small=True)
    assert watch.same == [True, True] and watch.moved == 2


def test_with_more_images_the_same_fraction_is_taken(images: Path, tmp_path: Path) -> None:
    cfg = pretrain_config(images, tmp_path, method_kwargs__meta={"batch_fraction": 0.3})
    cfg.optimizer.batch_size = 20
    model, _ = train(cfg, small=True)
    assert model.mask_optimizer.updates == 1


@pytest.mark.parametrize("logit", [-10.0, 10.0])
def test_the_largest_initial_logit_has_its_derivative(logit: float) -> None:
    """In single precision, to 0.2 %; at 17 there is none."""

    def derivative(at: float) -> float:
        a = torch.tensor(at, requires_grad=True)
        torch.sigmoid(a).backward()
        return float(a.grad)  # type: ignore[arg-type]

    exact = 1 / (2 + math.exp(logit) + math.exp(-logit))
    assert derivative(logit) == pytest.approx(exact, rel=2e-3)
    assert derivative(17.0) == 0


def test_unknown_keywords_are_refused() -> None:
    """A config has its own check; 1.0.2's base class takes any keyword without a word."""
    from metamask_solo.hosts import RELEASE

    if RELEASE == "main":
        pytest.skip("GitHub main takes a config")
    base = {
        "encoder": "resnet18",
        "num_classes": 2,
        "backbone_args": {},
        "max_epochs": 1,
        "batch_size": 8,
        "optimizer": "sgd",
        "lars": False,
        "lr": 0.1,
        "weight_decay": 0.0,
        "classifier_lr": 0.1,
        "exclude_bias_n_norm": False,
        "accumulate_grad_batches": 1,
        "extra_optimizer_args": {},
        "scheduler": "none",
        "min_lr": 0.0,
        "warmup_start_lr": 0.0,
        "warmup_epochs": 0,
        "num_large_crops": 2,
        "num_small_crops": 0,
    }
    # what solo-learn's own script passes to every method
    script = {"dataset": "custom", "data_dir": "x", "num_workers": 4, "gpus": [0], "precision": 16}
    assert METHODS["metamask"](**base, **SMALL_HEADS, **script).settings.alpha == 10
    with pytest.raises(UserError, match="alhpa=3: unknown setting; did you mean alpha"):
        METHODS["metamask"](**base, alhpa=3)
    with pytest.raises(UserError, match="lars=True"):
        METHODS["metamask"](**{**base, "lars": True})
    with pytest.raises(UserError, match="^mask.lrr: unknown setting; did you mean mask.lr"):
        METHODS["metamask"](**base, mask={"lrr": 3})


def test_the_help_shows_every_setting() -> None:
    text = pydoc.render_doc(MetaMask, renderer=pydoc.plaintext)
    for name, setting in SETTINGS.items():
        assert f"{name} = " in text and setting.description in text and allowed(setting) in text


def train_with(settings: dict[str, Any], cfg: Any) -> None:
    """Trains a small network with settings of the method, without validation."""
    cfg.data.val_path = None
    cfg.method_kwargs.update(settings)
    train(cfg, small=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "words", "updates"),
    [
        ({}, [], "2"),
        ({"mask": {"lr": 0}}, ["mask.lr=0"], "2"),
        ({"meta": {"every_n_steps": 3}}, ["meta.every_n_steps=3", "2 steps"], "none"),
        (
            {"meta": {"hypergradient": "plain", "trial_lr": 0.1, "radius": 0.5}},
            ["meta.trial_lr=0.1", "meta.radius=0.5"],
            "2",
        ),
        ({"alpha": 0, "scale_loss": 0}, ["alpha=0 and scale_loss=0"], "2"),
        ({"meta": {"enabled": False}, "mask": {"lr": 0.5}}, [], "none"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_settings_that_do_nothing_get_one_warning(
    settings: dict[str, Any],
    words: list[str],
    updates: str,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train_with(settings, pretrain_config(images, tmp_path))
    out, err = capsys.readouterr()
    warnings = [line for line in err.splitlines() if line.startswith("warning: settings that do")]
    assert len(warnings) == bool(words)
    assert all(word in warnings[0] for word in words)
    (line,) = [line for line in out.splitlines() if line.startswith("mask updates: ")]
    assert line.startswith(f"mask updates: {updates}")


def test_a_run_is_resumed_with_the_rates_of_its_file(images: Path, tmp_path: Path) -> None:
    """Another rate is taken from the file, another kind is refused in one line."""
    _, first = train(pretrain_config(images, tmp_path / "first"), small=True)
    cfg = pretrain_config(images, tmp_path / "second", max_epochs=2)
    cfg.resume_from_checkpoint = str(first.checkpoint)
    cfg.method_kwargs.mask = {"kind": "linear"}
    with pytest.raises(UserError, match="mask.kind=linear: the checkpoint has sigmoid"):
        train(cfg, small=True)
    assert not (tmp_path / "second").exists()
    cfg.method_kwargs.mask = {"lr": 0.5}
    model, _ = train(cfg, small=True)
    assert model.mask_optimizer.updates == 4


class EveryStep(pl.Callback):  # type: ignore[name-defined]
    """The mask that a checkpoint of a step would hold, and the mask after the step."""

    def __init__(self) -> None:
        self.saved: list[torch.Tensor] = []
        self.later: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Any, model: Any, *_: Any) -> None:
        self.saved.append(model.mask.logits.clone())

    def on_train_batch_start(self, trainer: Any, model: Any, *_: Any) -> None:
        self.later.append(model.mask.logits.clone())


def test_a_callback_of_a_step_sees_the_mask_of_that_step(images: Path, tmp_path: Path) -> None:
    watch = EveryStep()
    model, _ = train(pretrain_config(images, tmp_path), watch, small=True)
    after = [*watch.later[1:], model.mask.logits]
    assert all(torch.equal(a, b) for a, b in zip(watch.saved, after, strict=True))
    assert not torch.equal(watch.saved[0], watch.later[0])


@pytest.mark.slow
def test_a_batch_of_two_trains_without_moving_the_mask(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = pretrain_config(images, tmp_path, limit_train_batches=2)
    cfg.optimizer.batch_size = 2
    model, _ = train(cfg, small=True)
    assert model.mask_optimizer.updates == 0 and float(model.mask.logits.abs().max()) == 0
    assert "optimizer.batch_size=2" in capsys.readouterr().err
