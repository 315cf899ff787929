"""What a method of solo-learn needs for going on where it stopped, and that no checkpoint has.

The momentum coefficient τ of BYOL, MoCo and others; buffers that a method makes when training
starts, after a checkpoint was read (SwAV's queue, DeepCluster's memory); DeepCluster's assignments
of the epoch. The host's hooks stay as they are: these wrap them, on one model.
"""

import functools
import math
from typing import Any

import torch

from metamask_solo.errors import UserError

STATE = "host_state"


def make_resumable(model: Any) -> None:
    """Lets a checkpoint hold what the host leaves out: tau, queues, DeepCluster's assignments.

    Args:
        model: a method of solo-learn, of either release.
    """
    model.restored_state = None
    # partials, since a model that is sent to another process must be picklable
    model.on_save_checkpoint = functools.partial(_on_save_checkpoint, model)
    model.on_load_checkpoint = functools.partial(_on_load_checkpoint, model)
    model.on_train_start = functools.partial(_on_train_start, model)
    model.on_train_epoch_start = functools.partial(_on_train_epoch_start, model)


def _on_save_checkpoint(model: Any, checkpoint: dict[str, Any]) -> None:
    type(model).on_save_checkpoint(model, checkpoint)
    state: dict[str, Any] = {}
    if hasattr(model, "momentum_updater"):
        state["tau"] = float(model.momentum_updater.cur_tau)
    if isinstance(getattr(model, "assignments", None), torch.Tensor):
        state["assignments"] = model.assignments
    checkpoint[STATE] = state


def _on_load_checkpoint(model: Any, checkpoint: dict[str, Any]) -> None:
    type(model).on_load_checkpoint(model, checkpoint)
    late = _take_late_buffers(model, checkpoint["state_dict"])
    batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["completed"]
    epoch = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
    unfinished = epoch["started"] > epoch["processed"] and batches > 0
    model.restored_state = {
        **checkpoint.get(STATE, {}),
        "buffers": late,
        # the epoch that it was inside
        "inside": epoch["processed"] if unfinished else None,
    }


def _take_late_buffers(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Takes tensors out of a state whose module is there, and which are not: yet to be made."""
    own, modules = model.state_dict(), dict(model.named_modules())
    late = [name for name in state if name not in own and name.rpartition(".")[0] in modules]
    return {name: state.pop(name) for name in late}


def _on_train_start(model: Any) -> None:
    restored = model.restored_state
    if restored is None:
        type(model).on_train_start(model)
        _fit_memory(model)
        return
    devices = [model.device] if model.device.type == "cuda" else []
    # the random state of the checkpoint is in force already, and is not the hook's to draw from
    with torch.random.fork_rng(devices):
        type(model).on_train_start(model)
    _fit_memory(model)
    for name, value in restored["buffers"].items():
        _restore_buffer(model, name, value)
    if "assignments" in restored:
        model.assignments = restored["assignments"].to(model.device)
    if hasattr(model, "momentum_updater"):
        # at 0, the first batch would count as a step even where none is taken yet
        model.last_step = model.trainer.global_step
        if "tau" in restored:
            model.momentum_updater.cur_tau = restored["tau"]
        elif not math.isinf(model.trainer.estimated_stepping_batches):
            model.momentum_updater.update_tau(
                cur_step=model.trainer.global_step,
                max_steps=model.trainer.estimated_stepping_batches,
            )
    # in the middle of an epoch Lightning does not say that one starts, but DINO needs to know
    # which it is; DeepCluster's clusters are those that the epoch began with
    if restored["inside"] is not None and not hasattr(model, "kmeans"):
        type(model).on_train_epoch_start(model)


def _restore_buffer(model: Any, name: str, value: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    # None: All4One's positional encoding, which its first batch makes
    there = owner._buffers.get(leaf, ...)
    if there is ... or (there is not None and there.shape != value.shape):
        shape = "no such buffer" if there is ... else f"shape {tuple(there.shape)}"
        raise UserError(
            f"resume: the checkpoint holds {name} of shape {tuple(value.shape)}, and this config "
            f"makes {shape}"
        )
    owner._buffers[leaf] = value.to(model.device)


def _fit_memory(model: Any) -> None:
    """DeepCluster's memory, made for the whole loader, of the images that an epoch will show."""
    if not hasattr(model, "kmeans"):
        return
    rows = model.trainer.num_training_batches * model.batch_size
    model.local_memory_index = model.local_memory_index[:rows].clone()
    model.local_memory_embeddings = model.local_memory_embeddings[:, :rows].clone()


def _on_train_epoch_start(model: Any) -> None:
    restored, model.restored_state = model.restored_state, None
    if restored is None or restored["inside"] != model.current_epoch:
        type(model).on_train_epoch_start(model)
