"""The keys of a benchmark's YAML file."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

from metamask_solo.data.digits import VARIANTS
from metamask_solo.errors import UserError
from metamask_solo.training.endings import scripts_folder
from metamask_solo.training.hydra_app import reason
from metamask_solo.validation import Settings, validated

Evaluation = Literal["knn", "linear", "rankme"]
# each with a number that goes up when its results change: earlier runs are evaluated anew then
EVALUATIONS: dict[str, int] = {"knn": 1, "linear": 2, "rankme": 1}
LABEL_FREE = ("rankme",)  # what can be measured without labels
NAMES = {"knn": "kNN", "linear": "linear", "rankme": "RankMe"}
Untrained = Literal["random", "pixels"]
UNTRAINED_NAMES = {"random": "untrained backbone", "pixels": "pixels"}
# a mask that stays where it is cancels in both heads, so these two are one method
SAME_METHOD = ("joint", "fixed_mask")
# the benchmark sets these itself
RESERVED = {
    "seed": "seeds",
    "max_epochs": "epochs",
    "data.train_path": "data",
    "data.val_path": "data",
    "checkpoint.dir": "out",
}
QUICK_EPOCHS, QUICK_PIXELS = 10, 32  # with `quick=True`
PACKAGE = "metamask_solo.scripts."

PathText = Annotated[str, AfterValidator(os.path.expanduser)]
Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w-]*$")]
Seeds = Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1)]
Values = Annotated[list[bool | int | float | str | None], Field(min_length=1)]


def _dotted(search: Any, prefix: str = "") -> Any:
    """``search.optimizer.lr=[0.1]`` of a command line, as the file has it: one key with dots."""
    if not isinstance(search, dict):
        return search
    keys: dict[str, Any] = {}
    for key, values in search.items():
        nested = isinstance(values, dict) and values
        keys |= _dotted(values, f"{prefix}{key}.") if nested else {f"{prefix}{key}": values}
    return keys


Search = Annotated[dict[str, Values], BeforeValidator(_dotted)]


class Method(Settings):
    """One method: a pretraining file, and what is changed in it."""

    config: PathText
    overrides: list[str] = []
    search: Search = {}
    seeds: Seeds | None = None


class Folders(Settings):
    """Images of one's own; without labels, there is no ``val_path``."""

    train_path: PathText
    val_path: PathText | None = None
    no_labels: bool = False


class Launcher(Settings):
    """One of Hydra's launchers, with its own settings beside its name."""

    model_config = ConfigDict(extra="allow")
    name: str


def _named(launcher: Any) -> Any:
    return {"name": launcher} if isinstance(launcher, str) else launcher


