"""What a benchmark's YAML file asks for, checked before anything is written."""

import hashlib
import itertools
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image

from metamask_solo.data.digits import VARIANTS
from metamask_solo.data.folders import find_images
from metamask_solo.errors import UserError
from metamask_solo.hosts import RELEASE
from metamask_solo.training.hydra_app import open_config, reason, scripts_folder

# each with a number that changes when what it measures does: results of before are no result then
EVALUATIONS = {"knn": 1, "linear": 2, "rankme": 1}
# what can be measured where the images have no labels
LABEL_FREE = ("rankme",)
NOT_ACCURACY = (
    "RankMe counts the directions that the features of the training images use. It needs no "
    "labels, and is no accuracy: a higher one is not always better."
)
# what stands beside the methods without any training: an untrained backbone, and the pixels
REFERENCES = ("random", "pixels")
# two runs of one method with one seed: a mask that stays where it is cancels in both heads
NOISE_FLOOR = ("joint", "fixed_mask")
DEFAULTS: dict[str, Any] = {
    "name": None,
    "out": None,
    "data": None,
    "methods": None,
    "only": None,
    "seeds": [0, 1, 2],
    "epochs": None,
    "overrides": [],
    "search": {},
    "evaluations": None,
    "references": [],
    "launcher": "basic",
    "reference": None,
    "comparisons": None,
    "noise_floor": None,
    "rows": None,
    "keep_checkpoints": True,
}
METHOD_KEYS = ("config", "overrides", "search", "seeds")
# the benchmark sets these itself
RESERVED = {
    "seed": "seeds",
    "max_epochs": "epochs",
    "data.train_path": "data",
    "data.val_path": "data",
    "checkpoint.dir": "out",
}
# of solo-learn's losses, what is another thing with several processes; vicreg's: 1.0.2 alone
SEVERAL_PROCESSES = {
    "barlow_twins": "with several processes, solo-learn's gradient of this loss is the true one "
    "divided by their number",
    **(
        {
            "vicreg": "with several processes, solo-learn 1.0.2 takes variance and covariance of "
            "each process's own images, not of the batch of all",
            "simclr": "with several processes, solo-learn 1.0.2 takes no negatives of the others",
        }
        if RELEASE == "1.0.2"
        else {}
    ),
}
# folder that torchvision's copy of a data set is in
TORCHVISION = {
    "cifar10": "cifar-10-batches-py",
    "cifar100": "cifar-100-python",
    "stl10": "stl10_binary",
}
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
        folder: where everything of the run lies.
    """

    method: str
    setting: dict[str, Any]
    seed: int
    config: dict[str, Any]
    digest: str
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
class Subject:
    """What a report is about: what a benchmark's file says of itself alone.

    Attributes:
        methods: labels in the order of the file, those of the references first.
        comparisons: pairs of methods whose differences are taken, each once.
        noise_floor: two methods that are one: what their pairs of runs differ by is noise.
        rows: CSV file that finished runs are taken from, and added to.
        searched: several settings of a method are tried.
        notes: what a reader of the report must know.
        seeds: of each method; what is not in it may have any.
        epochs: of all methods; None: those of their pretraining files.
    """

    name: str
    data: str | dict[str, str] | None
    methods: list[str]
    evaluations: list[str]
    comparisons: list[tuple[str, str]]
    noise_floor: tuple[str, str] | None
    rows: Path | None
    searched: bool
    notes: list[str]
    seeds: dict[str, list[int]] = field(default_factory=dict, kw_only=True)
    epochs: int | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class Plan(Subject):
    """A checked benchmark."""

    out: Path
    launcher: dict[str, Any]
    keep_checkpoints: bool
    runs: list[Run]


def read_subject(file: str | Path, overrides: list[str]) -> Subject:
    """Reads what a benchmark's file says of the report; needs no data, and composes nothing.

    Raises:
        UserError: the first thing in the file that is wrong.
    """
    given = _read(Path(file), overrides)
    methods = _methods(given["methods"])
    references = _references(given["references"], methods)
    wanted = _only(given["only"], methods)
    seeds, epochs = _seeds(given["seeds"]), _epochs(given["epochs"])
    noise_floor = _noise_floor(given["noise_floor"], methods)
    return Subject(
        name=given["name"],
        data=given["data"],
        methods=[*references, *(label for label in methods if label in wanted)],
        evaluations=_evaluations(given["evaluations"], _without_labels(given["data"])),
        comparisons=_comparisons(given, list(methods), noise_floor),
        noise_floor=noise_floor,
        rows=_rows(given["rows"]),
        searched=bool(given["search"]) or any(method["search"] for method in methods.values()),
        notes=[],
        seeds={
            label: [seed for seed in seeds if seed in method.get("seeds", seeds)]
            for label, method in methods.items()
        }
        | {label: seeds for label in references if label != "pixels"},
        epochs=epochs,
    )


def read_plan(file: str | Path, overrides: list[str]) -> Plan:
    """Reads and checks a benchmark's YAML file; writes nothing.

    Args:
        file: the YAML file.
        overrides: ``KEY=VALUE``, dotted keys of the file.

    Raises:
        UserError: the first thing that cannot work.
    """
    file = Path(file)
    given = _read(file, overrides)
    seeds = _seeds(given["seeds"])
    epochs = _epochs(given["epochs"])
    if not isinstance(given["keep_checkpoints"], bool):
        raise UserError(f"keep_checkpoints={given['keep_checkpoints']}: must be true or false")
    data = _data(given["data"])
    methods = _methods(given["methods"])
    subject = read_subject(file, overrides)
    wanted = _only(given["only"], methods)
    first = next(iter(methods))  # whose backbone and images the references have
    methods = {label: m for label, m in methods.items() if label == first or label in wanted}
    out = Path(given["out"] or Path("benchmarks") / given["name"])
    if out.exists() and not out.is_dir():
        raise UserError(f"out={out}: is not a folder")
    out = out.resolve()
    launcher = _launcher(given["launcher"], out)

    shared, common = _override_list(given["overrides"], "overrides"), _search(given, "search")
    variants, processes = [], {}
    own_data: dict[str, str] = {}
    with _placeholder_data(data) as paths:
        for label, method in methods.items():
            own = _override_list(method["overrides"], f"methods.{label}.overrides")
            for setting in _grid({**common, **_search(method, f"methods.{label}.search")}):
                cfg = _compose(file, label, method["config"], [*shared, *own], setting)
                own_data[label] = str(cfg.data.get("train_path"))
                config, count = _checked(label, cfg, data, epochs, seeds[0], paths)
                variants.append((label, setting, config))
                processes[label] = count
    # an untrained backbone is another one with each seed; pixels are pixels
    shown = {"random": seeds, "pixels": seeds[:1]}
    planned: list[tuple[str, dict[str, Any], int, dict[str, Any]]] = [
        (label, {}, seed, _untrained(label, variants[0][2]))
        for label in subject.methods
        if label in REFERENCES
        for seed in shown[label]
    ]
    planned += [
        (label, setting, seed, config)
        for seed in seeds  # all methods of one seed first: an early table compares all
        for label, setting, config in variants
        if label in wanted and seed in methods[label].get("seeds", seeds)
    ]
    files = _fingerprints(data)
    runs = [_run(*one, data, files, subject.evaluations, out) for one in planned]
    used = {label: config["method"] for label, _, config in variants if label in wanted}
    notes = _notes(used, processes)
    kept = {label: config for label, _, config in variants if label in wanted}
    notes += _of_other_data(kept, own_data, data)
    if set(subject.evaluations) & set(LABEL_FREE):
        notes.append(NOT_ACCURACY)
    return Plan(
        **{**vars(subject), "data": data, "notes": notes},
        out=out,
        launcher=launcher,
        keep_checkpoints=given["keep_checkpoints"],
        runs=runs,
    )


def override_list(setting: Mapping[str, Any]) -> list[str]:
    """``KEY=VALUE`` for each key, as one would write it on a command line."""
    return [f"{key}={json.dumps(value)}" for key, value in setting.items()]


def job_config(plan: Plan) -> dict[str, Any]:
    """The Hydra config of the jobs: nothing but the name of a run, and the launcher."""
    return _job_config(plan.launcher, plan.out)


def _job_config(launcher: dict[str, Any], out: Path) -> dict[str, Any]:
    settings = {key: value for key, value in launcher.items() if key != "name"}
    return {
        "defaults": [
            "_self_",
            {"override hydra/launcher": launcher["name"]},
            {"override hydra/hydra_logging": "disabled"},
            {"override hydra/job_logging": "disabled"},
        ],
        "run": "???",
        "out": str(out),
        "launcher": launcher["name"],
        "launched_by": 0,
        "hydra": {
            "output_subdir": None,
            "sweep": {"dir": str(out / "hydra"), "subdir": "."},
            **({"launcher": settings} if settings else {}),
        },
    }


def _read(file: Path, overrides: list[str]) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    for override in overrides:
        if "=" not in override.lstrip("="):
            raise UserError(f"{override}: must be KEY=VALUE")
    try:
        loaded = OmegaConf.load(file)
        merged = OmegaConf.merge(loaded, OmegaConf.from_dotlist(overrides))
        content: Any = OmegaConf.to_container(merged, resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{file}: {reason(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: must be a mapping")
    for key in content:
        if key not in DEFAULTS:
            raise UserError(f"{key}: unknown; allowed are {', '.join(DEFAULTS)}")
    given = {**DEFAULTS, **content}
    name = given["name"]
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"name={name}: must be a word of letters, digits, '_', '-' and '.'")
    if given["out"] is not None and not isinstance(given["out"], str):
        raise UserError(f"out={given['out']}: must be the path of a folder")
    return given


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _seeds(seeds: Any, key: str = "seeds") -> list[int]:
    good = isinstance(seeds, list) and seeds
    if not good or not all(_is_integer(s) and 0 <= s < 2**32 for s in seeds):
        raise UserError(f"{key}={seeds}: must be a list of integers from 0 to below 2^32")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{key}={seeds}: a seed occurs twice")
    return list(seeds)


def _epochs(epochs: Any) -> int | None:
    if epochs is not None and (not _is_integer(epochs) or epochs < 1):
        raise UserError(f"epochs={epochs}: must be an integer of at least 1")
    return epochs


def _without_labels(data: Any) -> bool:
    return isinstance(data, dict) and data.get("no_labels") is True


def _evaluations(names: Any, without_labels: bool) -> list[str]:
    if without_labels:
        return list(LABEL_FREE)  # the file may name others, which need labels
    if names is None:
        return ["knn", "linear"]
    if not isinstance(names, list) or not names or not set(names) <= set(EVALUATIONS):
        raise UserError(f"evaluations={names}: must be a list of {', '.join(EVALUATIONS)}")
    return [name for name in EVALUATIONS if name in names]


def _data(data: Any) -> str | dict[str, Any] | None:
    if data is None or (isinstance(data, str) and data in VARIANTS):
        return data
    if not isinstance(data, dict):
        allowed = f"{', '.join(VARIANTS)}, or a mapping with train_path and val_path"
        raise UserError(f"data={data}: allowed are {allowed}")
    data = dict(data)
    no_labels = data.pop("no_labels", False)
    if not isinstance(no_labels, bool):
        raise UserError(f"data.no_labels={no_labels}: must be true or false")
    if no_labels:
        data.pop("val_path", None)
    for key in ("train_path",) if no_labels else ("train_path", "val_path"):
        if not isinstance(data.get(key), str):
            raise UserError(f"data.{key}: missing; give it the path of a folder")
    for key in data.keys() - {"train_path", "val_path"}:
        raise UserError(f"data.{key}: unknown; allowed are train_path, val_path, no_labels")
    found: dict[str, Any] = {key: str(Path(path).resolve()) for key, path in data.items()}
    return {**found, "val_path": None, "no_labels": True} if no_labels else found


def _methods(methods: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(methods, dict) or not methods:
        raise UserError("methods: missing; give a mapping of names to {config: FILE}")
    for label, method in methods.items():
        if not isinstance(label, str) or not re.fullmatch(r"[A-Za-z0-9][\w-]*", label):
            raise UserError(f"methods.{label}: a name is made of letters, digits, '_' and '-'")
        if not isinstance(method, dict):
            raise UserError(f"methods.{label}={method}: must be a mapping with config")
        for key in method:
            if key not in METHOD_KEYS:
                allowed = ", ".join(METHOD_KEYS)
                raise UserError(f"methods.{label}.{key}: unknown; allowed are {allowed}")
        if not isinstance(method.get("config"), str):
            raise UserError(f"methods.{label}.config: missing; give it the path of a YAML file")
        if "seeds" in method:
            _seeds(method["seeds"], f"methods.{label}.seeds")
    return {label: {"overrides": [], "search": {}, **method} for label, method in methods.items()}


def _references(names: Any, methods: dict[str, Any]) -> list[str]:
    if not isinstance(names, list) or not set(names) <= set(REFERENCES):
        raise UserError(f"references={names}: must be a list of {', '.join(REFERENCES)}")
    for name in names:
        if name in methods:
            raise UserError(f"methods.{name}: the name of a reference; call the method otherwise")
    return [name for name in REFERENCES if name in names]


def _only(names: Any, methods: dict[str, Any]) -> list[str]:
    if names is None:
        return list(methods)
    if not isinstance(names, list) or not set(names) <= set(methods):  # none: the references
        raise UserError(f"only={names}: must be a list of {', '.join(methods)}")
    return list(names)


def _noise_floor(pair: Any, methods: dict[str, Any]) -> tuple[str, str] | None:
    if pair is None:
        return NOISE_FLOOR if set(NOISE_FLOOR) <= set(methods) else None
    good = isinstance(pair, list) and len(pair) == 2 and pair[0] != pair[1]
    if not good or not set(pair) <= set(methods):
        raise UserError(f"noise_floor={pair}: must be two of {', '.join(methods)}")
    return pair[0], pair[1]


def _comparisons(
    given: dict[str, Any], methods: list[str], noise_floor: tuple[str, str] | None
) -> list[tuple[str, str]]:
    """The reference and each other method, or the pairs that are given.

    Two methods that are one are not compared, and a method with one of them only.
    """
    reference, pairs = given["reference"], given["comparisons"]
    if reference is None and "metamask" in methods:
        reference = "metamask"
    if reference is not None and reference not in methods:
        raise UserError(f"reference={reference}: allowed are {', '.join(methods)}")
    if pairs is None:
        left_out = {reference}
        if noise_floor is not None:
            left_out |= set(noise_floor if reference in noise_floor else noise_floor[1:])
        return [(reference, m) for m in methods if m not in left_out] if reference else []
    found: list[tuple[str, str]] = []
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        good = isinstance(pair, list) and len(pair) == 2 and pair[0] != pair[1]
        if not good or not set(pair) <= set(methods):
            raise UserError(f"comparisons: {pair} must be two of {', '.join(methods)}")
        if (pair[0], pair[1]) in found or (pair[1], pair[0]) in found:
            raise UserError(f"comparisons: {pair} is there twice")
        found.append((pair[0], pair[1]))
    return found


def _rows(path: Any) -> Path | None:
    if path is not None and not isinstance(path, str):
        raise UserError(f"rows={path}: must be the path of a CSV file")
    return None if path is None else Path(path).resolve()


def _override_list(overrides: Any, key: str) -> list[str]:
    if not isinstance(overrides, list) or not all(isinstance(o, str) for o in overrides):
        raise UserError(f"{key}={overrides}: must be a list of texts such as optimizer.lr=0.1")
    for override in overrides:
        _refuse_reserved(override.lstrip("+~").split("=")[0], key)
    return list(overrides)


def _search(given: dict[str, Any], key: str) -> dict[str, list[Any]]:
    search = given["search"]
    if not isinstance(search, dict):
        raise UserError(f"{key}={search}: must be a mapping of keys to lists of values")
    for name, values in search.items():
        _refuse_reserved(name, key)
        plain = isinstance(values, list) and values
        if not plain or not all(isinstance(v, int | float | str | None) for v in values):
            raise UserError(f"{key}.{name}={values}: must be a list of values")
    return search


def _refuse_reserved(name: str, key: str) -> None:
    if name in RESERVED:
        raise UserError(f"{key}: {name} is set by the benchmark's own key {RESERVED[name]}")


def _grid(search: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [
        dict(zip(search, values, strict=True)) for values in itertools.product(*search.values())
    ]


def _launcher(launcher: Any, out: Path) -> dict[str, Any]:
    if isinstance(launcher, str):
        launcher = {"name": launcher}
    if not isinstance(launcher, dict) or not isinstance(launcher.get("name"), str):
        raise UserError(f"launcher={launcher}: must be a name, or a mapping with name and settings")
    ConfigStore.instance().store(name=f"{JOB}.yaml", node=_job_config(launcher, out))
    try:
        with initialize_config_dir(str(scripts_folder()), version_base="1.2"):
            compose(JOB, ["run=none"], return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"launcher={launcher['name']}: {reason(error)}") from error
    return launcher


def _compose(
    file: Path, label: str, config: str, overrides: list[str], setting: dict[str, Any]
) -> DictConfig:
    places = [file.parent / config, scripts_folder() / "pretrain" / config]
    found = [place for place in places if place.is_file()]
    if not found:
        raise UserError(
            f"methods.{label}.config={config}: no such file beside {file} or in scripts/pretrain"
        )
    path = found[0].resolve()
    try:
        with initialize_config_dir(str(path.parent), version_base="1.2"):
            cfg = open_config(compose(path.stem, overrides))
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"methods.{label}: {reason(error)}") from error
    for key, value in setting.items():
        if OmegaConf.select(cfg, key, default=RESERVED) is RESERVED:  # a default that none has
            raise UserError(f"methods.{label}: search: {key} is not in {config}")
        OmegaConf.update(cfg, key, value)
    return cfg


def _checked(
    label: str,
    cfg: DictConfig,
    data: Any,
    epochs: int | None,
    seed: int,
    paths: dict[str, str],
) -> tuple[dict[str, Any], int]:
    """The complete config of a run without its seed and folder, and its number of processes.

    Its model was built for a test.
    """
    import metamask_solo  # noqa: F401  registers the method
    from metamask_solo.hosts import build_method, complete_pretrain_config
    from metamask_solo.training.config_checks import check_pretrain_config

    ours = {
        "checkpoint.enabled": True,
        "auto_resume.enabled": True,
        "auto_resume.max_hours": 24 * 365 * 10,
        "wandb.enabled": False,
        "fold_at_end": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    if epochs is not None:
        ours["max_epochs"] = epochs
    for key, value in ours.items():
        OmegaConf.update(cfg, key, value, force_add=True)
    cfg.seed = seed
    trial = open_config(cfg)
    try:
        if isinstance(data, str) and trial.data.dataset != "custom":
            raise UserError(f"data.dataset={trial.data.dataset}: must be custom with data={data}")
        if isinstance(data, dict):
            trial.data.dataset = cfg.data.dataset = _dataset(cfg.data.dataset, data)
        trial.data.update(paths)
        check_pretrain_config(trial)
        unlabelled = trial.data.get("val_path") is None or trial.data.get("no_labels", False)
        if unlabelled and not _without_labels(data):
            raise UserError(
                "data.val_path: missing; the evaluations need labelled images (without labels: "
                "data.train_path=FOLDER data.no_labels=true)"
            )
        if trial.data.get("format", "image_folder") != "image_folder":
            raise UserError(f"data.format={trial.data.format}: must be image_folder")
        build_method(complete_pretrain_config(trial))
    except (UserError, OmegaConfBaseException) as error:
        raise UserError(f"methods.{label}: {error}") from error
    if isinstance(data, dict):
        cfg.data.update(data)
    content: Any = OmegaConf.to_container(cfg, resolve=True)
    return content, len(trial.devices) * trial.num_nodes


def _dataset(dataset: str, data: dict[str, Any]) -> str:
    """The data set that solo-learn is told: ``custom`` where the folders hold class folders.

    solo-learn's CIFAR-10, CIFAR-100 and STL-10 are torchvision's files; everything else is read as
    class folders.
    """
    if dataset not in TORCHVISION:
        return dataset
    folders = [data[key] for key in ("train_path", "val_path") if data[key] is not None]
    ours = [(Path(folder) / TORCHVISION[dataset]).is_dir() for folder in folders]
    return dataset if all(ours) else "custom"


def _untrained(label: str, config: dict[str, Any]) -> dict[str, Any]:
    """Of a method's config what decides the features of a reference."""
    kept = ["augmentations", "accelerator"]
    if label == "random":
        kept += ["backbone", "method"]
    data = {"format": "image_folder", "num_workers": 4, **config["data"]}
    return {"name": label, "reference": label, "data": data, "max_epochs": 0} | {
        key: config[key] for key in kept if key in config
    }


