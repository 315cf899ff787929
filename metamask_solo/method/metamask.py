"""MetaMask (Li et al., NeurIPS 2022, arXiv 2209.07902) as a method of solo-learn."""

import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from metamask_solo.errors import UserError
from metamask_solo.hosts import METHODS, PluginMethod
from metamask_solo.method.hypergradient import mask_hypergradient, mean_over_processes
from metamask_solo.method.losses import barlow_twins, nt_xent
from metamask_solo.method.mask import DimensionalMask, mask_statistics
from metamask_solo.method.mask_optimizer import MaskOptimizer
from metamask_solo.method.settings import LEAST_IMAGES, MetaMaskSettings, idle_settings


class MetaMask(PluginMethod):
    """Joint Barlow Twins and NT-Xent losses on masked features; the mask is meta-learned.

    Takes what solo-learn's methods take: a config on its GitHub main, with the settings of MetaMask
    (:class:`metamask_solo.method.settings.MetaMaskSettings`) under ``method_kwargs``; keyword
    arguments on 1.0.2 (``mask`` and ``meta`` are mappings).

    Raises:
        UserError: a setting is unknown, out of range, or does not fit the others.
    """

    # goes up when the same settings give other results: a benchmark then trains anew
    results_version = 1
    settings_model = MetaMaskSettings
    settings: MetaMaskSettings

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        settings = self.settings
        if (self.num_large_crops, self.num_small_crops) != (2, 0):
            raise UserError(
                f"augmentations: {self.num_large_crops} large and {self.num_small_crops} small "
                "crops; metamask needs exactly 2 large ones"
            )
        trial_step = settings.meta.enabled and settings.meta.hypergradient != "plain"
        if trial_step and settings.meta.trial_lr is None and self.optimizer_name == "lars":
            raise UserError(
                "method_kwargs.meta.trial_lr=null: the step of lars has no derivative; give the "
                "trial step a rate of its own, 1e-3 to start with"
            )
        self.mask = DimensionalMask(
            self.features_dim, settings.mask.kind, settings.mask.initial_logit
        )
        wide = settings.proj_hidden_dim
        self.redundancy_projector = _mlp(self.features_dim, wide, wide, settings.proj_output_dim)
        # named as in solo-learn: its tools read the projected features from "z"
        self.projector = _mlp(
            self.features_dim, settings.contrastive_hidden_dim, settings.contrastive_output_dim
        )
        self.mask_optimizer = MaskOptimizer(self.mask, settings.mask)
        self._kept: list[Tensor] = []  # of the batch: its views, or its features for the heads
        self._log: dict[str, Tensor] = {}

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
        settings = self.settings
        r1, r2 = (self.redundancy_projector(u) for u in out["feats"])
        z1, z2 = out["z"]
        barlow = barlow_twins(r1, r2, settings.lamb, settings.scale_loss)
        contrastive = nt_xent(z1, z2, settings.temperature)
        kept = out["plain_feats"] if settings.meta.trial_scope == "heads" else batch[1]
        used = round(settings.meta.batch_fraction * len(kept[0]))
        self._kept = [x.detach()[:used] for x in kept]
        losses = {"train_barlow_loss": barlow, "train_nce_loss": contrastive}
        self.log_dict(losses, on_epoch=True, sync_dist=True)
        return barlow + settings.alpha * contrastive + out["loss"]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The regular step, then the meta-update (algorithm 1, lines 5 to 7).

        The update runs once for each step that was taken, on the last of accumulated batches, and
        before any callback of the batch. A step that fp16 drops for an overflow is not taken.
        """
        steps_taken: list[bool] = []

        def note(optimizer: Any, *_: Any) -> None:
            # a fused optimiser skips the step on its own where this says so
            steps_taken.append(not float(getattr(optimizer, "found_inf", None) or 0))

        handle = self.trainer.optimizers[0].register_step_post_hook(note)
        try:
            super().optimizer_step(*args, **kwargs)
        finally:
            handle.remove()
        meta, batch = self.settings.meta, self._kept
        nth = (self.trainer.global_step + 1) % meta.every_n_steps == 0  # Lightning counts later
        if any(steps_taken) and meta.enabled and nth and len(batch[0]) >= LEAST_IMAGES:
            self._update_mask(batch)
        self._kept = []

    def _update_mask(self, batch: Sequence[Tensor]) -> None:
        try:
            gradient = self.mask_gradient(batch)
        except UserError:  # a first one ends the run, a later one is of this batch alone
            if not self.mask_optimizer.updates:
                raise
            gradient = torch.full_like(self.mask.logits, math.nan)  # skipped by all processes
        gradient = mean_over_processes(gradient)
        due = self.trainer.global_step // self.settings.meta.every_n_steps
        moved = self.mask_optimizer.step(gradient, due)
        statistics = mask_statistics(self.mask.mask())
        self._log = {f"mask_{name}": value.float() for name, value in statistics.items()}
        self._log["mask_skipped_updates"] = torch.tensor(float(self.mask_optimizer.skipped))
        if moved:
            self._log["hypergradient_norm"] = gradient.norm()

    def mask_gradient(self, batch: Sequence[Tensor]) -> Tensor:
        """The hypergradient of the mask logits on one batch, as ``method_kwargs.meta`` asks.

        Runs in the precision of the training step, but in single precision where that is fp16, and
        where it is bf16 with finite_difference, whose differences would be rounding.

        Args:
            batch: the images used of the two views, N × C × H × W each; with ``trial_scope`` heads
                their plain features, N × D each.

        Returns:
            Gradient of the shape (D,) of the mask logits, of this process alone.
        """
        meta, heads = self.settings.meta, self.settings.meta.trial_scope == "heads"
        precision = self.trainer.precision_plugin
        name, difference = str(precision.precision), meta.hypergradient == "finite_difference"
        single = name == "16-mixed" or (name == "bf16-mixed" and difference)
        x1, x2 = batch if heads else map(self.to_memory_format, batch)
        if single:
            x1, x2 = x1.float(), x2.float()

        def loss() -> Tensor:
            h1, h2 = (x1, x2) if heads else (self.backbone(x1), self.backbone(x2))
            z1, z2 = (self.projector(self.mask(h)) for h in (h1, h2))
            return nt_xent(z1, z2, self.settings.temperature, gather=False)

        modules = [self.projector] if heads else [self.backbone, self.projector]
        # plain takes no trial step: one of rate 0
        method, rate = (
            ("first_order", 0.0)
            if meta.hypergradient == "plain"
            else (meta.hypergradient, meta.trial_lr)
        )
        with nullcontext() if single else precision.forward_context():
            optimizer = self.trainer.optimizers[0]
            return mask_hypergradient(
                loss, modules, self.mask, optimizer, method, lr=rate, radius=meta.radius
            )

    def on_train_start(self) -> None:
        """Starts the mask's optimiser; warns of settings that have no effect."""
        super().on_train_start()
        meta, steps = self.settings.meta, self.trainer.estimated_stepping_batches
        self.mask_optimizer.start(self.trainer.global_step, steps / meta.every_n_steps)
        idle = idle_settings(self.settings, steps, self.batch_size)
        if self.trainer.is_global_zero and idle:
            print(f"warning: these settings have no effect: {'; '.join(idle)}", file=sys.stderr)

    def on_train_batch_end(self, outputs: Any, batch: Sequence[Any], batch_idx: int) -> None:
        """Logs the mask of this step, which Lightning does not allow in ``optimizer_step``."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        log, self._log = self._log, {}
        self.log_dict(log)

    def on_train_epoch_end(self) -> None:
        """Keeps the mask of this epoch for the analysis."""
        super().on_train_epoch_end()
        self.mask_optimizer.remember(self.trainer.global_step)

    def on_train_end(self) -> None:
        """Says how often the mask moved."""
        super().on_train_end()
        if self.trainer.is_global_zero:
            updates, skipped = self.mask_optimizer.updates, self.mask_optimizer.skipped
            words = f", and {skipped} skipped" if skipped else ""
            print(f"mask updates: {updates or 'none; the mask has not changed'}{words}")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the mask's optimiser and history to the checkpoint."""
        super().on_save_checkpoint(checkpoint)
        # callbacks save before on_train_epoch_end of the module
        self.mask_optimizer.remember(self.trainer.global_step)
        checkpoint["metamask"] = self.mask_optimizer.state_dict()

    def check_resumable(self, checkpoint: Mapping[str, Any]) -> None:
        """Raises UserError if the checkpoint has another kind or optimiser of the mask."""
        self.mask_optimizer.check(checkpoint.get("metamask", {}))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the mask's state back."""
        super().on_load_checkpoint(checkpoint)
        self.mask_optimizer.load_state_dict(checkpoint.get("metamask", {}))


def _mlp(*sizes: int) -> nn.Sequential:
    """Linear layers, each with BatchNorm, with ReLU between them (the paper's appendix)."""
    layers: list[nn.Module] = []
    for i, (wide, narrow) in enumerate(zip(sizes, sizes[1:], strict=False)):
        if i > 0:
            layers.append(nn.ReLU())
        layers += [nn.Linear(wide, narrow, bias=False), nn.BatchNorm1d(narrow)]
    return nn.Sequential(*layers)


METHODS["metamask"] = MetaMask
