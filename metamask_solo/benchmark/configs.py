"""The pretraining config of each method and setting of a benchmark, composed and checked."""

import itertools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from metamask_solo.benchmark.file import RESERVED, BenchmarkFile, Folders
from metamask_solo.errors import UserError
from metamask_solo.training.endings import scripts_folder
from metamask_solo.training.hydra_app import open_config, reason
from metamask_solo.training.overrides import compose_pretraining

# folder that torchvision's copy of a data set is in
TORCHVISION = {
    "cifar10": "cifar-10-batches-py",
    "cifar100": "cifar-100-python",
    "stl10": "stl10_binary",
}
# of every run
OURS = {
    "checkpoint.enabled": True,
    "auto_resume.enabled": True,
    "auto_resume.max_hours": 24 * 365 * 10,
    "wandb.enabled": False,
    "fold_at_end": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@dataclass(frozen=True)
class Variant:
    """A method in one setting.

    Attributes:
        setting: the searched keys and their values; empty where nothing is searched.
        config: the complete config of a run without its seed and folder.
        own_data: the folder of training images that the method's file names.
        processes: how many train together.
    """

    method: str
    setting: dict[str, Any]
    config: dict[str, Any]
    own_data: str
    processes: int


def compose_variants(file: Path, given: BenchmarkFile) -> list[Variant]:
    """Those that are wanted, and the first, whose backbone and images the references have.

    Each config is complete, and its model was built for a test.

    Args:
        file: the benchmark's YAML file.
        given: its keys.

    Raises:
        UserError: a config cannot be composed, or not be trained.
    """
    first = next(iter(given.methods))
    found = []
    with _placeholder_data(given.data) as paths:
        for label, method in given.methods.items():
            if label != first and label not in given.trained:
                continue
            search = {**given.search, **method.search}
            for values in itertools.product(*search.values()):
                setting = dict(zip(search, values, strict=True))
                overrides = [*given.overrides, *method.overrides]
                cfg = _compose(file, label, method.config, overrides, setting)
                own_data = str(cfg.data.get("train_path"))
                config, processes = _checked(label, cfg, given, paths)
                found.append(Variant(label, setting, config, own_data, processes))
    return found


def untrained_config(label: str, config: dict[str, Any]) -> dict[str, Any]:
    """Of a method's config what decides the features of a reference."""
    kept = ["augmentations", "accelerator"]
    if label == "random":
        kept += ["backbone", "method"]
    data = {"format": "image_folder", "num_workers": 4, **config["data"]}
    return {"name": label, "reference": label, "data": data, "max_epochs": 0} | {
        key: config[key] for key in kept if key in config
    }


def differ_in_still_mask(given: BenchmarkFile, one: str, other: str) -> bool:
    """Whether two methods are MetaMask with a mask that never moves, and differ in that alone.

    Args:
        given: the keys of a benchmark's file; of other ones, nobody can tell.
        one: the first method's name.
        other: the second's.
    """
    if given.place is None:
        return False
    found = []
    for label in (one, other):
        method = given.methods[label]
        overrides = [*given.overrides, *method.overrides]
        try:
            cfg = _compose(given.place, label, method.config, overrides, {})
        except UserError:  # rows need no configs
            return False
        moves = OmegaConf.select(cfg, "method_kwargs.meta.enabled", default=True)
        if OmegaConf.select(cfg, "method") != "metamask" or moves:
            return False
        OmegaConf.update(cfg, "name", None, force_add=True)
        OmegaConf.update(cfg, "method_kwargs.mask", None, force_add=True)
        found.append(OmegaConf.to_container(cfg))
    return bool(found[0] == found[1])


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
            cfg = open_config(compose_pretraining(path.stem, overrides))
    except UserError as error:
        raise UserError(f"methods.{label}: {error}") from error
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
    given: BenchmarkFile,
    paths: dict[str, Any],
) -> tuple[dict[str, Any], int]:
    """The complete config, and its number of processes."""
    import metamask_solo  # noqa: F401  registers the method
    from metamask_solo.hosts import build_method, complete_pretrain_config
    from metamask_solo.training.config_checks import check_pretrain_config

    for key, value in OURS.items():
        OmegaConf.update(cfg, key, value, force_add=True)
    if given.epochs is not None:
        OmegaConf.update(cfg, "max_epochs", given.epochs, force_add=True)
    cfg.seed = given.seeds[0]
    data = given.data
    trial = open_config(cfg)
    try:
        if isinstance(data, str) and trial.data.dataset != "custom":
            raise UserError(f"data.dataset={trial.data.dataset}: must be custom with data={data}")
        if isinstance(data, Folders):
            trial.data.dataset = cfg.data.dataset = _dataset(cfg.data.dataset, data)
        trial.data.update(paths)
        check_pretrain_config(trial)
        unlabelled = trial.data.get("val_path") is None or trial.data.get("no_labels", False)
        if unlabelled and not given.without_labels:
            raise UserError(
                "data.val_path: missing; the evaluations need labelled images (without labels: "
                "data.train_path=FOLDER data.no_labels=true)"
            )
        if trial.data.get("format", "image_folder") != "image_folder":
            raise UserError(f"data.format={trial.data.format}: must be image_folder")
        build_method(complete_pretrain_config(trial))
    except (UserError, OmegaConfBaseException) as error:
        raise UserError(f"methods.{label}: {error}") from error
    if isinstance(data, Folders):
        cfg.data.update(data.of_config())
    content: Any = OmegaConf.to_container(cfg, resolve=True)
    return content, len(trial.devices) * trial.num_nodes


def _dataset(dataset: str, data: Folders) -> str:
    """The data set that solo-learn is told: ``custom`` where the folders hold class folders.

    solo-learn's CIFAR-10, CIFAR-100 and STL-10 are torchvision's files; everything else is read as
    class folders.
    """
    if dataset not in TORCHVISION:
        return dataset
    ours = [(Path(folder) / TORCHVISION[dataset]).is_dir() for folder in data.given().values()]
    return dataset if all(ours) else "custom"


@contextmanager
def _placeholder_data(data: str | Folders | None) -> Iterator[dict[str, Any]]:
    """Paths to check configs with: of data not made yet, folders with ten classes."""
    if not isinstance(data, str):
        yield {} if data is None else data.of_config()
        return
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "val"):
            for label in range(10):
                place = Path(folder, split, str(label))
                place.mkdir(parents=True)
                (place / "0.png").touch()
        yield {"train_path": f"{folder}/train", "val_path": f"{folder}/val"}