def _fingerprints(data: Any) -> dict[str, str]:
    """Of given folders, what their files are: relative names and sizes."""
    if not isinstance(data, dict):
        return {}
    found = {}
    for key in ("train_path", "val_path"):
        folder = data[key]
        if folder is None:
            continue
        digest = hashlib.sha256()
        for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
            digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode())
        found[key] = digest.hexdigest()[:16]
    return found


def _notes(methods: dict[str, str], processes: dict[str, int]) -> list[str]:
    """What more than one process makes of the host's own losses."""
    hit: dict[str, list[str]] = {}
    for label, method in methods.items():
        if processes[label] > 1 and method in SEVERAL_PROCESSES:
            hit.setdefault(method, []).append(label)
    return [f"{', '.join(hit[name])}: {SEVERAL_PROCESSES[name]}." for name in hit]


def _of_other_data(configs: dict[str, dict[str, Any]], own: dict[str, str], data: Any) -> list[str]:
    """Tells that augmentations chosen for other images are applied to replaced ones."""
    if not isinstance(data, dict):
        return []
    found: dict[str, list[str]] = {}
    for label, config in configs.items():
        if Path(own[label]).resolve() != Path(data["train_path"]):
            first = config["augmentations"][0]
            flip = first["horizontal_flip"]["prob"]
            what = [f"crop_size {first['crop_size']}", f"horizontal_flip {flip:g}"]
            what += [f"{key} {first[key]}" for key in ("mean", "std") if key in first]
            found.setdefault(f"{own[label]}: {', '.join(what)}", []).append(label)
    size = _size_of_one(data["train_path"])
    return [
        f"The data were replaced, and {', '.join(labels)} keep the augmentations that were chosen "
        f"for {what}{size}. Others: overrides=[augmentations=FILE, augmentations.0.crop_size=N]."
        for what, labels in found.items()
    ]


