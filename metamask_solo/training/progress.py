"""What a terminal shows of a run: the size of its model, and a bar."""

from typing import Any

from omegaconf import DictConfig

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


class Size(pl.Callback):  # type: ignore[name-defined]
    """One line in the place of Lightning's table, which tells of modules in evaluation mode."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero:
            parameters = list(pl_module.parameters())
            trained = sum(p.numel() for p in parameters if p.requires_grad)
            print(f"parameters: {sum(p.numel() for p in parameters):,}, trained: {trained:,}")


def progress_callbacks(cfg: DictConfig) -> list[Any]:
    """Size and bar, unless ``enable_model_summary`` or ``enable_progress_bar`` is off."""
    shown = {"enable_model_summary": Size, "enable_progress_bar": Bar}
    return [make() for key, make in shown.items() if cfg.get(key) is not False]
