"""The runs of a benchmark from its YAML file: each one's config, composed, checked and known."""

import contextlib
import hashlib
import io
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torchvision
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from metamask_solo.benchmark.schema import (
    EVALUATIONS,
    QUICK_PIXELS,
    RESERVED,
    BenchmarkFile,
    Folders,
    find_config,
    key_of,
    read_file,
)
from metamask_solo.data.datasets import Images, holds_classes
from metamask_solo.data.digits import VARIANTS, write_dataset
from metamask_solo.data.loaders import (
    PACKED,
    classification_datasets,
    is_folder,
    pretrain_dataset,
)
from metamask_solo.data.split import SPLITS, split_folder
from metamask_solo.data.transforms import evaluation_transform
from metamask_solo.errors import UserError
from metamask_solo.hosts import (
    RELEASE,
    build_method,
    complete_pretrain_config,
    refuse_known_faults,
)
from metamask_solo.paths import user_path
from metamask_solo.training.config import one_line, read_pretraining_config
from metamask_solo.training.endings import scripts_folder
from metamask_solo.training.hydra_app import compose_file, reason
from metamask_solo.training.resume import digest_of_images, run_identity
from metamask_solo.training.trainer import quiet

JOB = "metamask_solo_benchmark_job"
# of every run
EVERY_RUN = {
    "checkpoint.enabled": True,
    "auto_resume.enabled": True,
    "auto_resume.max_hours": 24 * 365 * 10,
    "wandb.enabled": False,
    "fold_at_end": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
# two methods that differ in these, or below, are not compared by their losses alone
COMPARABLE = (
    *("backbone.", "data.", "augmentations.0.crop_size.", "precision.", "processes."),
    *("optimizer.batch_size.", "optimizer.name.", "accumulate_grad_batches."),
    *("max_epochs.", "max_steps.", "max_time.", "limit_train_batches."),
)
SHARE = 0.1  # of the images of a folder that is split, for validation


@dataclass(frozen=True)
class Run:
    """One method, in one setting, with one seed.

    Attributes:
        method: its name in the YAML file, or ``random`` or ``pixels``.
        setting: the searched keys and their values, as on a command line; else empty.
        shared: the pretraining config of all seeds, resolved.
        identity: what of it decides the result, see
            :func:`metamask_solo.training.resume.run_identity`.
        data_digest: of images and evaluations. Runs that are compared have one.
        out: the folder of the benchmark.
    """

    method: str
    setting: str
    shared: dict[str, Any]
    identity: dict[str, Any]
    data_digest: str
    out: Path
    seed: int = 0

    @property
    def config(self) -> dict[str, Any]:
        """The whole pretraining config."""
        checkpoint = {**self.shared.get("checkpoint", {}), "dir": str(self.folder / "training")}
        return {**self.shared, "seed": self.seed, "checkpoint": checkpoint}

    @property
    def config_digest(self) -> str:
        """Of all that decides the result but the seed. The runs of one method have one."""
        return _digest([self.data_digest, {**self.identity, "seed": None}])

    @property
    def unmasked_digest(self) -> str:
        """That of the same method with any mask: equal ones differ by their masks alone."""
        mask = ("method_kwargs.mask.", "method_kwargs.meta.")
        kept = {key: value for key, value in self.identity.items() if not key.startswith(mask)}
        return _digest([self.data_digest, {**kept, "seed": None}])

    @property
    def mask(self) -> str:
        """``learned`` for a run of MetaMask that updates its mask, else nothing."""
        enabled = self.identity.get("method_kwargs.meta.enabled", True)
        return "learned" if self.identity.get("method") == "metamask" and enabled else ""

    @property
    def digest(self) -> str:
        """Of all that decides the result; another digest is another run."""
        return _digest([self.config_digest, self.seed])

    @property
    def folder(self) -> Path:
        """Where everything of the run lies."""
        return self.out / "runs" / self.method / f"seed-{self.seed}-{self.digest}"

    @property
    def trained(self) -> bool:
        """Whether it is neither an untrained backbone nor the pixels."""
        return "untrained" not in self.shared

    def __str__(self) -> str:
        return f"{f'{self.method} {self.setting}'.strip()}, seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """A checked benchmark.

    Attributes:
        file: its keys; folders of images are whole paths.
        out: the folder of the results.
        runs: all of them, the untrained first, then seed by seed.
        notes: what a reader of the report must know.
        images: how many there are to train on and to measure on; empty of torchvision's files.
    """

    file: BenchmarkFile
    out: Path
    runs: list[Run]
    notes: list[str]
    images: list[int]


def read_plan(config: str | Path, overrides: list[str]) -> Plan:
    """Reads and checks a benchmark's YAML file; writes nothing but images that it makes or links.

    Args:
        config: the YAML file: see :func:`find_config`.
        overrides: ``KEY=VALUE``, dotted keys of the file.

    Raises:
        UserError: the first thing that cannot work.
    """
    benchmark = read_file(config, overrides)
    out = user_path(benchmark.out or Path("benchmarks") / benchmark.name).resolve()
    _store_job(benchmark, out)
    data, notes = _folders(benchmark.data, out)
    if benchmark.data not in [*VARIANTS]:
        benchmark = benchmark.model_copy(update={"data": data})
    with contextlib.redirect_stderr(io.StringIO()) as said, quiet():
        runs, images = _methods(find_config(config).parent, benchmark, data, out)
    if images:
        notes += images[-1].notes
    for line in dict.fromkeys(said.getvalue().splitlines()):  # each method says the same
        if line.removeprefix("note: ") not in notes:  # the command says these
            print(line, file=sys.stderr)
    wanted = [run for run in runs if run.method in benchmark.trained]
    untrained = [run for run in runs if not run.trained]
    # all of one seed before the next: an early table compares all methods
    planned = [replace(run, seed=seed) for run in untrained for seed in benchmark.seeds]
    planned += [replace(run, seed=seed) for seed in benchmark.seeds for run in wanted]
    planned = [run for run in planned if run.seed in benchmark.seeds_of(run.method)]
    notes = [*dict.fromkeys(notes), *_differences(wanted)]
    return Plan(benchmark, out, planned, notes, [*map(len, images)])


def _folders(data: str | Folders | None, out: Path) -> tuple[Folders | None, list[str]]:
    """The folders of the images, as whole paths, and notes.

    A data set of this package is made if need be. Any other folder holds train/ and val/, or class
    folders, which are split as ``data split`` does it, or else images without labels.
    """
    notes: list[str] = []
    if isinstance(data, str):
        root, labels = user_path(data), True
        if data in VARIANTS:
            if root.is_dir():
                notes = [f"data={data}: made from packages; the folder here is data=./{data}"]
            root = out / "datasets" / data
            write_dataset(data, root.parent)
        elif not all((root / split).is_dir() for split in SPLITS) and (
            labels := holds_classes(root, "data")
        ):
            split = split_folder(root, out / "images", SHARE)
            root, notes = split.out, list(split.notes)
        paths = {f"{name}_path": str(root / name) for name in SPLITS} if labels else {}
        data = Folders(**{"train_path": str(root), **paths}, no_labels=not labels)
    if data is not None:
        paths = data.model_dump(include={"train_path", "val_path"}, exclude_none=True)
        whole = {key: str(user_path(path).resolve()) for key, path in paths.items()}
        data = data.model_copy(update=whole)
    return data, notes


def _methods(
    folder: Path, benchmark: BenchmarkFile, data: Folders | None, out: Path
) -> tuple[list[Run], list[Images]]:
    """A run of each method in each setting and of what is untrained, and the images of all.

    The backbone and the images of the first one are those of what is untrained; where no method is
    wanted, they are those of the file's first.
    """
    wanted = benchmark.trained or [*benchmark.methods][:1]
    runs: list[Run] = []
    untrained: list[Run] = []
    known: dict[tuple[str, ...], tuple[list[Images], list[str]]] = {}  # images, what they are
    measured = {name: EVALUATIONS[name] for name in benchmark.measured}
    for name in wanted:
        method = benchmark.methods[name]
        search = {**benchmark.search, **method.search}
        for values in itertools.product(*search.values()):
            setting = dict(zip(search, values, strict=True))
            try:
                with one_line():
                    cfg = compose_method(folder, benchmark, name, setting)
                    completed = _completed(cfg, benchmark, data)
            except UserError as error:
                raise UserError(f"methods.{name}: {error}") from error
            paths = [path for path in (cfg.data.train_path, cfg.data.get("val_path")) if path]
            key = (cfg.data.dataset, str(cfg.data.get("fraction")), *paths)
            if key not in known:
                images = _images(cfg)
                if isinstance(benchmark.data, str):  # made from packages, so the name says all
                    fingerprints = [benchmark.data]
                else:  # of torchvision's files, too: it checks their sums
                    fingerprints = [digest_of_images([one]) for one in images]
                    fingerprints = fingerprints or [cfg.data.dataset] * len(paths)
                known[key] = images, fingerprints
            digest = _digest([known[key][1], measured, RELEASE])
            if runs and digest != runs[0].data_digest:
                raise UserError(
                    f"methods.{name}: its images are not those of {wanted[0]}; give all the same "
                    "by data.train_path=FOLDER data.val_path=FOLDER"
                )
            shared: Any = OmegaConf.to_container(cfg, resolve=True)
            text = " ".join(f"{key}={json.dumps(value)}" for key, value in setting.items())
            run = Run(name, text, shared, run_identity(completed), digest, out)
            runs.append(run)
            if len(runs) == 1:
                rows = [name for name in benchmark.shown if name not in benchmark.methods]
                untrained = [_untrained(name, run, completed) for name in rows]
    images, _ = next(iter(known.values()))
    return [*runs, *untrained], images


def compose_method(
    folder: Path, benchmark: BenchmarkFile, name: str, setting: dict[str, Any]
) -> DictConfig:
    """The config of a method: its file, all overrides, and the setting."""
    method = benchmark.methods[name]
    path = find_config(method.config, "pretrain", folder)
    cfg = compose_file(path.resolve(), method.overrides)
    for key, value in setting.items():
        if OmegaConf.select(cfg, key, default=RESERVED) is RESERVED:  # a default that none has
            raise UserError(f"search: {key} is not in {method.config}")
        OmegaConf.update(cfg, key, value)
    for key, value in EVERY_RUN.items():
        OmegaConf.update(cfg, key, value, force_add=True)
    if benchmark.quick:
        # a CPU without bf16 takes many times as long in half precision
        quick: dict[str, Any] = {"precision": "32"}
        for number in range(len(cfg.augmentations)):
            quick[f"augmentations.{number}.crop_size"] = QUICK_PIXELS
        for key in quick.keys() - {*setting, *map(key_of, benchmark.last_overrides)}:
            OmegaConf.update(cfg, key, quick[key])
    if benchmark.epochs is not None:
        cfg.max_epochs = benchmark.epochs
    if benchmark.without_labels:
        OmegaConf.update(cfg, "knn_eval.enabled", False, force_add=True)
    cfg.seed = benchmark.seeds[0]
    return cfg


def _completed(cfg: DictConfig, benchmark: BenchmarkFile, data: Folders | None) -> DictConfig:
    """The completed form of a config, which gets its data; its model was built for a test."""
    import metamask_solo  # noqa: F401  registers the method

    if data is not None:
        paths = data.model_dump(include={"train_path", "val_path"})
        cfg.data.update({**paths, **({"no_labels": True} if data.no_labels else {})})
        if cfg.data.dataset in PACKED:
            # torchvision's files have their own reader; anything else is read as class folders
            files = getattr(torchvision.datasets, cfg.data.dataset.upper()).base_folder
            packed = all(Path(path, files).is_dir() for path in paths.values() if path)
            cfg.data.dataset = cfg.data.dataset if packed else "custom"
    checked = read_pretraining_config(cfg)
    unlabelled = checked.data.get("val_path") is None or checked.data.get("no_labels", False)
    if unlabelled and not benchmark.without_labels:
        raise UserError(
            "data.val_path: missing; the evaluations need labelled images (without labels: "
            "data.train_path=FOLDER data.no_labels=true)"
        )
    completed: DictConfig = complete_pretrain_config(checked)
    refuse_known_faults(completed)
    build_method(completed)
    return completed


def _images(cfg: DictConfig) -> list[Images]:
    """The images of a config: to train on and to measure on, or those without labels.

    None are read of torchvision's files, which a first run may have to download.
    """
    if not is_folder(cfg):
        return []
    if cfg.data.get("no_labels", False):
        return [pretrain_dataset(cfg)]
    transform = evaluation_transform(cfg)
    return [*classification_datasets(cfg, transform, transform)]


def _untrained(name: str, run: Run, completed: DictConfig) -> Run:
    """An untrained backbone, or the pixels, with the images and the backbone of a method."""
    kept = ["augmentations", "accelerator", "backbone", "method", "data"]
    shared: Any = OmegaConf.to_container(OmegaConf.masked_copy(completed, kept), resolve=True)
    decisive = ("augmentations.", "data.", *(("backbone.",) if name == "random" else ()))
    identity = {key: value for key, value in run.identity.items() if key.startswith(decisive)}
    more = {"untrained": name}
    shared |= {**more, "max_epochs": 0}
    return replace(run, method=name, setting="", shared=shared, identity=identity | more)


def _differences(runs: list[Run]) -> Iterator[str]:
    """A note for each key in which methods differ, and which is not their own matter."""
    keys = [key for run in runs for key in run.identity if f"{key}.".startswith(COMPARABLE)]
    for key in dict.fromkeys(keys):
        methods: dict[str, dict[str, None]] = {}
        for run in runs:
            if f"{key}=" not in run.setting:
                methods.setdefault(str(run.identity.get(key)), {})[run.method] = None
        if len(methods) > 1:
            parts = [f"{key}={text} of {', '.join(names)}" for text, names in methods.items()]
            yield f"The methods differ in more than their losses: {'; '.join(parts)}."


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _store_job(benchmark: BenchmarkFile, out: Path) -> None:
    """Stores the Hydra config of the jobs: nothing but the name of a run, and the launcher."""
    settings = benchmark.launcher.model_extra
    config = {
        "defaults": [
            "_self_",
            {"override hydra/launcher": benchmark.launcher.name},
            {"override hydra/hydra_logging": "disabled"},
            {"override hydra/job_logging": "disabled"},
        ],
        "run": "???",
        "out": str(out),
        "hydra": {
            "output_subdir": None,
            "sweep": {"dir": str(out / "hydra"), "subdir": "."},
            **({"launcher": settings} if settings else {}),
        },
    }
    ConfigStore.instance().store(name=f"{JOB}.yaml", node=config)
    try:
        with initialize_config_dir(str(scripts_folder()), version_base="1.2"):
            compose(JOB, ["run=none"], return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"launcher={benchmark.launcher.name}: {reason(error)}") from error