def _size_of_one(folder: str) -> str:
    # torchvision's files hold no images that could be found
    with suppress(UserError, OSError, SyntaxError, ValueError):
        path, _ = find_images(folder, "data.train_path", labels=False).samples[0]
        with Image.open(path) as image:
            return f" (an image of these data has {image.width} × {image.height} pixels)"
    return ""


@contextmanager
def _placeholder_data(data: Any) -> Iterator[dict[str, str]]:
    """Paths to check configs with: of data not made yet, folders with ten classes."""
    if not isinstance(data, str):
        yield data or {}
        return
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "val"):
            for label in range(10):
                place = Path(folder, split, str(label))
                place.mkdir(parents=True)
                (place / "0.png").touch()
        yield {"train_path": f"{folder}/train", "val_path": f"{folder}/val"}


def _run(
    label: str,
    setting: dict[str, Any],
    seed: int,
    config: dict[str, Any],
    data: Any,
    files: dict[str, str],
    evaluations: list[str],
    out: Path,
) -> Run:
    config = json.loads(json.dumps(config))
    config["seed"] = seed
    config.setdefault("checkpoint", {})
    given = dict(config["data"])
    # the place of data and results must not decide what they are
    paths = ("train_path", "val_path")
    config["data"].update(dict.fromkeys(paths, data) if isinstance(data, str) else files)
    config["checkpoint"].pop("dir", None)
    measured = {name: EVALUATIONS[name] for name in evaluations}
    decisive = json.dumps(
        {"config": config, "evaluations": measured, "solo-learn": RELEASE}, sort_keys=True
    )
    config["data"] = given
    digest = hashlib.sha256(decisive.encode()).hexdigest()[:12]
    folder = out / "runs" / label / f"seed-{seed}-{digest}"
    if isinstance(data, str):
        config["data"]["train_path"] = str(out / "datasets" / data / "train")
        config["data"]["val_path"] = str(out / "datasets" / data / "val")
    config["checkpoint"]["dir"] = str(folder / "training")
    return Run(label, setting, seed, config, digest, folder)
