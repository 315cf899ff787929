"""What a release of solo-learn is known to do wrong with what a file asks: one table.

Each line was met by running it. A run that one of them concerns is refused, with the key, what
would be wrong, and what to use.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from metamask_solo.errors import UserError
from metamask_solo.hosts import METHODS, RELEASE, SMALL_CROPS

BOTH, OLD = ("1.0.2", "main"), ("1.0.2",)
WITH_QUEUE = ("all4one", "mocov2plus", "nnbyol", "nnclr", "nnsiam", "ressl")


class Run(NamedTuple):
    """What a run is set up with: a completed config, and whether it pretrains."""

    cfg: DictConfig
    pretrains: bool

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a dotted key; the default where it is missing or null."""
        value = OmegaConf.select(self.cfg, key, default=None)
        return default if value is None else value

    def uses(self, *methods: str) -> bool:
        """Whether the run pretrains one of these methods."""
        return self.pretrains and self.cfg.method in methods

    @property
    def processes(self) -> int:
        return len(self.cfg.devices) * self.get("num_nodes", 1)

    @property
    def of_solo_learn(self) -> bool:
        """Whether the run pretrains one of solo-learn's methods."""
        return self.pretrains and METHODS[self.cfg.method].__module__.startswith("solo.")

    @property
    def labelled(self) -> bool:
        """Whether each image has a label; most of STL-10's have none."""
        return not self.get("data.no_labels") and self.get("data.dataset") != "stl10"


def _queue_splits_a_batch(run: Run) -> bool:
    size, batch = run.get("method_kwargs.queue_size", 0), run.get("optimizer.batch_size")
    if run.uses("swav"):
        return 0 < size < batch * run.processes
    return run.uses(*WITH_QUEUE) and size % (batch * run.processes) != 0


def _knn_is_not_of_one_epoch(run: Run) -> bool:
    # a limit of 1.0 is all batches, and of 1 it is one batch
    limits = [run.get(key, 1.0) for key in ("limit_val_batches", "val_check_interval")]
    whole = all(isinstance(limit, float) and limit == 1 for limit in limits)
    each = run.get("check_val_every_n_epoch", 1) == 1
    validates = whole and each and run.labelled and run.get("data.val_path") is not None
    return run.get("knn_eval.enabled", False) and not validates


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
    concerns: Callable[[Run], Any]
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
        "the losses of nnclr, simclr and vicreg see the images of one process; use one",
    ),
    Fault(
        OLD,
        "optimizer.name",
        lambda run: run.get("optimizer.name") == "lars",
        "LARS scales the gradients of the step before; use sgd, adam or adamw",
    ),
    Fault(
        OLD,
        "optimizer.exclude_bias_n_norm_wd",
        lambda run: run.get("optimizer.exclude_bias_n_norm_wd"),
        "biases and norms have the weight decay of all; leave it False",
    ),
    Fault(
        OLD,
        "label_smoothing",
        lambda run: any(run.get(key) for key in ("mixup", "cutmix", "label_smoothing")),
        "there is no mixup, cutmix or label_smoothing; leave them 0",
    ),
    Fault(
        BOTH,
        "data.num_large_crops",
        lambda run: (
            run.of_solo_learn
            and run.get("data.num_large_crops", 2) != 2
            and not run.uses("mae", "wmse")
        ),
        "all methods but mae and wmse take two crops of the size of the first pipeline; set "
        "num_crops",
    ),
    Fault(
        BOTH,
        "data.num_small_crops",
        lambda run: (
            run.of_solo_learn
            and run.get("data.num_small_crops", 0) > 0
            and not run.uses(*SMALL_CROPS)
        ),
        "this method ignores crops of another size than the first pipeline's; give none",
    ),
    Fault(
        BOTH,
        "method_kwargs.queue_size",
        _queue_splits_a_batch,
        "the queue takes whole batches alone; use a multiple of optimizer.batch_size × processes",
    ),
    Fault(
        BOTH,
        "method_kwargs.warmup_teacher_temperature_epochs",
        lambda run: (
            run.uses("dino")
            and run.get("method_kwargs.warmup_teacher_temperature_epochs", 0) > run.cfg.max_epochs
        ),
        "the warm-up of the teacher must not be longer than max_epochs; shorten it",
    ),
    Fault(
        BOTH,
        "data.no_labels",
        lambda run: (
            not run.labelled and (run.uses("supcon") or run.get("method_kwargs.supervised"))
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


def refuse_known_faults(cfg: DictConfig, pretrains: bool = True) -> None:
    """Refuses a run that the release is known to do wrong.

    Args:
        cfg: a completed config.
        pretrains: False for a probe and for fine-tuning.

    Raises:
        UserError: a line of ``KNOWN_FAULTS`` concerns the run.
    """
    run = Run(cfg, pretrains)
    for fault in KNOWN_FAULTS:
        if RELEASE in fault.releases and fault.concerns(run):
            use = "" if fault.releases == BOTH else ", or GitHub main"
            raise UserError(
                f"{fault.key}={run.get(fault.key)}: with solo-learn {RELEASE}, {fault.words}{use}"
            )
