"""The bar that a terminal shows of a run."""

from typing import Any

from metamask_solo.hosts import pl


class Bar(pl.callbacks.TQDMProgressBar):  # type: ignore[name-defined]
    """Lightning's bar with the loss, the online kNN and the spread of the mask."""

    def __init__(self, refresh_rate: int = 1):
        super().__init__(refresh_rate)
        self._loss: Any = None

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        """What stands behind the bar."""
        known = trainer.callback_metrics
        shown: dict[str, Any] = {}
        if self._loss is not None:
            shown["loss"] = f"{float(self._loss):.3f}"
        for name, key in (("online kNN %", "val_knn_acc1"), ("acc %", "val_acc1")):
            if key in known:
                shown[name] = f"{float(known[key]):.1f}"
        if "mask_min" in known and "mask_max" in known:
            shown["mask"] = f"{float(known['mask_min']):.3f}–{float(known['mask_max']):.3f}"
        return shown


def progress_callbacks(enabled: Any) -> list[Any]:
    """The bar, unless ``enable_progress_bar`` is off."""
    return [] if enabled is False else [Bar()]