class BenchmarkFile(Settings):
    """All keys of the file.

    A method's own overrides come after ``overrides``, and ``last_overrides`` after both. On a
    command line, ``overrides+=LIST`` adds to the last, and ``overrides=LIST`` stands for all that
    are not a method's own.
    """

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    out: PathText | None = None
    data: PathText | Folders | None = None
    methods: Annotated[dict[Label, Method], Field(min_length=1)]
    only: list[str] | None = None
    seeds: Seeds = [0, 1, 2]
    epochs: Annotated[int, Field(ge=1)] | None = None
    quick: bool = False
    overrides: list[str] = []
    last_overrides: list[str] = []
    search: Search = {}
    evaluations: Annotated[list[Evaluation], Field(min_length=1)] = ["knn", "linear"]
    untrained: list[Untrained] = []
    launcher: Annotated[Launcher, BeforeValidator(_named)] = Launcher(name="basic")
    baseline: str | None = None
    comparisons: list[list[str]] | None = None
    same_method: list[str] | None = None
    rows: PathText | None = None
    keep_checkpoints: bool = True

    @property
    def length(self) -> int | None:
        """Epochs of every run; None for those of each method's file."""
        return QUICK_EPOCHS if self.quick else self.epochs

    @property
    def without_labels(self) -> bool:
        """Whether the images have no labels."""
        return isinstance(self.data, Folders) and self.data.no_labels

    @property
    def measured(self) -> list[str]:
        """The evaluations in their usual order; without labels, those that need none."""
        names = LABEL_FREE if self.without_labels else self.evaluations
        return [name for name in EVALUATIONS if name in names]

    @property
    def trained(self) -> list[str]:
        """The methods that are wanted, in the order of the file."""
        return [name for name in self.methods if self.only is None or name in self.only]

    @property
    def shown(self) -> list[str]:
        """All that a report has a line for: what is untrained, then the methods."""
        return [*(name for name in UNTRAINED_NAMES if name in self.untrained), *self.trained]

    @property
    def rows_file(self) -> Path | None:
        """Where finished runs are taken from, and added to."""
        return None if self.rows is None else Path(self.rows).resolve()

    @property
    def searched(self) -> bool:
        """Whether several settings of a method are tried."""
        return bool(self.search) or any(method.search for method in self.methods.values())

    def seeds_of(self, name: str) -> list[int]:
        """The seeds of a method: of its own, those that are the file's too."""
        own = self.methods[name].seeds if name in self.methods else None
        return [seed for seed in self.seeds if own is None or seed in own]

    @property
    def same(self) -> tuple[str, ...]:
        """Two methods that are one, so that what they differ by is noise; or none."""
        names = SAME_METHOD if self.same_method is None else self.same_method
        return tuple(names) if {*names} <= {*self.trained} else ()

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The comparisons of wanted methods: those of the file, or each method with the baseline.

        Of two methods that are one, only the first or the baseline itself takes part.
        """
        if self.comparisons is not None:
            pairs = [(method, baseline) for method, baseline in self.comparisons]
        else:
            baseline = self.baseline or ("joint" if "joint" in self.methods else self.trained[0])
            left_out = {baseline, *(self.same if baseline in self.same else self.same[1:])}
            pairs = [(name, baseline) for name in self.methods if name not in left_out]
        return [pair for pair in pairs if {*pair} <= {*self.trained}]


def read_file(config: str | Path, overrides: list[str]) -> BenchmarkFile:
    """Reads a benchmark's YAML file.

    Args:
        config: see :func:`find_config`.
        overrides: ``KEY=VALUE`` for dotted keys of it; ``KEY+=LIST`` adds to a list.

    Raises:
        UserError: the first thing in it that is wrong.
    """
    path = find_config(config)
    for override in overrides:
        if "=" not in override.lstrip("="):
            raise UserError(f"{override}: must be KEY=VALUE")
    try:
        merged: Any = OmegaConf.load(path)
        for override in overrides:
            if override.startswith("overrides="):
                merged = OmegaConf.merge(merged, {"overrides": []})
            if override.startswith(("overrides=", "overrides+=")):
                override = f"last_{override}"
            merged = OmegaConf.merge(merged, _parsed(merged, override))
        if merged.get("only") is not None:  # a method that the command line adds is wanted
            loaded = OmegaConf.load(path)
            added = [name for name in merged.methods if name not in loaded.methods]
            merged.only = [*merged.only, *(name for name in added if name not in merged.only)]
        # of two ways to choose comparisons, that of the command line
        keys = [override.partition("=")[0] for override in overrides]
        if "baseline" in keys and "comparisons" not in keys:
            merged = OmegaConf.merge(merged, {"comparisons": None})
        content: Any = OmegaConf.to_container(merged, resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path}: {reason(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a mapping")
    benchmark = validated(BenchmarkFile, content)
    for message in _contradictions(benchmark):
        raise UserError(message)
    return benchmark


def find_config(config: str | Path) -> Path:
    """A benchmark's YAML file: a path, ``pkg://metamask_solo.scripts.…``, or a packaged name.

    Raises:
        UserError: there is no such file; the line names the packaged ones.
    """
    folder = scripts_folder() / "benchmark"
    for path in (Path(config).expanduser(), *packaged(str(config), folder)):
        if path.is_file():
            return path
    names = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    raise UserError(f"{config}: no such file; the package has {names}")


def packaged(config: str, folder: Path) -> Iterator[Path]:
    """Where a name or a ``pkg://`` address may be among the packaged files.

    Args:
        config: such as ``custom``, ``custom.yaml`` or ``pkg://metamask_solo.scripts.benchmark/custom``.
        folder: of the packaged files of this kind.
    """
    if config.startswith("pkg:"):
        parts = config.removeprefix("pkg:").strip("/").removesuffix(".yaml").replace("/", ".")
        folder, config = scripts_folder(), parts.removeprefix(PACKAGE).replace(".", "/")
    yield (folder / config).with_suffix(".yaml")


def _contradictions(benchmark: BenchmarkFile) -> Iterator[str]:
    """What is wrong between keys."""
    names = ", ".join(benchmark.methods)
    data = benchmark.data
    if isinstance(data, str) and data not in VARIANTS and not Path(data).is_dir():
        yield f"data={benchmark.data}: no such folder; allowed are {', '.join(VARIANTS)} as well"
    for name in get_args(Untrained):
        if name in benchmark.methods:
            yield f"methods.{name}: the name of what is untrained; call the method otherwise"
    for key, chosen in (("only", benchmark.only), ("baseline", benchmark.baseline)):
        chosen = [chosen] if isinstance(chosen, str) else chosen or []
        unknown = [name for name in chosen if name not in benchmark.methods]
        if unknown:
            yield f"{key}={unknown[0]}: allowed are {names}"
    pairs = [("comparisons", pair) for pair in benchmark.comparisons or ()]
    pairs += [("same_method", benchmark.same_method)] if benchmark.same_method else []
    for key, pair in pairs:
        if len(pair) != 2 or len({*pair}) != 2 or not {*pair} <= benchmark.methods.keys():
            yield f"{key}={pair}: must be two of {names}"
    if len({frozenset(pair) for pair in benchmark.comparisons or ()}) < len(
        benchmark.comparisons or ()
    ):
        yield f"comparisons={benchmark.comparisons}: a pair occurs twice"
    if len({*benchmark.seeds}) < len(benchmark.seeds):
        yield f"seeds={benchmark.seeds}: a seed occurs twice"
    if not benchmark.untrained and not any(map(benchmark.seeds_of, benchmark.trained)):
        yield f"seeds={benchmark.seeds}: no method has one of these among its own seeds"
    owners: dict[str, BenchmarkFile | Method] = {"": benchmark}
    owners |= {f"methods.{name}.": method for name, method in benchmark.methods.items()}
    for prefix, owner in owners.items():
        lists = [*owner.overrides, *(benchmark.last_overrides if not prefix else ())]
        keys = {override.lstrip("+~").partition("=")[0] for override in lists}
        for section, named in (("overrides", keys), ("search", {*owner.search})):
            for key in sorted(RESERVED.keys() & named):
                yield f"{prefix}{section}: {key} is set by the benchmark's own key {RESERVED[key]}"


def _parsed(content: Any, override: str) -> DictConfig:
    """A ``KEY=VALUE`` or ``KEY+=LIST`` as something to merge into the content so far."""
    key, _, value = override.partition("=")
    if not key.endswith("+"):
        return OmegaConf.from_dotlist([override])
    key = key[:-1]
    added = OmegaConf.from_dotlist([f"{key}={value}"])
    before = OmegaConf.select(content, key)
    if not isinstance(OmegaConf.select(added, key), ListConfig) or (
        before is not None and not isinstance(before, ListConfig)
    ):
        raise ValueError(f"{override}: += adds a list to a list, such as overrides+=[precision=32]")
    OmegaConf.update(added, key, [*(before or ()), *OmegaConf.select(added, key)])
    return added
