"""Pretraining from a config: checks, model and data, the run, the folded checkpoint."""

from typing import Any

from omegaconf import DictConfig

from metamask_solo.checkpoints.folding import fold_checkpoint
from metamask_solo.data.datasets import pair_notes, say, write_fingerprints
from metamask_solo.data.loaders import (
    classification_dataset,
    count_classes,
    plain_loader,
    pretrain_dataset,
)
from metamask_solo.data.transforms import evaluation_transform
from metamask_solo.errors import UserError
from metamask_solo.hosts import (
    build_method,
    complete_pretrain_config,
    pl,
    refuse_known_faults,
)
from metamask_solo.training.config_checks import (
    buildable,
    check_faults,
    check_pretrain_config,
)
from metamask_solo.training.endings import print_ending
from metamask_solo.training.hydra_app import open_config
from metamask_solo.training.rankme import RankMe
from metamask_solo.training.resume import FitResult, finished_run, identify
from metamask_solo.training.sampling import training_loader
from metamask_solo.training.trainer import build_trainer, fit


def pretrain_run(
    cfg: DictConfig, reuse_finished: bool = False, callbacks: tuple[Any, ...] = ()
) -> FitResult:
    """Pretrains, folds a MetaMask checkpoint (``fold_at_end``), and prints the last line.

    Args:
        cfg: a composed config.
        reuse_finished: a finished run of the same config is returned instead of a new one.
        callbacks: more Lightning callbacks.
    """
    model, cfg, train_loader, val_loader = prepare_pretraining(cfg)
    done = finished_run(cfg, cfg.method) if reuse_finished else None
    if done is not None:
        print(f"finished already: {done.checkpoint}")
        return done
    result = fit(model, cfg, train_loader, val_loader, cfg.method, (RankMe(), *callbacks))
    if model.global_rank == 0:
        folded = cfg.method == "metamask" and cfg.get("fold_at_end", True)
        if folded and result.checkpoint is not None:
            _fold(result.checkpoint)
        print(result)
        folder = result.folder
        after = ["plot"]
        if result.checkpoint is not None:
            # without labels, or without images to measure on, knn has nothing to say
            labelled = cfg.data.get("val_path") is not None and not cfg.data.get("no_labels", False)
            after += ["knn", "umap"] if labelled else ["umap"]
        if folder.is_dir():  # fast_dev_run leaves nothing
            write_fingerprints(train_loader.dataset, folder)
            print_ending(f"folder: {folder}", *([command, folder] for command in after))
    if result.stopped is not None:
        raise result.stopped
    return result


def check_run(cfg: DictConfig) -> DictConfig:
    """Validates the config and builds model, data and trainer; trains and writes nothing.

    Returns:
        The completed config.
    """
    _, prepared, *_ = prepare_pretraining(cfg)
    build_trainer(prepared, [], [])
    return prepared


def prepare_pretraining(cfg: DictConfig) -> tuple[Any, DictConfig, Any, Any]:
    """Model, completed config and loaders; raises UserError before anything is written."""
    cfg = open_config(cfg)
    check_pretrain_config(cfg)
    with buildable():
        cfg = complete_pretrain_config(cfg)
        refuse_known_faults(cfg)
        count_classes(cfg)
        data = pretrain_dataset(cfg)
        labelled = -1 not in data.targets
        pl.seed_everything(cfg.seed)
        model = build_method(cfg, labels=labelled)
        train_loader, val_loader, val_data = training_loader(data, cfg), None, None
        check_faults(model, cfg, train_loader, "pretrain")
        if cfg.data.val_path is not None and labelled:
            val_data = classification_dataset(cfg, "val", evaluation_transform(cfg))
            val_loader = plain_loader(val_data, cfg.optimizer.batch_size, cfg.data.num_workers)
        say(*pair_notes(data, val_data))
        identify(cfg, data, val_data)
        return model, cfg, train_loader, val_loader


def _fold(checkpoint: Any) -> None:
    try:
        fold_checkpoint(checkpoint, checkpoint.parent / "folded", force=True)
    except UserError as error:  # a mask that cannot be folded is no reason to fail the run
        print(f"not folded: {error}")
