"""What a release of solo-learn is known to do wrong with what a file asks: one table.

Each line was met by running it. A run that one of them concerns is refused, with the key, what
would be wrong, and what to use.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from metamask_solo.errors import UserError
from metamask_solo.hosts.stem import SIZED_BACKBONES

BOTH, OLD, MAIN = ("1.0.2", "main"), ("1.0.2",), ("main",)
WITH_QUEUE = ("all4one", "mocov2plus", "nnbyol", "nnclr", "nnsiam", "ressl")


@dataclass(frozen=True)
class Setup:
    """What a run is set up with; called with a key, it gives the value in the config.

    Attributes:
        cfg: a completed config.
        kind: ``pretrain`` or ``linear``.
        release: the release of solo-learn.
        small_crops: its methods that use small crops.
        own_method: the method is none of solo-learn's.
        batches: batches of an epoch of one process, where known.
        model: the model, where it is built.
    """

    cfg: DictConfig
    kind: str
    release: str
    small_crops: tuple[str, ...]
    own_method: bool
    batches: int | None
    model: Any

    def __call__(self, key: str, default: Any = None) -> Any:
        value = OmegaConf.select(self.cfg, key, default=None)
        if value is None and key.startswith("method_kwargs."):  # a default that only the model has
            value = getattr(self.model, key.partition(".")[2], None)
        return default if value is None else value

    def uses(self, *methods: str) -> bool:
        """Whether the run pretrains one of these methods."""
        return self.kind == "pretrain" and self.cfg.method in methods

    @property
    def processes(self) -> int:
        return len(self.cfg.devices) * self("num_nodes", 1)

    @property
    def labelled(self) -> bool:
        """Whether each image has a label; most of STL-10's have none."""
        return not self("data.no_labels", False) and self("data.dataset") != "stl10"

    @property
    def warmup(self) -> float | None:
        """Length of the warm-up, as solo-learn computes it; None: there is none, or unknown."""
        warmup, epochs = self("scheduler.warmup_epochs", 10), self.cfg.max_epochs
        if self("scheduler.name") != "warmup_cosine":
            return None
        if self("scheduler.interval", "step") == "epoch":
            return warmup
        if self.batches is None:
            return None
        steps = epochs * math.ceil(self.batches / self("accumulate_grad_batches", 1))
        limit = self("max_steps", -1)
        return warmup * ((min(steps, limit) if limit > 0 else steps) / epochs)

    @property
    def patch(self) -> int | None:
        """Side of the patches that the backbone cuts images into."""
        name = self.cfg.backbone.name
        side = 4 if name.startswith("swin") else 16
        return (
            self("backbone.kwargs.patch_size", side) if name.startswith(SIZED_BACKBONES) else None
        )


def _crops_are_ignored(run: Setup) -> bool:
    small = run("data.num_small_crops", 0) > 0
    return small and not run.own_method and run.cfg.method not in run.small_crops


def _too_few_or_many_crops(run: Setup) -> bool:
    two = run("data.num_large_crops", 2) == 2 or run.uses("mae", "wmse")
    return run.kind == "pretrain" and not run.own_method and not two


def _queue_splits_a_batch(run: Setup) -> bool:
    size, images = run("method_kwargs.queue_size", 0), run.cfg.optimizer.batch_size * run.processes
    if run.uses("swav"):
        return 0 < size < images
    return run.uses(*WITH_QUEUE) and size % images != 0


def _border_is_unseen(run: Setup) -> bool:
    return run.patch is not None and run("backbone.kwargs.img_size", 224) % run.patch != 0


def _more_clusters_than_images(run: Setup) -> bool:
    if not run.uses("deepclusterv2") or run.batches is None:
        return False
    most = max(run("method_kwargs.num_prototypes", [0]))
    return most > run.batches * run.cfg.optimizer.batch_size


def _is_whole(limit: Any) -> bool:
    """Whether Lightning takes all batches; a whole number 1 is one batch."""
    return limit is None or (isinstance(limit, float) and limit == 1.0)


def _knn_is_not_of_one_epoch(run: Setup) -> bool:
    whole = all(_is_whole(run(key)) for key in ("limit_val_batches", "val_check_interval"))
    each = run("check_val_every_n_epoch", 1) == 1 and not run("fast_dev_run", False)
    validates = whole and each and run.labelled and run("data.val_path") is not None
    return run("knn_eval.enabled", False) and not validates


def _teacher_warms_up_too_long(run: Setup) -> bool:
    by_itself = 50 if run.release == "1.0.2" else 0
    warmup = run("method_kwargs.warmup_teacher_temperature_epochs", by_itself)
    return run.uses("dino") and warmup > run.cfg.max_epochs


class Fault(NamedTuple):
    """A line of the table.

    Attributes:
        releases: those that have the fault.
        key: the setting that the error names.
        concerns: whether a run meets it.
        words: what would be wrong, and what to use.
    """

    releases: tuple[str, ...]
    key: str
    concerns: Callable[[Setup], Any]
    words: str


