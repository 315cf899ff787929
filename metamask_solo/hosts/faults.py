"""What a release of solo-learn is known to do wrong with what a file asks: one table.

Each line was met by running it. A run that one of them concerns is refused, with the key, what
would be wrong, and what to use.
"""

from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from metamask_solo.errors import UserError
from metamask_solo.hosts import host
from metamask_solo.hosts.shared import process_count

BOTH, OLD, MAIN = ("1.0.2", "main"), ("1.0.2",), ("main",)
WITH_QUEUE = ("all4one", "mocov2plus", "nnbyol", "nnclr", "nnsiam", "ressl")
Fault = tuple[tuple[str, ...], str, object, str]


def known_faults(cfg: DictConfig, pretrains: bool) -> Iterator[Fault]:
    """The table: releases with the fault, key, whether the run meets it, what is wrong and to use.

    Args:
        cfg: a completed config.
        pretrains: False for a probe and for fine-tuning.
    """

    def get(key: str, default: Any = None) -> Any:
        value = OmegaConf.select(cfg, key, default=None)
        return default if value is None else value

    method = cfg.method if pretrains else ""
    settings = cfg.get("method_kwargs") or {}
    processes = process_count(cfg)
    batch = cfg.optimizer.batch_size * processes
    of_solo_learn = pretrains and host.METHODS[method].__module__.startswith("solo.")
    # most images of STL-10 have no label
    labelled = not get("data.no_labels") and get("data.dataset") != "stl10"

    yield (
        BOTH,
        "devices",
        processes > 1 and method == "barlow_twins",
        "the gradient of barlow_twins is divided by the number of processes; use one, or metamask",
    )
    yield (
        OLD,
        "devices",
        processes > 1 and method in ("nnclr", "simclr", "vicreg"),
        "the losses of nnclr, simclr and vicreg see the images of one process; use one",
    )
    yield (
        MAIN,
        "devices",
        processes > 1 and method == "all4one",
        "the feature loss of all4one sees the images of one process; use one",
    )
    # DDP gives every process the buffers of the first; other methods gather what they store
    yield (
        BOTH,
        "devices",
        processes > 1 and method == "deepclusterv2",
        "the memory of deepclusterv2 keeps the images of one process, and the others get no "
        "cluster; use one",
    )
    queue = settings.get("queue_size") or 0
    yield (
        BOTH,
        "method_kwargs.queue_size",
        processes > 1 and method == "swav" and queue > 0,
        "the queue of swav keeps the features of one process; use 0, or one process",
    )
    yield (
        OLD,
        "optimizer.name",
        cfg.optimizer.name == "lars",
        "LARS scales the gradients of the previous step; use sgd, adam or adamw",
    )
    yield (
        OLD,
        "optimizer.exclude_bias_n_norm_wd",
        get("optimizer.exclude_bias_n_norm_wd"),
        "biases and norms still have weight decay; leave it False",
    )
    yield (
        OLD,
        "label_smoothing",
        get("mixup") or get("cutmix") or get("label_smoothing"),
        "there is no mixup, cutmix or label_smoothing; leave them 0",
    )
    yield (
        MAIN,
        "label_smoothing",
        get("label_smoothing") and not (get("mixup") or get("cutmix")),
        "label_smoothing works only beside mixup or cutmix; add one, or leave it 0",
    )
    yield (
        BOTH,
        "momentum.classifier",
        get("momentum.classifier") and (get("data.no_labels") or cfg.data.num_classes < 5),
        "the classifier of the teacher needs labels of five classes or more; leave it False",
    )
    yield (
        BOTH,
        "data.num_large_crops",
        of_solo_learn and method not in ("mae", "wmse") and get("data.num_large_crops", 2) != 2,
        "all methods but mae and wmse take two crops of the size of the first pipeline; set "
        "num_crops",
    )
    yield (
        BOTH,
        "data.num_small_crops",
        of_solo_learn and method not in host.SMALL_CROPS and get("data.num_small_crops"),
        "this method ignores crops of another size than the first pipeline's; give none",
    )
    yield (
        BOTH,
        "method_kwargs.queue_size",
        (method == "swav" and 0 < queue < batch) or (method in WITH_QUEUE and queue % batch),
        "the queue stores only whole batches; use a multiple of optimizer.batch_size × processes",
    )
    warmup = settings.get("warmup_teacher_temperature_epochs") or 0
    yield (
        BOTH,
        "method_kwargs.warmup_teacher_temperature_epochs",
        method == "dino" and warmup > cfg.max_epochs,
        "the warm-up of the teacher must not be longer than max_epochs; shorten it",
    )
    yield (
        BOTH,
        "data.no_labels",
        not labelled and (method == "supcon" or settings.get("supervised")),
        "this method learns from labels, and some images have none; use another",
    )
    start, rate = get("scheduler.warmup_start_lr", 0.0), cfg.optimizer.lr
    warms_up = get("scheduler.name") == "warmup_cosine" and get("scheduler.warmup_epochs", 10) != 0
    yield (
        BOTH,
        "scheduler.warmup_start_lr",
        warms_up and start > rate,
        f"the warm-up would fall to the rate of {rate:.3g}, which is optimizer.lr scaled by images "
        "a step / 256, as this setting is not; lower it",
    )
    # a limit of 1.0 is all batches, and of 1 it is one batch
    limits = [get(key, 1.0) for key in ("limit_val_batches", "val_check_interval")]
    whole = all(isinstance(limit, float) and limit == 1 for limit in limits)
    each_epoch = whole and get("check_val_every_n_epoch", 1) == 1
    yield (
        BOTH,
        "knn_eval.enabled",
        get("knn_eval.enabled") and not (each_epoch and labelled and get("data.val_path")),
        "the online kNN keeps old features until data.val_path is validated completely; validate "
        "completely in each epoch, or use metamask-solo knn",
    )


def refuse_known_faults(cfg: DictConfig, pretrains: bool = True) -> None:
    """Refuses a run that the release is known to do wrong; see :func:`known_faults`.

    Raises:
        UserError: a line of the table concerns the run.
    """
    for releases, key, concerns, words in known_faults(cfg, pretrains):
        if host.RELEASE in releases and concerns:
            use = ", or GitHub main" if releases == OLD else ""
            value = OmegaConf.select(cfg, key)
            raise UserError(f"{key}={value}: with solo-learn {host.RELEASE}, {words}{use}")
