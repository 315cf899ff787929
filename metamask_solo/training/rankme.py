"""RankMe of the backbone's features while training: a measure of quality that needs no labels."""

from typing import Any

import torch
from torch import Tensor

from metamask_solo.evaluation.features import effective_rank
from metamask_solo.hosts import pl

TREND_EPOCHS = 5


class RankMe(pl.Callback):  # type: ignore[name-defined]
    """Logs ``train_rankme`` after each epoch, and ``train_rankme_trend``.

    The features are those that training computes anyway, of all views of all steps of the epoch.
    Kept of them is the sum of h hᵀ alone, D × D numbers, whatever the number of images. With a
    mask, ``train_rankme_masked`` is that of the masked features with the mask at the epoch's end.
    The trend is the slope of a line through the last five epochs, in directions per epoch: below
    zero, the features collapse.
    """

    def __init__(self) -> None:
        self.history: list[float] = []
        self._second: Tensor | None = None
        self._listening = False
        self._handle: Any = None

    def on_train_start(self, trainer: Any, model: Any) -> None:
        backbone = getattr(model, "backbone", None) or model.encoder
        self._handle = backbone.register_forward_hook(self._hear)

    def on_train_end(self, trainer: Any, model: Any) -> None:
        self._stop()

    def on_exception(self, trainer: Any, model: Any, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def on_train_epoch_start(self, trainer: Any, model: Any) -> None:
        self._second = None

    def on_train_batch_start(self, trainer: Any, model: Any, batch: Any, batch_idx: int) -> None:
        self._listening = True

    def on_before_backward(self, trainer: Any, model: Any, loss: Any) -> None:
        # what follows, such as the mask's update, runs the backbone on the same images again
        self._listening = False

    @torch.no_grad()
    def _hear(self, module: Any, inputs: Any, output: Any) -> None:
        if not self._listening or not isinstance(output, Tensor) or output.ndim != 2:
            return
        features = output.detach()
        if features.device.type == "mps":  # which has no float64
            features = features.cpu()
        # double: the root of what single precision rounds away would count as directions
        features = features.double()
        second = features.T @ features
        self._second = second if self._second is None else self._second + second

    def on_train_epoch_end(self, trainer: Any, model: Any) -> None:
        if self._second is None:
            return
        second = self._second
        if trainer.world_size > 1:
            second = trainer.strategy.reduce(second, reduce_op="sum")
        self._second = None
        if not second.isfinite().all():  # another callback stops the run
            return
        rank = effective_rank(second)
        self.history.append(rank)
        log = {"train_rankme": rank}
        if (slope := trend(self.history[-TREND_EPOCHS:])) is not None:
            log["train_rankme_trend"] = slope
        mask = getattr(model, "mask", None)
        if mask is not None and hasattr(mask, "mask"):
            m = mask.mask().detach().double().to(second.device)
            log["train_rankme_masked"] = effective_rank(second * m * m[:, None])
        for name, value in log.items():
            model.log(name, value, sync_dist=True)  # equal in all processes

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = list(state["history"])


def trend(values: list[float]) -> float | None:
    """Slope of the least-squares line through values one apart; None for fewer than two."""
    if len(values) < 2:
        return None
    x = torch.arange(len(values), dtype=torch.float64)
    x -= x.mean()
    return float((x * torch.tensor(values, dtype=torch.float64)).sum() / (x * x).sum())