KNOWN_FAULTS = (
    Fault(
        BOTH,
        "devices",
        lambda run: run.processes > 1 and run.uses("barlow_twins"),
        "the gradient of barlow_twins is divided by the number of processes; use one, or metamask",
    ),
    Fault(
        OLD,
        "devices",
        lambda run: run.processes > 1 and run.uses("nnclr", "simclr", "vicreg"),
        "the losses of nnclr, simclr and vicreg see the images of one process; use one process, or "
        "GitHub main",
    ),
    Fault(
        OLD,
        "optimizer.name",
        lambda run: run("optimizer.name") == "lars",
        "LARS scales the gradients of the step before; use sgd, adam or adamw, or GitHub main",
    ),
    Fault(
        BOTH,
        "scheduler.warmup_epochs",
        lambda run: run.warmup is not None and not float(run.warmup).is_integer(),
        "a warm-up that is no whole number of steps ends above the rate of the file; give one "
        "that is",
    ),
    Fault(
        BOTH,
        "scheduler.name",
        lambda run: run("scheduler.name") in ("cosine", "reduce", "exponential"),
        "cosine is unknown, reduce does not say what it watches, and exponential multiplies by the "
        "weight decay; use warmup_cosine, step or none",
    ),
    Fault(
        MAIN,
        "optimizer.layer_decay",
        lambda run: run.kind == "linear" and run("optimizer.layer_decay", 0) > 0,
        "no optimiser reads the scale of a layer, so all layers get one rate; leave it 0",
    ),
    Fault(
        OLD,
        "label_smoothing",
        lambda run: any(run(key, 0) > 0 for key in ("mixup", "cutmix", "label_smoothing")),
        "there is no mixup, cutmix or label_smoothing; leave them 0, or use GitHub main",
    ),
    Fault(
        BOTH,
        "data.num_large_crops",
        _too_few_or_many_crops,
        "all methods but mae and wmse take two crops of the size of the first pipeline; set "
        "num_crops",
    ),
    Fault(
        BOTH,
        "data.num_small_crops",
        _crops_are_ignored,
        "this method uses no crops of another size than the first pipeline's; give none",
    ),
    Fault(
        BOTH,
        "data.num_small_crops",
        lambda run: (
            run("data.num_small_crops", 0) > 0
            and run.patch is not None
            and not run("backbone.kwargs.dynamic_img_size", False)
        ),
        "this backbone takes images of one size; give crops of one size",
    ),
    Fault(
        BOTH,
        "backbone.kwargs.img_size",
        _border_is_unseen,
        "the border of the images is not seen; use a multiple of the size of a patch",
    ),
    Fault(
        BOTH,
        "method_kwargs.queue_size",
        _queue_splits_a_batch,
        "the queue takes whole batches alone; use a multiple of optimizer.batch_size × processes",
    ),
    Fault(
        BOTH,
        "method_kwargs.whitening_size",
        lambda run: (
            run.uses("wmse")
            and run.cfg.optimizer.batch_size % run("method_kwargs.whitening_size", 1)
        ),
        "a batch is whitened in whole parts; use a divisor of optimizer.batch_size",
    ),
    Fault(
        BOTH,
        "method_kwargs.num_prototypes",
        _more_clusters_than_images,
        "there are more clusters than images of an epoch of one process; use fewer",
    ),
    Fault(
        BOTH,
        "limit_train_batches",
        lambda run: run.uses("deepclusterv2") and not _is_whole(run("limit_train_batches")),
        "what is left out is clustered as noise; train on all batches",
    ),
    Fault(
        BOTH,
        "method_kwargs.warmup_teacher_temperature_epochs",
        _teacher_warms_up_too_long,
        "the warm-up of the teacher (of 50 epochs on 1.0.2) is longer than max_epochs; shorten it",
    ),
    Fault(
        BOTH,
        "momentum.classifier",
        lambda run: (
            run.kind == "pretrain"
            and run("momentum.classifier", False)
            and run.cfg.data.num_classes < 5
        ),
        "its top-5 accuracy takes five classes or more; use False",
    ),
    Fault(
        BOTH,
        "data.no_labels",
        lambda run: (
            run.kind == "pretrain"
            and not run.labelled
            and (run.uses("supcon") or run("method_kwargs.supervised", False))
        ),
        "this method learns from labels, and some images have none; use another",
    ),
    Fault(
        BOTH,
        "knn_eval.enabled",
        _knn_is_not_of_one_epoch,
        "the online kNN collects features until all of data.val_path is validated, however old; "
        "do that at each epoch, or use metamask-solo knn",
    ),
)


def refuse_known_faults(run: Setup) -> None:
    """Raises UserError for the first line of the table that concerns a run."""
    for fault in KNOWN_FAULTS:
        if run.release in fault.releases and fault.concerns(run):
            raise UserError(
                f"{fault.key}={run(fault.key)}: with solo-learn {run.release}, {fault.words}"
            )


# what the optimiser and the schedule in a checkpoint hold, whatever the file says
FIXED_BY_CHECKPOINT = ("method", "backbone.name", "optimizer", "scheduler")
# what the length of a schedule is made of
LENGTH = (
    *("max_epochs", "max_steps", "limit_train_batches", "accumulate_grad_batches"),
    *("devices", "num_nodes", "data.train_path", "data.fraction"),
)


def refuse_changed_plan(cfg: DictConfig, earlier: DictConfig) -> None:
    """Refuses to go on from a checkpoint that would win over the file without a word.

    Args:
        cfg: the completed config of the run that goes on.
        earlier: that of the run that wrote the checkpoint.

    Raises:
        UserError: rates, schedule, or the length of a schedule differ.
    """
    by_length = OmegaConf.select(cfg, "scheduler.name") == "warmup_cosine"
    for name in FIXED_BY_CHECKPOINT + (LENGTH if by_length else ()):
        for key, value, before in _differences(name, _plain(cfg, name), _plain(earlier, name)):
            raise UserError(
                f"{key}={value}: the checkpoint is of a run with {before}, and its optimiser and "
                "schedule go on with that"
            )


def _differences(key: str, value: Any, before: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(value, dict) and isinstance(before, dict):
        for name in {**before, **value}:
            yield from _differences(f"{key}.{name}", value.get(name), before.get(name))
    elif value != before:
        yield key, value, before


def _plain(cfg: DictConfig, key: str) -> Any:
    value = OmegaConf.select(cfg, key, default=None)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
