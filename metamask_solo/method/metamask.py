"""MetaMask (Li et al., NeurIPS 2022, arXiv 2209.07902) as a method of solo-learn."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from textwrap import indent
from typing import Any

import torch
from torch import Tensor, nn

from metamask_solo.errors import UserError
from metamask_solo.hosts import (
    METHODS,
    PluginMethod,
    forward_context,
    step_was_dropped,
    watch_dropped_steps,
)
from metamask_solo.method.losses import barlow_twins, nt_xent
from metamask_solo.method.mask import DimensionalMask, mask_statistics
from metamask_solo.method.mask_learner import MaskLearner
from metamask_solo.method.meta_update import mask_hypergradient, mean_over_processes, trial_step
from metamask_solo.method.settings import MetaMaskSettings, describe_settings, idle_settings

FP16_LOSS_SCALE = 2.0**10
# BatchNorm over two images has no derivative but for its eps, over three hardly one: in single
# precision the hypergradient of a ResNet-18 is off by 110 %, 84 %, 12 % and 3 % with two to five
# images before any step (τ = 0.07)
LEAST_IMAGES = 4


class MetaMask(PluginMethod):
    """Joint Barlow Twins and NT-Xent losses on masked features; the mask is meta-learned.

    Takes what solo-learn's methods take: a config on its GitHub main, with the settings of MetaMask
    under ``method_kwargs``; keyword arguments on 1.0.2 (``mask`` and ``meta`` are mappings).

    Raises:
        UserError: a setting is unknown, out of range, or does not fit the others.

    Its settings, with their defaults and what is allowed:

    """

    __doc__ = (__doc__ or "") + indent(describe_settings(), "    ")

    settings_model = MetaMaskSettings
    settings: MetaMaskSettings

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        own = self.settings
        self._check_fits()

        self.mask = DimensionalMask(self.features_dim, own.mask.kind, own.mask.initial_logit)
        self.redundancy_projector = _mlp(
            self.features_dim, own.proj_hidden_dim, own.proj_hidden_dim, own.proj_output_dim
        )
        # named as in solo-learn: its tools read the projected features from "z"
        self.projector = _mlp(
            self.features_dim, own.contrastive_hidden_dim, own.contrastive_output_dim
        )
        self.mask_learner = MaskLearner(self.mask, own.mask, own.meta)
        self._plain_features: list[Tensor] = []

    def _images_used(self, images: int) -> int:
        """How many images of a batch the meta-update uses."""
        return math.ceil(self.settings.meta.batch_fraction * images)

    def _check_fits(self) -> None:
        if (self.num_large_crops, self.num_small_crops) != (2, 0):
            raise UserError(
                f"augmentations: {self.num_large_crops} large and {self.num_small_crops} small "
                "crops; metamask needs exactly 2 large ones"
            )
        meta = self.settings.meta
        used = self._images_used(self.batch_size)
        if meta.enabled and used < LEAST_IMAGES:
            raise UserError(
                f"method_kwargs.meta.batch_fraction={meta.batch_fraction}: leaves {used} of the "
                f"{self.batch_size} images of optimizer.batch_size to the meta-update; it needs at "
                f"least {LEAST_IMAGES}"
            )
        needs_rate = meta.enabled and meta.hypergradient != "plain"
        if needs_rate and meta.trial_lr is None and self.optimizer_name != "sgd":
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

    def unfreeze(self) -> None:
        """Makes all parameters trainable but the mask, which has its own optimiser."""
        super().unfreeze()
        self.mask.requires_grad_(False)

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
        own = self.settings
        barlow = barlow_twins(r1, r2, own.lamb, own.scale_loss)
        contrastive = nt_xent(z1, z2, own.temperature)
        if own.meta.trial_scope == "heads":
            self._plain_features = [h.detach() for h in out["plain_feats"]]
        self.log_dict(
            {"train_barlow_loss": barlow, "train_nce_loss": contrastive},
            on_epoch=True,
            sync_dist=True,
        )
        return barlow + own.alpha * contrastive + out["loss"]

    def on_train_start(self) -> None:
        """Starts the mask's optimiser; warns of settings that do nothing, and of half precision."""
        super().on_train_start()
        watch_dropped_steps(self.trainer)
        meta = self.settings.meta
        if meta.enabled and meta.hypergradient != "plain":
            # an optimiser that has no trial step is refused before anything is trained
            moved = dict(self.projector.named_parameters())
            trial_step(self.trainer.optimizers[0], moved, meta.trial_lr)
        steps = self.trainer.estimated_stepping_batches
        self.mask_learner.start(self.trainer.global_step, steps)
        idle = idle_settings(self.settings, steps, sgd=self.optimizer_name == "sgd")
        if idle and self.trainer.is_global_zero:
            print(f"warning: settings that do nothing: {'; '.join(idle)}", file=sys.stderr)
        if self.trainer.is_global_zero and self.trainer.global_step == 0:
            self._say_what_half_precision_does()

    def _say_what_half_precision_does(self) -> None:
        meta, precision = self.settings.meta, str(self.trainer.precision)
        mixed_term = meta.enabled and meta.hypergradient not in ("plain", "first_order")
        if mixed_term and meta.trial_scope == "all" and "16" in precision:
            print(
                f"note: precision={precision}: the first updates of the mask, of a backbone that "
                "has learned nothing yet, are mostly noise; not so with precision=32 or "
                "meta.trial_scope=heads",
                file=sys.stderr,
            )

    def on_train_batch_end(self, outputs: Any, batch: Sequence[Any], batch_idx: int) -> None:
        """The meta-update hook (algorithm 1, lines 5 to 7).

        Runs once after each optimiser step that was really taken. With gradient accumulation it
        uses the last of the accumulated batches.
        """
        super().on_train_batch_end(outputs, batch, batch_idx)
        dropped = step_was_dropped(self.trainer)
        if self.mask_learner.due(self.trainer.global_step, dropped):
            self._update_mask(batch[1])

    def _update_mask(self, views: Sequence[Tensor]) -> None:
        gradient = mean_over_processes(self.mask_gradient(views))
        self.mask_learner.step(gradient)
        statistics = mask_statistics(self.mask.mask())
        log = {f"mask_{name}": value.float() for name, value in statistics.items()}
        log["mask_skipped_updates"] = torch.tensor(float(self.mask_learner.skipped))
        if gradient.isfinite().all():
            log["hypergradient_norm"] = gradient.norm()
        self.log_dict(log)

    def on_train_end(self) -> None:
        """Says how often the mask moved."""
        super().on_train_end()
        if self.trainer.is_global_zero:
            updates = self.mask_learner.updates
            print(f"mask updates: {updates or 'none, the mask is what it was at the start'}")

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
        meta, kind = self.settings.meta, self.device.type
        heads_only = meta.trial_scope == "heads"
        # without a trial step all ways give the plain gradient
        plain = meta.hypergradient == "plain"
        used = self._images_used(len(views[0]))
        if heads_only:
            features = [h[:used] for h in self._plain_features]
        else:
            images = [self.to_memory_format(x)[:used] for x in views]

        def loss() -> Tensor:
            h1, h2 = features if heads_only else map(self.backbone, images)
            z1, z2 = (self.projector(self.mask(h)) for h in (h1, h2))
            return nt_xent(z1, z2, self.settings.temperature, gather=False)

        half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        return mask_hypergradient(
            loss,
            [self.projector] if heads_only else [self.backbone, self.projector],
            self.mask,
            self.trainer.optimizers[0],
            "exact" if meta.hypergradient == "plain" else meta.hypergradient,
            lr=0.0 if plain else meta.trial_lr,
            momentum=meta.trial_momentum,
            weight_decay=meta.trial_weight_decay,
            radius=meta.radius,
            loss_scale=FP16_LOSS_SCALE if half else 1.0,
            check=False,
        )

    def on_train_epoch_end(self) -> None:
        """Keeps the mask of this epoch for the analysis."""
        super().on_train_epoch_end()
        self.mask_learner.remember(self.trainer.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the mask's settings, optimiser and history to the checkpoint."""
        super().on_save_checkpoint(checkpoint)
        # callbacks save before on_train_epoch_end of the module
        self.mask_learner.remember(self.trainer.global_step)
        checkpoint["metamask"] = self.mask_learner.state_dict()

    def check_resumable(self, checkpoint: Mapping[str, Any]) -> None:
        """Raises UserError if the checkpoint's run has other settings of mask or meta-update."""
        self.mask_learner.check_same_settings(checkpoint.get("metamask", {}))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the mask's state back; refuses a run with other settings of mask or meta-update."""
        super().on_load_checkpoint(checkpoint)
        self.mask_learner.load_state_dict(checkpoint.get("metamask", {}))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MetaMask":
        """A cast to half precision passes the logits by: the mask's steps would be lost in it."""
        logits = self.mask.logits.detach()
        super()._apply(fn, recurse)
        own = self.mask.logits
        if own.dtype in (torch.float16, torch.bfloat16):
            own.data = logits.to(own.device)
        return self


def _mlp(*sizes: int) -> nn.Sequential:
    """Linear layers, each with BatchNorm, with ReLU between them (the paper's appendix)."""
    layers: list[nn.Module] = []
    for i, (wide, narrow) in enumerate(zip(sizes, sizes[1:], strict=False)):
        if i > 0:
            layers.append(nn.ReLU())
        layers += [nn.Linear(wide, narrow, bias=False), nn.BatchNorm1d(narrow)]
    return nn.Sequential(*layers)


METHODS["metamask"] = MetaMask
