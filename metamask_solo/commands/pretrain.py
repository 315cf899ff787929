"""``metamask-solo pretrain``: what solo-learn's main_pretrain.py does, on both releases."""

import sys
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

if TYPE_CHECKING:
    from metamask_solo.training.trainer import FitResult

HELP = "pretrain any method of solo-learn from a YAML file"


def main(argv: list[str]) -> None:
    """Hydra's command line: --config-path, --config-name, overrides, -m for sweeps."""
    from metamask_solo.training import hydra_app

    check_only = hydra_app.CHECK in argv
    argv = [a for a in argv if a != hydra_app.CHECK]
    hydra_app.run("pretrain", argv, check if check_only else pretrain)


def check(cfg: DictConfig) -> None:
    """Validates the config and builds model and data, without training or writing anything."""
    from metamask_solo.training.trainer import build_trainer

    _, prepared, *_ = _prepare(cfg)
    build_trainer(prepared, [], [])
    print(f"ok: {prepared.name}")


def pretrain(cfg: DictConfig) -> float:
    """Pretrains as ``cfg`` says; returns the final kNN accuracy (or 0 without one) for sweepers."""
    return pretrain_run(cfg).metrics.get("val_knn_acc1", 0.0)


def pretrain_run(
    cfg: DictConfig, reuse_finished: bool = False, callbacks: tuple[Any, ...] = ()
) -> "FitResult":
    """Pretrains, folds a MetaMask checkpoint (``fold_at_end``), and prints the last line.

    Args:
        cfg: a composed config.
        reuse_finished: a finished run of the same config is returned instead of a new one.
        callbacks: more Lightning callbacks.
    """
    from metamask_solo.training.trainer import finished_run, fit

    model, cfg, train_loader, val_loader = _prepare(cfg)
    done = finished_run(cfg, cfg.method) if reuse_finished else None
    if done is not None:
        print(f"finished already: {done.checkpoint}")
        return done
    result = fit(model, cfg, train_loader, val_loader, cfg.method, callbacks)
    if model.global_rank == 0:
        folded = cfg.method == "metamask" and cfg.get("fold_at_end", True)
        if folded and result.checkpoint is not None:
            _fold(result.checkpoint)
        print(result)
    return result


def _prepare(cfg: DictConfig) -> tuple[Any, DictConfig, Any, Any]:
    """Model, completed config and loaders; raises UserError before anything is written."""
    from torch.utils.data import DataLoader

    import metamask_solo  # noqa: F401  registers the method
    from metamask_solo.data.images import ReadableImages, evaluation_transform
    from metamask_solo.hosts import (
        build_method,
        classification_datasets,
        complete_pretrain_config,
        pl,
        pretrain_dataset,
    )
    from metamask_solo.training.config_checks import buildable, check_pretrain_config
    from metamask_solo.training.hydra_app import open_config
    from metamask_solo.training.trainer import training_loader

    cfg = open_config(cfg)
    check_pretrain_config(cfg)
    with buildable():
        cfg = complete_pretrain_config(cfg)
        pl.seed_everything(cfg.seed)
        model = build_method(cfg)
        train_loader = training_loader(pretrain_dataset(cfg), cfg)
        val_loader = None
        if cfg.data.val_path is not None and not cfg.data.no_labels:
            transform = evaluation_transform(cfg)
            _, val_dataset = classification_datasets(cfg, transform, transform)
            val_loader = DataLoader(
                ReadableImages(val_dataset),
                batch_size=cfg.optimizer.batch_size,
                num_workers=cfg.data.num_workers,
            )
        return model, cfg, train_loader, val_loader


def _fold(checkpoint: Any) -> None:
    from metamask_solo.checkpoints.folding import fold_checkpoint
    from metamask_solo.errors import UserError

    try:
        fold_checkpoint(checkpoint, checkpoint.parent / "folded", force=True)
    except UserError as error:  # a mask that cannot be folded is no reason to fail the run
        print(f"not folded: {error}")


if __name__ == "__main__":  # the other processes of DDP
    main(sys.argv[1:])
