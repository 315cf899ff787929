"""The runs of a benchmark from its YAML file: each one's config, composed, checked and known."""

import copy
import hashlib
import io
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
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
from metamask_solo.data.digits import VARIANTS
from metamask_solo.data.split import split_folder
from metamask_solo.errors import UserError
from metamask_solo.hosts import RELEASE
from metamask_solo.training.endings import scripts_folder
from metamask_solo.training.hydra_app import compose_file, reason

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
# of solo-learn's losses, what is another thing with several processes
SEVERAL_PROCESSES = {
    "barlow_twins": "solo-learn's gradient of this loss is the true one divided by their number",
    **(
        {
            "vicreg": "solo-learn 1.0.2 takes variance and covariance of each process's own images",
            "simclr": "solo-learn 1.0.2 takes no negatives of the other processes",
        }
        if RELEASE == "1.0.2"
        else {}
    ),
}
SHARE = 0.1  # of the images of a folder that is split, for validation


@dataclass(frozen=True)
class Run:
    """One method, in one setting, with one seed.

    Attributes:
        method: its name in the YAML file, or ``random`` or ``pixels``.
        setting: the searched keys and their values; empty where nothing is searched.
        config: the whole pretraining config, resolved.
        digest: of all that decides the result; another digest is another run.
        config_digest: of the same without the seed. The runs of one method have one.
        data_digest: of images and evaluations. Runs that are compared have one.
        folder: where everything of the run lies.
    """

    method: str
    setting: dict[str, Any]
    seed: int
    config: dict[str, Any]
    digest: str
    config_digest: str
    data_digest: str
    folder: Path

    @property
    def training(self) -> Path:
        """The folder of the pretraining run, once there is one."""
        runs = sorted(self.folder.glob("training/*/*/args.json"))
        return runs[-1].parent if runs else self.folder / "training"

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
    """

    file: BenchmarkFile
    out: Path
    runs: list[Run]
    notes: list[str]


@dataclass(frozen=True)
class Variant:
    """A method in one setting: the config of its runs without seed and folder, and what decides.

    See :func:`metamask_solo.training.resume.run_identity`.
    """

    method: str
    setting: dict[str, Any]
    config: dict[str, Any]
    identity: dict[str, Any]


def read_plan(config: str | Path, overrides: list[str]) -> Plan:
    """Reads and checks a benchmark's YAML file; writes nothing but the links of a split folder.

    Args:
        config: the YAML file: see :func:`find_config`.
        overrides: ``KEY=VALUE``, dotted keys of the file.

    Raises:
        UserError: the first thing that cannot work.
    """
    benchmark = read_file(config, overrides)
    out = Path(benchmark.out or Path("benchmarks") / benchmark.name)
    if out.exists() and not out.is_dir():
        raise UserError(f"out={out}: is not a folder")
    out = out.resolve()
    _check_launcher(benchmark, out)
    if isinstance(benchmark.data, str) and benchmark.data not in VARIANTS:
        folders = _folders(Path(benchmark.data), out / "images")
        benchmark = benchmark.model_copy(update={"data": folders})
    if isinstance(benchmark.data, Folders):
        folders = benchmark.data
        paths = {"train_path": folders.train_path, "val_path": folders.val_path}
        whole = {key: path and str(Path(path).resolve()) for key, path in paths.items()}
        benchmark = benchmark.model_copy(update={"data": folders.model_copy(update=whole)})
    with redirect_stderr(io.StringIO()) as said:
        variants = _variants(find_config(config).parent, benchmark)
    for line in dict.fromkeys(said.getvalue().splitlines()):  # each method says the same
        print(line, file=sys.stderr)
    wanted = [variant for variant in variants if variant.method in benchmark.trained]
    # an untrained backbone is another one with each seed; pixels are pixels
    planned: list[tuple[Variant, int]] = [
        (_untrained(name, variants[0]), seed)
        for name in benchmark.shown
        if name not in benchmark.methods
        for seed in (benchmark.seeds[:1] if name == "pixels" else benchmark.seeds)
    ]
    planned += [
        (variant, seed)
        for seed in benchmark.seeds  # all methods of one seed first: an early table compares all
        for variant in wanted
        if seed in benchmark.seeds_of(variant.method)
    ]
    images: dict[tuple[str, str], str] = {}
    runs = [_run(variant, seed, benchmark, images, out) for variant, seed in planned]
    for run in runs:
        if run.data_digest != runs[0].data_digest:
            raise UserError(
                f"{run}: its images are not those of {runs[0]}; give all the same by "
                "data.train_path=FOLDER data.val_path=FOLDER"
            )
    return Plan(benchmark, out, runs, [*_differences(wanted), *_of_several_processes(wanted)])


def _folders(folder: Path, out: Path) -> Folders:
    """A folder of train/ and val/, or else the links of its split, as ``data split`` makes them."""
    train, val = folder / "train", folder / "val"
    if train.is_dir() and val.is_dir():
        return Folders(train_path=str(train), val_path=str(val))
    split = split_folder(folder, out, SHARE)
    train, val = split.out / "train", split.out / "val"
    if split.classes:
        return Folders(train_path=str(train), val_path=str(val))
    return Folders(train_path=str(train), no_labels=True)


def _of_several_processes(variants: list[Variant]) -> Iterator[str]:
    """A note for each method whose loss several processes change."""
    for variant in {variant.method: variant for variant in variants}.values():
        fault = SEVERAL_PROCESSES.get(variant.config["method"])
        if fault is not None and variant.identity["processes"] > 1:
            yield f"{variant.method}: with several processes, {fault}."


def override_list(setting: Mapping[str, Any]) -> list[str]:
    """``KEY=VALUE`` for each key, as one would write it on a command line."""
    return [f"{key}={json.dumps(value)}" for key, value in setting.items()]


def _variants(folder: Path, benchmark: BenchmarkFile) -> list[Variant]:
    """Those that are wanted, and the first, whose backbone and images the untrained have.

    Each config is complete, and its model was built for a test.
    """
    first = next(iter(benchmark.methods))
    variants = []
    with _placeholder_data(benchmark.data) as paths:
        for name, method in benchmark.methods.items():
            if name != first and name not in benchmark.trained:
                continue
            search = {**benchmark.search, **method.search}
            for values in itertools.product(*search.values()):
                setting = dict(zip(search, values, strict=True))
                try:
                    cfg = compose_method(folder, benchmark, name, setting)
                    variants.append(Variant(name, setting, *_checked(cfg, benchmark, paths)))
                except UserError as error:
                    raise UserError(f"methods.{name}: {error}") from error
                except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
                    raise UserError(f"methods.{name}: {reason(error)}") from error
    return variants


def compose_method(
    folder: Path, benchmark: BenchmarkFile, name: str, setting: dict[str, Any]
) -> DictConfig:
    """The config of a method: its file, the benchmark's overrides, its own, and the setting."""
    method = benchmark.methods[name]
    config = method.config
    places = [folder / config, Path(config), *packaged(config, scripts_folder() / "pretrain")]
    paths = [path for path in places if path.is_file()]
    if not paths:
        raise UserError(
            f"config={config}: no such file here, beside the benchmark's file, or in "
            f"{scripts_folder() / 'pretrain'}"
        )
    path = paths[0].resolve()
    overrides = [*benchmark.overrides, *method.overrides, *benchmark.last_overrides]
    cfg = compose_file(path, overrides)
    for key, value in setting.items():
        if OmegaConf.select(cfg, key, default=RESERVED) is RESERVED:  # a default that none has
            raise UserError(f"search: {key} is not in {config}")
        OmegaConf.update(cfg, key, value)
    for key, value in EVERY_RUN.items():
        OmegaConf.update(cfg, key, value, force_add=True)
    if benchmark.quick:
        cfg.precision = "32"  # a CPU without bf16 takes many times as long in half precision
        for pipeline in cfg.augmentations:
            pipeline.crop_size = QUICK_PIXELS
    if benchmark.length is not None:
        OmegaConf.update(cfg, "max_epochs", benchmark.length, force_add=True)
    if benchmark.without_labels:
        OmegaConf.update(cfg, "knn_eval.enabled", False, force_add=True)
    cfg.seed = benchmark.seeds[0]
    return cfg


