"""The runs of a benchmark from its YAML file: each one's config, composed, checked and known."""

import contextlib
import copy
import hashlib
import io
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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
    packaged,
    read_file,
)
from metamask_solo.data.datasets import read_folder
from metamask_solo.data.digits import VARIANTS
from metamask_solo.data.loaders import classification_datasets, is_folder, pretrain_dataset
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
from metamask_solo.training.resume import run_identity
from metamask_solo.training.trainer import quiet

JOB = "metamask_solo_benchmark_job"
# folder that torchvision's copy of a data set is in
TORCHVISION = {
    "cifar10": "cifar-10-batches-py",
    "cifar100": "cifar-100-python",
    "stl10": "stl10_binary",
}
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
# two methods that differ in these are not compared by their losses alone
COMPARABLE = ("optimizer.batch_size", "optimizer.name", "max_epochs", "precision")
SHARE = 0.1  # of the images of a folder that is split, for validation


@dataclass(frozen=True)
class Run:
    """One method, in one setting, with one seed.

    Attributes:
        method: its name in the YAML file, or ``random`` or ``pixels``.
        setting: the searched keys and their values; empty where nothing is searched.
        config: the whole pretraining config, resolved.
        identity: what of it decides the result, see
            :func:`metamask_solo.training.resume.run_identity`.
        digest: of all that decides the result; another digest is another run.
        config_digest: of the same without the seed. The runs of one method have one.
        data_digest: of images and evaluations. Runs that are compared have one.
        folder: where everything of the run lies.
    """

    method: str
    setting: dict[str, Any]
    seed: int
    config: dict[str, Any]
    identity: dict[str, Any]
    digest: str
    config_digest: str
    data_digest: str
    folder: Path

    def __str__(self) -> str:
        return f"{' '.join([self.method, *override_list(self.setting)])}, seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """A checked benchmark.

    Attributes:
        file: its keys; folders of images are whole paths.
        out: the folder of the results.
        runs: all of them, the untrained first, then seed by seed.
        notes: what a reader of the report must know.
        images: how many there are to train on, where they are a user's own.
    """

    file: BenchmarkFile
    out: Path
    runs: list[Run]
    notes: list[str]
    images: int | None


class Variant(NamedTuple):
    """A method in one setting: the config of its runs without seed and folder, and what decides.

    See :func:`metamask_solo.training.resume.run_identity`.
    """

    method: str
    setting: dict[str, Any]
    config: dict[str, Any]
    identity: dict[str, Any]
    data_digest: str


def read_plan(config: str | Path, overrides: list[str]) -> Plan:
    """Reads and checks a benchmark's YAML file; writes nothing but the links of a split folder.

    Args:
        config: the YAML file: see :func:`find_config`.
        overrides: ``KEY=VALUE``, dotted keys of the file.

    Raises:
        UserError: the first thing that cannot work.
    """
    benchmark = read_file(config, overrides)
    out = user_path(benchmark.out or Path("benchmarks") / benchmark.name).resolve()
    _check_launcher(benchmark, out)
    data, notes = _images(benchmark.data, out / "images")
    benchmark = benchmark.model_copy(update={"data": data})
    with contextlib.redirect_stderr(io.StringIO()) as said:
        variants = _variants(find_config(config).parent, benchmark, out)
    for line in dict.fromkeys(said.getvalue().splitlines()):  # each method says the same
        print(line, file=sys.stderr)
    for variant in variants:
        if variant.data_digest != variants[0].data_digest:
            raise UserError(
                f"methods.{variant.method}: its images are not those of {variants[0].method}; give "
                "all the same by data.train_path=FOLDER data.val_path=FOLDER"
            )
    wanted = [variant for variant in variants if variant.method in benchmark.trained]
    untrained = [
        _untrained(name, variants[0]) for name in benchmark.shown if name not in benchmark.methods
    ]
    # all of one seed before the next: an early table compares all methods
    planned = [(variant, seed) for variant in untrained for seed in benchmark.seeds]
    planned += [(variant, seed) for seed in benchmark.seeds for variant in wanted]
    runs = [_run(v, seed, out) for v, seed in planned if seed in benchmark.seeds_of(v.method)]
    cfg = OmegaConf.create(variants[0].config)
    images = None
    if not isinstance(data, str) and is_folder(cfg):
        with contextlib.redirect_stderr(io.StringIO()):  # the command says all notes
            images, data_notes = _images_of(cfg)
        notes += data_notes
    return Plan(benchmark, out, runs, [*dict.fromkeys(notes), *_differences(wanted)], images)


def _images(data: str | Folders | None, links: Path) -> tuple[str | Folders | None, list[str]]:
    """The images, with whole paths, and notes.

    A folder holds train/ and val/, or is split into ``links`` as ``data split`` does it.
    """
    notes: list[str] = []
    if isinstance(data, str) and data not in VARIANTS:
        root, labels = user_path(data), True
        if not all((root / split).is_dir() for split in SPLITS):
            split = split_folder(root, links, SHARE)
            root, labels, notes = split.out, bool(split.classes), list(split.notes)
        paths = {f"{name}_path": str(root / name) for name in SPLITS[: 1 + labels]}
        data = Folders(**paths, no_labels=not labels)
    if isinstance(data, Folders):
        paths = data.model_dump(include={"train_path", "val_path"}, exclude_none=True)
        whole = {key: str(user_path(path).resolve()) for key, path in paths.items()}
        data = data.model_copy(update=whole)
    return data, notes


def _images_of(cfg: DictConfig) -> tuple[int, list[str]]:
    """How many training images there are, and what is left out or doubtful of all images."""
    if cfg.data.get("no_labels", False):
        images = pretrain_dataset(cfg)
        return len(images), images.notes
    transform = evaluation_transform(cfg)
    train, val = classification_datasets(cfg, transform, transform)
    return len(train), val.notes


def override_list(setting: Mapping[str, Any]) -> list[str]:
    """``KEY=VALUE`` for each key, as one would write it on a command line."""
    return [f"{key}={json.dumps(value)}" for key, value in setting.items()]


def _variants(folder: Path, benchmark: BenchmarkFile, out: Path) -> list[Variant]:
    """Those that are wanted, and the first, whose backbone and images the untrained have."""
    first = next(iter(benchmark.methods))
    variants: list[Variant] = []
    fingerprints: dict[tuple[str, str], str] = {}
    with _data_config(benchmark.data) as data, quiet():
        for name, method in benchmark.methods.items():
            if name != first and name not in benchmark.trained:
                continue
            search = {**benchmark.search, **method.search}
            for values in itertools.product(*search.values()):
                setting = dict(zip(search, values, strict=True))
                try:
                    with one_line():
                        cfg = compose_method(folder, benchmark, name, setting)
                        identity = _identity(cfg, benchmark, data)
                except UserError as error:
                    raise UserError(f"methods.{name}: {error}") from error
                if isinstance(benchmark.data, str):  # made from packages, so the name says all
                    images = [benchmark.data]
                    made = out / "datasets" / benchmark.data
                    cfg.data.update({f"{split}_path": str(made / split) for split in SPLITS})
                else:
                    images = []
                    for path in filter(None, [cfg.data.train_path, cfg.data.get("val_path")]):
                        key = (path, cfg.data.dataset)
                        fingerprints[key] = fingerprints.get(key) or _fingerprint(*key)
                        images.append(fingerprints[key])
                measured = {name: EVALUATIONS[name] for name in benchmark.measured}
                config: Any = OmegaConf.to_container(cfg, resolve=True)
                digest = _digest([images, measured, RELEASE])
                variants.append(Variant(name, setting, config, identity, digest))
    return variants


def compose_method(
    folder: Path, benchmark: BenchmarkFile, name: str, setting: dict[str, Any]
) -> DictConfig:
    """The config of a method: its file, all overrides, and the setting."""
    method = benchmark.methods[name]
    scripts = scripts_folder() / "pretrain"
    candidates = (
        folder / method.config,
        user_path(method.config),
        packaged(method.config, scripts),
    )
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        raise UserError(
            f"config={method.config}: no such file here, beside the benchmark's file, or in "
            f"{scripts}"
        )
    cfg = compose_file(path.resolve(), method.overrides)
    for key, value in setting.items():
        if OmegaConf.select(cfg, key, default=RESERVED) is RESERVED:  # a default that none has
            raise UserError(f"search: {key} is not in {method.config}")
        OmegaConf.update(cfg, key, value)
    for key, value in EVERY_RUN.items():
        OmegaConf.update(cfg, key, value, force_add=True)
    if benchmark.quick:
        cfg.precision = "32"  # a CPU without bf16 takes many times as long in half precision
        for pipeline in cfg.augmentations:
            pipeline.crop_size = QUICK_PIXELS
    if benchmark.epochs is not None:
        cfg.max_epochs = benchmark.epochs
    if benchmark.without_labels:
        OmegaConf.update(cfg, "knn_eval.enabled", False, force_add=True)
    cfg.seed = benchmark.seeds[0]
    return cfg


def _identity(cfg: DictConfig, benchmark: BenchmarkFile, data: dict[str, Any]) -> dict[str, Any]:
    """What decides a run of a config, which gets its data; its model was built for a test."""
    import metamask_solo  # noqa: F401  registers the method

    dataset = cfg.data.dataset
    if isinstance(benchmark.data, str) and dataset != "custom":
        raise UserError(f"data.dataset={dataset}: must be custom with data={benchmark.data}")
    if dataset in TORCHVISION and not isinstance(benchmark.data, str | None):
        # torchvision's files have their own reader; anything else is read as class folders
        packed = [Path(path, TORCHVISION[dataset]).is_dir() for path in data.values() if path]
        cfg.data.dataset = dataset if all(packed) else "custom"
    cfg.data.update(data)
    checked = read_pretraining_config(cfg)
    unlabelled = checked.data.get("val_path") is None or checked.data.get("no_labels", False)
    if unlabelled and not benchmark.without_labels:
        raise UserError(
            "data.val_path: missing; the evaluations need labelled images (without labels: "
            "data.train_path=FOLDER data.no_labels=true)"
        )
    completed = complete_pretrain_config(checked)
    refuse_known_faults(completed)
    build_method(completed)
    return run_identity(completed)


@contextlib.contextmanager
def _data_config(data: str | Folders | None) -> Iterator[dict[str, Any]]:
    """What a config says of the images; of data not made yet, folders with ten classes."""
    if isinstance(data, Folders):
        labels = {"no_labels": True} if data.no_labels else {}
        yield {"train_path": data.train_path, "val_path": data.val_path, **labels}
    elif data is None:
        yield {}
    else:
        with tempfile.TemporaryDirectory() as folder:
            for split, label in itertools.product(SPLITS, range(10)):
                path = Path(folder, split, str(label), "0.png")
                path.parent.mkdir(parents=True)
                path.touch()
            yield {f"{split}_path": f"{folder}/{split}" for split in SPLITS}


def _untrained(name: str, variant: Variant) -> Variant:
    """An untrained backbone, or the pixels, with the images and the backbone of a method."""
    kept = ("augmentations", "accelerator", "backbone", "method", "data")
    config = {key: variant.config[key] for key in kept if key in variant.config}
    decisive = ("augmentations.", "data.", *(("backbone.",) if name == "random" else ()))
    identity = {key: value for key, value in variant.identity.items() if key.startswith(decisive)}
    more = {"untrained": name}
    return Variant(
        name, {}, {**config, **more, "max_epochs": 0}, {**identity, **more}, variant.data_digest
    )


def _differences(variants: list[Variant]) -> Iterator[str]:
    """A note for each key in which methods differ, and which is not their own matter."""
    for key in ("crop_size", *COMPARABLE):
        methods: dict[str, dict[str, None]] = {}
        for method, setting, config, *_ in variants:
            if key == "crop_size":
                text = ", ".join(str(pipeline[key]) for pipeline in config["augmentations"])
            else:
                text = str(OmegaConf.select(OmegaConf.create(config), key))
            if key not in setting:
                methods.setdefault(text, {})[method] = None
        if len(methods) > 1:
            parts = [f"{key}={text} of {', '.join(names)}" for text, names in methods.items()]
            yield f"The methods differ in more than their losses: {'; '.join(parts)}."


def _run(variant: Variant, seed: int, out: Path) -> Run:
    method, setting, config, identity, data_digest = variant
    digest, config_digest = run_digests(data_digest, identity, seed)
    folder = out / "runs" / method / f"seed-{seed}-{digest}"
    checkpoint = {**config.get("checkpoint", {}), "dir": str(folder / "training")}
    config = {**copy.deepcopy(config), "seed": seed, "checkpoint": checkpoint}
    digests = digest, config_digest, data_digest
    return Run(method, setting, seed, config, identity, *digests, folder)


def run_digests(data_digest: str, identity: dict[str, Any], seed: int) -> tuple[str, str]:
    """The ``digest`` and the ``config_digest`` of a :class:`Run`."""
    config_digest = _digest([data_digest, {**identity, "seed": None}])
    return _digest([config_digest, seed]), config_digest


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _fingerprint(folder: str, dataset: str) -> str:
    """What the images of a data set are: names below the folder, and sizes.

    Of torchvision's files, the name says all: torchvision checks their sums, and a first run may
    have to download them.
    """
    if dataset in TORCHVISION:
        return dataset
    digest = hashlib.sha256()
    for path in sorted(Path(path) for path, _ in read_folder(folder, "data", None).samples):
        digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode())
    return digest.hexdigest()[:16]


def job_config(benchmark: BenchmarkFile, out: Path) -> dict[str, Any]:
    """The Hydra config of the jobs: nothing but the name of a run, and the launcher."""
    settings = benchmark.launcher.model_extra
    return {
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


def _check_launcher(benchmark: BenchmarkFile, out: Path) -> None:
    ConfigStore.instance().store(name=f"{JOB}.yaml", node=job_config(benchmark, out))
    try:
        with initialize_config_dir(str(scripts_folder()), version_base="1.2"):
            compose(JOB, ["run=none"], return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"launcher={benchmark.launcher.name}: {reason(error)}") from error
