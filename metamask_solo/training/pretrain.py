"""Pretraining from a config: checks, model and data, the run, the folded checkpoint."""

from typing import Any

from omegaconf import DictConfig

from metamask_solo.checkpoints.exporting import fold_checkpoint
from metamask_solo.data.datasets import pair_notes, say
from metamask_solo.data.loaders import (
    classification_dataset,
    count_classes,
    is_folder,
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
from metamask_solo.training.callbacks import RankMe
from metamask_solo.training.config import one_line, read_pretraining_config
from metamask_solo.training.endings import print_ending
from metamask_solo.training.resume import FitResult, finished_run, identify
from metamask_solo.training.sampling import training_loader
from metamask_solo.training.trainer import fit


def pretrain_run(
    cfg: DictConfig, reuse_finished: bool = False, callbacks: tuple[Any, ...] = ()
) -> FitResult:
    """Pretrains, folds a MetaMask checkpoint (``fold_at_end``), and says what is there.

    Args:
        cfg: a composed config.
        reuse_finished: a finished run that is the same one is returned instead of a new one.
        callbacks: more Lightning callbacks.

    Raises:
        UserError: something in the config, the data or the checkpoint to resume cannot be used.
        RunStopped: a signal ended the run, or its loss or weights are no longer finite.
    """
    model, cfg, train_loader, val_loader = prepare_pretraining(cfg)
    done = finished_run(cfg, cfg.method) if reuse_finished else None
    if done is not None:
        print(f"finished already: {done.checkpoint}")
        return done
    if cfg.get("log_rankme", True):
        callbacks = (RankMe(), *callbacks)
    result = fit(model, cfg, train_loader, val_loader, cfg.method, callbacks)
    if model.global_rank == 0:
        if cfg.method == "metamask" and cfg.get("fold_at_end", True) and result.checkpoint:
            folded = result.checkpoint.parent / "folded"
            try:
                fold_checkpoint(result.checkpoint, folded, force=True)
            except UserError as error:  # a mask that cannot be folded is no reason to fail the run
                print(f"not folded: {error}")
        if result.folder.is_dir():  # fast_dev_run leaves nothing
            measures = ["knn"] * (val_loader is not None) + ["umap"]
            commands = ["plot", *(measures if result.checkpoint else [])]
            print_ending(f"folder: {result.folder}", *([c, result.folder] for c in commands))
        print(result)
    if result.stopped is not None:
        raise result.stopped
    return result


def prepare_pretraining(
    cfg: DictConfig, read_packed: bool = True
) -> tuple[Any, DictConfig, Any, Any]:
    """Model, completed config and loaders.

    Args:
        cfg: a composed config.
        read_packed: False leaves torchvision's data sets alone, which may have to be downloaded;
            the loaders are None then.

    Raises:
        UserError: something cannot be used; nothing is written by then.
    """
    cfg = read_pretraining_config(cfg)
    with one_line():
        cfg = complete_pretrain_config(cfg)
        refuse_known_faults(cfg)
        count_classes(cfg)
        if not is_folder(cfg) and not read_packed:
            return build_method(cfg), cfg, None, None
        data = pretrain_dataset(cfg)
        pl.seed_everything(cfg.seed)
        model = build_method(cfg, labels=data.labelled)
        train_loader, val_loader, val_data = training_loader(data, cfg), None, None
        if cfg.data.val_path is not None and data.labelled:
            val_data = classification_dataset(cfg, "val", evaluation_transform(cfg))
            val_loader = plain_loader(val_data, cfg.optimizer.batch_size, cfg.data.num_workers)
        say(*pair_notes(data, val_data))
        identify(cfg, data, val_data)
        return model, cfg, train_loader, val_loader
