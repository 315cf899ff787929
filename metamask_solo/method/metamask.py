"""MetaMask (Li et al., NeurIPS 2022, arXiv 2209.07902) as a method of solo-learn."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metamask_solo.errors import UserError
from metamask_solo.hosts import (
    METHODS,
    PluginMethod,
    forward_context,
    optimizer_step_was_skipped,
)
from metamask_solo.method.losses import barlow_twins, nt_xent
from metamask_solo.method.mask import DimensionalMask, mask_statistics
from metamask_solo.method.meta_update import MaskOptimizer, mask_hypergradient, mean_over_processes
from metamask_solo.method.settings import NAMES, resolve_settings

FP16_LOSS_SCALE = 2.0**10


class MetaMask(PluginMethod):
    """Joint Barlow Twins and NT-Xent losses on masked features; the mask is meta-learned.

    Takes what its neighbours take: a config on solo-learn's GitHub main, keyword arguments on
    1.0.2. Its settings, their defaults and ranges stand in :mod:`metamask_solo.method.settings`.

    Raises:
        UserError: a setting is unknown, out of range, or does not fit the others.
    """

    setting_names = NAMES
    resolve_settings = staticmethod(resolve_settings)

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        settings = self.method_settings
        self.lamb: float = settings["lamb"]
        self.scale_loss: float = settings["scale_loss"]
        self.temperature: float = settings["temperature"]
        self.alpha: float = settings["alpha"]
        self.mask_settings: dict[str, Any] = settings["mask"]
        self.meta: dict[str, Any] = settings["meta"]
        self._check_fits()

        kind, initial = self.mask_settings["kind"], self.mask_settings["initial_logit"]
        self.mask = DimensionalMask(self.features_dim, kind, initial)
        self.redundancy_projector = _mlp(
            self.features_dim,
            settings["proj_hidden_dim"],
            settings["proj_hidden_dim"],
            settings["proj_output_dim"],
        )
        # named as in solo-learn: its tools read the projected features from "z"
        self.projector = _mlp(
            self.features_dim,
            settings["contrastive_hidden_dim"],
            settings["contrastive_output_dim"],
        )
        self.mask_optimizer: MaskOptimizer | None = None
        self.mask_history: list[tuple[int, Tensor]] = []
        self._restored: Mapping[str, Any] | None = None
        self._plain_features: list[Tensor] = []
        self._last_step = 0

    def _check_fits(self) -> None:
        if (self.num_large_crops, self.num_small_crops) != (2, 0):
            raise UserError(
                f"augmentations: {self.num_large_crops} large and {self.num_small_crops} small "
                "crops; metamask needs exactly 2 large ones"
            )
        meta = self.meta
        needs_rate = meta["enabled"] and meta["hypergradient"] != "plain"
        if needs_rate and meta["trial_lr"] is None and self.optimizer_name != "sgd":
            raise UserError(
                "method_kwargs.meta.trial_lr=null: the rate of optimizer "
                f"{self.optimizer_name} is not that of a gradient step; give a number"
            )

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        """The host's parameters and both heads; the mask has its own optimiser."""
        heads = ("redundancy_projector", "projector")
        return super().learnable_params + [
            {"name": name, "params": getattr(self, name).parameters()} for name in heads
        ]

    def forward(self, X: Tensor) -> dict[str, Tensor]:
        """Class logits, masked features, plain features and contrastive projection of images.

        Args:
            X: images, N × C × H × W.

        Returns:
            ``logits`` (N × classes, no gradient to the features), ``feats`` (masked, N × D),
            ``plain_feats`` (N × D), ``z`` (N × contrastive_output_dim).
        """
        plain = self.backbone(self.to_memory_format(X))
        masked = self.mask(plain)
        return {
            "logits": self.classifier(masked.detach()),
            "feats": masked,
            "plain_feats": plain,
            "z": self.projector(masked),
        }

    def training_step(self, batch: Sequence[Any], batch_idx: int) -> Tensor:
        """The regular step (algorithm 1, line 4), with the mask held fixed.

        Args:
            batch: image indexes, [view 1, view 2], class labels.
            batch_idx: index of the batch.

        Returns:
            Barlow Twins loss + alpha · NT-Xent + loss of the online classifier.
        """
        out = super().training_step(batch, batch_idx)
        r1, r2 = (self.redundancy_projector(u) for u in out["feats"])
        z1, z2 = out["z"]
        barlow = barlow_twins(r1, r2, self.lamb, self.scale_loss)
        contrastive = nt_xent(z1, z2, self.temperature)
        if self.meta["trial_scope"] == "heads":
            self._plain_features = [h.detach() for h in out["plain_feats"]]
        self.log_dict(
            {"train_barlow_loss": barlow, "train_nce_loss": contrastive},
            on_epoch=True,
            sync_dist=True,
        )
        return barlow + self.alpha * contrastive + out["loss"]

    def on_train_start(self) -> None:
        """Makes the mask's optimiser, and gives it the state of the checkpoint, if any."""
        super().on_train_start()
        self._last_step = self.trainer.global_step
        chosen = {k: v for k, v in self.mask_settings.items() if k not in ("kind", "initial_logit")}
        steps = self.trainer.estimated_stepping_batches
        if chosen["schedule"] == "cosine" and math.isinf(steps):
            raise UserError("method_kwargs.mask.schedule=cosine: needs max_epochs or max_steps")
        updates = 0 if math.isinf(steps) else math.ceil(steps / self.meta["every_n_steps"])
        self.mask_optimizer = MaskOptimizer(self.mask.logits, total_updates=updates, **chosen)
        if self._restored is not None:
            self.mask_optimizer.load_state_dict(self._restored["mask_optimizer"])
            self._restored = None
        self._remember_mask()

    def on_train_batch_end(self, outputs: Any, batch: Sequence[Any], batch_idx: int) -> None:
        """The meta-update hook (algorithm 1, lines 5 to 7).

        Runs once after each optimiser step that was really taken. With gradient accumulation it
        uses the last of the accumulated batches.
        """
        super().on_train_batch_end(outputs, batch, batch_idx)
        stepped = self.trainer.global_step > self._last_step
        self._last_step = self.trainer.global_step
        skipped = optimizer_step_was_skipped(self.trainer)
        if not stepped or skipped or not self.meta["enabled"]:
            return
        if self.trainer.global_step % self.meta["every_n_steps"] == 0:
            self._update_mask(batch[1])

    def _update_mask(self, views: Sequence[Tensor]) -> None:
        gradient = mean_over_processes(self.mask_gradient(views))
        assert self.mask_optimizer is not None  # made in on_train_start
        self.mask_optimizer.step(gradient)
        statistics = mask_statistics(self.mask.mask())
        log = {f"mask_{name}": value.float() for name, value in statistics.items()}
        log["mask_skipped_updates"] = torch.tensor(float(self.mask_optimizer.skipped))
        if gradient.isfinite().all():
            log["hypergradient_norm"] = gradient.norm()
        self.log_dict(log)

    def mask_gradient(self, views: Sequence[Tensor]) -> Tensor:
        """The hypergradient of the mask logits on one batch, as ``method_kwargs.meta`` asks.

        Runs in the precision of the training step. If half precision overflows, it is computed
        once more in single precision.

        Args:
            views: the two views of the batch, N × C × H × W each.

        Returns:
            Gradient of the shape (D,) of the mask logits, of this process alone.
        """
        with forward_context(self.trainer):
            gradient = self._mask_gradient(views)
            reduced_precision = torch.is_autocast_enabled(self.device.type)
        if reduced_precision and not gradient.isfinite().all():
            gradient = self._mask_gradient(views)
        return gradient

    def _mask_gradient(self, views: Sequence[Tensor]) -> Tensor:
        meta, kind = self.meta, self.device.type
        heads_only, plain = meta["trial_scope"] == "heads", meta["hypergradient"] == "plain"
        # two images are the least for which BatchNorm and NT-Xent have a meaning
        used = max(2, math.ceil(meta["batch_fraction"] * len(views[0])))
        if heads_only:
            features = [h[:used] for h in self._plain_features]
        else:
            images = [self.to_memory_format(x)[:used] for x in views]

        def loss() -> Tensor:
            h1, h2 = features if heads_only else map(self.backbone, images)
            z1, z2 = (self.projector(self.mask(h)) for h in (h1, h2))
            return nt_xent(z1, z2, self.temperature, gather=False)

        half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        return mask_hypergradient(
            loss,
            [self.projector] if heads_only else [self.backbone, self.projector],
            self.mask,
            self.trainer.optimizers[0],
            "exact" if plain else meta["hypergradient"],
            lr=0.0 if plain else meta["trial_lr"],
            momentum=meta["trial_momentum"],
            weight_decay=meta["trial_weight_decay"],
            radius=meta["radius"],
            loss_scale=FP16_LOSS_SCALE if half else 1.0,
            check=False,
        )

    def on_train_epoch_end(self) -> None:
        """Keeps the mask of this epoch for the analysis."""
        super().on_train_epoch_end()
        self._remember_mask()

    def _remember_mask(self) -> None:
        step = self.trainer.global_step
        if not self.mask_history or self.mask_history[-1][0] < step:
            self.mask_history.append((step, self.mask.mask().detach().float().cpu()))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the mask's optimiser, schedule, kind and history to the checkpoint."""
        super().on_save_checkpoint(checkpoint)
        self._remember_mask()  # callbacks save before on_train_epoch_end of the module
        state: dict[str, Any] = {"kind": self.mask.kind}
        if self.mask_optimizer is not None:
            state["mask_optimizer"] = self.mask_optimizer.state_dict()
        if self.mask_history:
            steps, masks = zip(*self.mask_history, strict=True)
            state["history"] = {"step": torch.tensor(steps), "mask": torch.stack(masks)}
        checkpoint["metamask"] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the mask's state back; its optimiser is made when training starts."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint.get("metamask", {})
        if state.get("kind", self.mask.kind) != self.mask.kind:
            raise UserError(
                f"method_kwargs.mask.kind={self.mask.kind}: the checkpoint has {state['kind']}"
            )
        self._restored = state if "mask_optimizer" in state else None
        history = state.get("history", {"step": [], "mask": []})
        self.mask_history = [
            (int(step), mask) for step, mask in zip(history["step"], history["mask"], strict=True)
        ]


def _mlp(*sizes: int) -> nn.Sequential:
    """Linear layers, each with BatchNorm, with ReLU between them (the paper's appendix)."""
    layers: list[nn.Module] = []
    for i, (wide, narrow) in enumerate(zip(sizes, sizes[1:], strict=False)):
        if i > 0:
            layers.append(nn.ReLU())
        layers += [nn.Linear(wide, narrow, bias=False), nn.BatchNorm1d(narrow)]
    return nn.Sequential(*layers)


METHODS["metamask"] = MetaMask