def _checked(
    cfg: DictConfig, benchmark: BenchmarkFile, paths: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Config and identity of a run; its model was built for a test."""
    import metamask_solo  # noqa: F401  registers the method
    from metamask_solo.hosts import build_method, complete_pretrain_config
    from metamask_solo.training.config import read_pretraining_config
    from metamask_solo.training.resume import run_identity

    data = benchmark.data
    trial = copy.deepcopy(cfg)
    if isinstance(data, str) and trial.data.dataset != "custom":
        raise UserError(f"data.dataset={trial.data.dataset}: must be custom with data={data}")
    if isinstance(data, Folders):
        trial.data.dataset = cfg.data.dataset = _dataset(cfg.data.dataset, data)
    trial.data.update(paths)
    trial = read_pretraining_config(trial)
    unlabelled = trial.data.get("val_path") is None or trial.data.get("no_labels", False)
    if unlabelled and not benchmark.without_labels:
        raise UserError(
            "data.val_path: missing; the evaluations need labelled images (without labels: "
            "data.train_path=FOLDER data.no_labels=true)"
        )
    if trial.data.get("format", "image_folder") != "image_folder":
        raise UserError(f"data.format={trial.data.format}: must be image_folder")
    completed = complete_pretrain_config(trial)
    build_method(completed)
    if isinstance(data, Folders):
        cfg.data.update(_of_config(data))
    content: Any = OmegaConf.to_container(cfg, resolve=True)
    return content, run_identity(completed)


def _dataset(dataset: str, data: Folders) -> str:
    """The data set that solo-learn is told: ``custom`` where the folders hold class folders.

    solo-learn's CIFAR-10, CIFAR-100 and STL-10 are torchvision's files; everything else is read as
    class folders.
    """
    if dataset not in TORCHVISION:
        return dataset
    folders = [folder for folder in (data.train_path, data.val_path) if folder is not None]
    packed = [(Path(folder) / TORCHVISION[dataset]).is_dir() for folder in folders]
    return dataset if all(packed) else "custom"


def _of_config(data: Folders) -> dict[str, Any]:
    """What a run's config says of the images."""
    no_labels = {"no_labels": True} if data.no_labels else {}
    return {"train_path": data.train_path, "val_path": data.val_path, **no_labels}


@contextmanager
def _placeholder_data(data: str | Folders | None) -> Iterator[dict[str, Any]]:
    """Paths to check configs with: of data not made yet, folders with ten classes."""
    if not isinstance(data, str):
        yield {} if data is None else _of_config(data)
        return
    with tempfile.TemporaryDirectory() as folder:
        for split, label in itertools.product(("train", "val"), range(10)):
            path = Path(folder, split, str(label), "0.png")
            path.parent.mkdir(parents=True)
            path.touch()
        yield {"train_path": f"{folder}/train", "val_path": f"{folder}/val"}


def _untrained(name: str, variant: Variant) -> Variant:
    """An untrained backbone, or the pixels, with the images and the backbone of a method."""
    config = {"data": {"format": "image_folder", "num_workers": 4}, "max_epochs": 0}
    kept = ("augmentations", "accelerator", "backbone", "method", "data")
    config |= {key: variant.config[key] for key in kept if key in variant.config}
    decisive = ("augmentations.", "data.", *(("backbone.",) if name == "random" else ()))
    identity = {key: value for key, value in variant.identity.items() if key.startswith(decisive)}
    return Variant(name, {}, {**config, "untrained": name}, {**identity, "untrained": name})


def _differences(variants: list[Variant]) -> Iterator[str]:
    """A note for each key in which methods differ, and which is not their own matter."""

    def value(config: dict[str, Any], key: str) -> str:
        if key == "crop_size":
            return ", ".join(str(pipeline[key]) for pipeline in config["augmentations"])
        return str(OmegaConf.select(OmegaConf.create(config), key))

    for key in ("crop_size", *COMPARABLE):
        methods: dict[str, list[str]] = {}
        for variant in variants:
            if key not in variant.setting:
                methods.setdefault(value(variant.config, key), []).append(variant.method)
        if len(methods) > 1:
            parts = [f"{key}={text} of {', '.join(names)}" for text, names in methods.items()]
            yield f"The methods differ in more than their losses: {'; '.join(parts)}."


def _run(
    variant: Variant,
    seed: int,
    benchmark: BenchmarkFile,
    images: dict[tuple[str, str], str],
    out: Path,
) -> Run:
    data, config = benchmark.data, json.loads(json.dumps(variant.config))
    paths = {key: config["data"].get(key) for key in ("train_path", "val_path")}
    if isinstance(data, str):  # made from packages, so the name says all
        files = [data]
        paths = {
            f"{split}_path": str(out / "datasets" / data / split) for split in ("train", "val")
        }
    else:
        places = [(path, config["data"]["dataset"]) for path in paths.values() if path is not None]
        for place in set(places) - images.keys():
            images[place] = _fingerprint(*place)
        files = [images[place] for place in places]
    measured = {name: EVALUATIONS[name] for name in benchmark.measured}
    data_digest = _digest([files, measured, RELEASE])
    config_digest = _digest([data_digest, {**variant.identity, "seed": None}])
    digest = _digest([config_digest, seed])
    folder = out / "runs" / variant.method / f"seed-{seed}-{digest}"
    config["seed"] = seed
    config["data"] |= paths
    config["checkpoint"] = {**config.get("checkpoint", {}), "dir": str(folder / "training")}
    digests = digest, config_digest, data_digest
    return Run(variant.method, variant.setting, seed, config, *digests, folder)


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _fingerprint(folder: str, dataset: str) -> str:
    """What the files of a data set are: names below the folder, and sizes.

    Links are followed, as training does. Of torchvision's files, the name says all: torchvision
    checks their sums, and a first run may have to download them.
    """
    if dataset in TORCHVISION:
        return dataset
    files = []
    seen = set()
    for parent, below, names in os.walk(folder, followlinks=True):
        if os.path.realpath(parent) in seen:  # a link that leads back
            below.clear()
            continue
        seen.add(os.path.realpath(parent))
        files += [Path(parent, name) for name in names]
    digest = hashlib.sha256()
    for path in sorted(path for path in files if path.is_file()):
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
