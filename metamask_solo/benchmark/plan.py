"""The runs of a benchmark, and what its report is about, from its YAML file."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from metamask_solo.benchmark.configs import TORCHVISION, compose_variants, untrained_config
from metamask_solo.benchmark.file import (
    EVALUATIONS,
    BenchmarkFile,
    Folders,
    Launcher,
    read_file,
)
from metamask_solo.benchmark.notes import notes_on
from metamask_solo.errors import UserError
from metamask_solo.hosts import RELEASE
from metamask_solo.training.endings import scripts_folder
from metamask_solo.training.hydra_app import reason

JOB = "metamask_solo_benchmark_job"


@dataclass(frozen=True)
class Run:
    """One method, in one setting, with one seed.

    Attributes:
        method: the label in the YAML file, or one of ``REFERENCES``.
        setting: the searched keys and their values; empty where nothing is searched.
        config: the whole pretraining config, resolved.
        digest: of all that decides the result; another digest is another run. Of the data's
            folders, names and sizes of the files count, not the place.
        config_digest: of the same without the seed, and without what is measured. The runs of a
            variant that have the same one may be taken together.
        data_digest: of the data alone. Runs that have the same one may be compared.
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
    def variant(self) -> str:
        """The method and its setting: what the runs of several seeds have in common."""
        return " ".join([self.method, *override_list(self.setting)])

    @property
    def training(self) -> Path:
        """The folder of the pretraining run, once there is one."""
        found = sorted(self.folder.glob("training/*/*/args.json"))
        return found[-1].parent if found else self.folder / "training"

    def __str__(self) -> str:
        return f"{self.variant}, seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """A checked benchmark.

    Attributes:
        file: its keys; folders of images are whole paths.
        notes: what a reader of the report must know.
    """

    file: BenchmarkFile
    out: Path
    runs: list[Run]
    notes: list[str]


def read_plan(file: str | Path, overrides: list[str]) -> Plan:
    """Reads and checks a benchmark's YAML file; writes nothing.

    Args:
        file: the YAML file.
        overrides: ``KEY=VALUE``, dotted keys of the file.

    Raises:
        UserError: the first thing that cannot work.
    """
    given = read_file(file, overrides)
    out = Path(given.out or Path("benchmarks") / given.name)
    if out.exists() and not out.is_dir():
        raise UserError(f"out={out}: is not a folder")
    out = out.resolve()
    _check_launcher(given.launcher, out)
    if isinstance(given.data, Folders):
        paths = {key: str(Path(path).resolve()) for key, path in given.data.given().items()}
        given = given.model_copy(update={"data": given.data.model_copy(update=paths)})
    variants = compose_variants(Path(file), given)
    # an untrained backbone is another one with each seed; pixels are pixels
    planned: list[tuple[str, dict[str, Any], int, dict[str, Any]]] = [
        (label, {}, seed, untrained_config(label, variants[0].config))
        for label in given.untrained
        for seed in (given.seeds[:1] if label == "pixels" else given.seeds)
    ]
    wanted = [variant for variant in variants if variant.method in given.trained]
    planned += [
        (variant.method, variant.setting, seed, variant.config)
        for seed in given.seeds  # all methods of one seed first: an early table compares all
        for variant in wanted
        if seed in given.seeds_of(variant.method)
    ]
    if given.trained and not any(map(given.seeds_of, given.trained)):
        label = given.trained[0]
        raise UserError(
            f"methods.{label}.seeds={given.methods[label].seeds}: none of them is in "
            f"seeds={given.seeds}, so there is nothing to run"
        )
    files: dict[tuple[str, str], str] = {}
    runs = [_run(*one, given, files, out) for one in planned]
    for run in runs:
        if run.data_digest != runs[0].data_digest:
            raise UserError(
                f"{run}: its images are others than those of {runs[0]}: no comparison; give all "
                "the same by data.train_path=FOLDER data.val_path=FOLDER"
            )
    return Plan(given, out, runs, notes_on(wanted, given))


def override_list(setting: Mapping[str, Any]) -> list[str]:
    """``KEY=VALUE`` for each key, as one would write it on a command line."""
    return [f"{key}={json.dumps(value)}" for key, value in setting.items()]


def job_config(plan: Plan) -> dict[str, Any]:
    """The Hydra config of the jobs: nothing but the name of a run, and the launcher."""
    return _job_config(plan.file.launcher, plan.out)


def _job_config(launcher: Launcher, out: Path) -> dict[str, Any]:
    settings = launcher.model_extra
    return {
        "defaults": [
            "_self_",
            {"override hydra/launcher": launcher.name},
            {"override hydra/hydra_logging": "disabled"},
            {"override hydra/job_logging": "disabled"},
        ],
        "run": "???",
        "out": str(out),
        "launcher": launcher.name,
        "launched_by": 0,
        "hydra": {
            "output_subdir": None,
            "sweep": {"dir": str(out / "hydra"), "subdir": "."},
            **({"launcher": settings} if settings else {}),
        },
    }


def _check_launcher(launcher: Launcher, out: Path) -> None:
    ConfigStore.instance().store(name=f"{JOB}.yaml", node=_job_config(launcher, out))
    try:
        with initialize_config_dir(str(scripts_folder()), version_base="1.2"):
            compose(JOB, ["run=none"], return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"launcher={launcher.name}: {reason(error)}") from error


def _fingerprint(folder: str, dataset: str) -> str:
    """What the files of a data set are: names below the folder, and sizes.

    Links are followed, as training does. Of torchvision's files, the name says all: torchvision
    checks their sums, and a first run may have to download them.
    """
    if dataset in TORCHVISION:
        return dataset
    files, seen = [], set()
    for place, below, names in os.walk(folder, followlinks=True):
        if os.path.realpath(place) in seen:  # a link that leads back
            below.clear()
            continue
        seen.add(os.path.realpath(place))
        below.sort()
        files += [Path(place, name) for name in names]
    digest = hashlib.sha256()
    for path in sorted(path for path in files if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode())
    return digest.hexdigest()[:16]


def _run(
    label: str,
    setting: dict[str, Any],
    seed: int,
    config: dict[str, Any],
    benchmark: BenchmarkFile,
    files: dict[tuple[str, str], str],
    out: Path,
) -> Run:
    data, config = benchmark.data, json.loads(json.dumps(config))
    config["seed"] = seed
    config.setdefault("checkpoint", {})
    given = dict(config["data"])
    # the place of data and results must not decide what they are
    for key in ("train_path", "val_path"):
        if isinstance(data, str):
            config["data"][key] = data
        elif given.get(key) is not None:
            place = given[key], given["dataset"]
            files[place] = files.get(place) or _fingerprint(*place)
            config["data"][key] = files[place]
    config["checkpoint"].pop("dir", None)
    measured = {name: EVALUATIONS[name] for name in benchmark.measured}
    decisive = json.dumps(
        {"config": config, "evaluations": measured, "solo-learn": RELEASE}, sort_keys=True
    )
    seedless = json.dumps(
        {"config": {**config, "seed": None}, "solo-learn": RELEASE}, sort_keys=True
    )
    images = json.dumps([config["data"].get("train_path"), config["data"].get("val_path")])
    config["data"] = given
    digest = hashlib.sha256(decisive.encode()).hexdigest()[:12]
    config_digest, data_digest = _figures(seedless), _figures(images)
    folder = out / "runs" / label / f"seed-{seed}-{digest}"
    if isinstance(data, str):
        config["data"]["train_path"] = str(out / "datasets" / data / "train")
        config["data"]["val_path"] = str(out / "datasets" / data / "val")
    config["checkpoint"]["dir"] = str(folder / "training")
    return Run(label, setting, seed, config, digest, config_digest, data_digest, folder)


def _figures(text: str) -> str:
    """A digest in figures: older versions read no other column that they do not know."""
    return str(int(hashlib.sha256(text.encode()).hexdigest()[:12], 16))
