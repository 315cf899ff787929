"""The keys of a benchmark's YAML file."""

from collections.abc import Collection, Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from metamask_solo.data.digits import VARIANTS
from metamask_solo.errors import UserError
from metamask_solo.paths import user_path
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
# both losses without a mask that learns; a mask that stays cancels in both heads, so what these two
# differ by is noise
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
LAST = "last_overrides"  # those of the command line, which come after a method's own

Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w-]*$")]
Seeds = Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1)]
Values = Annotated[list[bool | int | float | str | None], Field(min_length=1)]
Pair = Annotated[list[str], Field(min_length=2, max_length=2)]


def _dotted(search: Any, prefix: str = "") -> Any:
    """``search.optimizer.lr=[0.1]`` of a command line, as the file has it: one key with dots."""
    if not isinstance(search, dict):
        return search
    keys: dict[str, Any] = {}
    for key, values in search.items():
        nested = isinstance(values, dict) and values
        keys |= _dotted(values, f"{prefix}{key}.") if nested else {f"{prefix}{key}": values}
    return keys


# not the function itself: some releases of pydantic would give it a second argument
Search = Annotated[dict[str, Values], BeforeValidator(lambda search: _dotted(search))]


class Method(Settings):
    """One method: a pretraining file, and what is changed in it."""

    config: str
    overrides: list[str] = []
    search: Search = {}
    seeds: Seeds | None = None


class Folders(Settings):
    """Images of one's own; without labels, there is no ``val_path``."""

    train_path: str
    val_path: str | None = None
    no_labels: bool = False


class Launcher(Settings):
    """One of Hydra's launchers, with its own settings beside its name."""

    model_config = ConfigDict(extra="allow")
    name: str


def key_of(override: str) -> str:
    """The key of a Hydra override."""
    return override.lstrip("+~").partition("=")[0]


def _named(launcher: Any) -> Any:
    return {"name": launcher} if isinstance(launcher, str) else launcher


class BenchmarkFile(Settings):
    """All keys of the file.

    A method's own ``overrides`` come after those of the file, and those of a command line after
    both: there, ``overrides+=LIST`` adds to them, and ``overrides=LIST`` also leaves out those of
    the file.
    """

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    out: str | None = None
    data: str | Folders | None = None
    methods: Annotated[dict[Label, Method], Field(min_length=1)]
    only: list[str] | None = None
    seeds: Seeds = [0, 1, 2]
    epochs: Annotated[int, Field(ge=1)] | None = None
    quick: bool = False
    overrides: list[str] = []
    search: Search = {}
    evaluations: Annotated[list[Evaluation], Field(min_length=1)] = ["knn", "linear"]
    untrained: list[Untrained] = []
    launcher: Annotated[Launcher, BeforeValidator(_named)] = Launcher(name="basic")
    last_overrides: list[str] = []  # of a command line; they are among those of each method
    baseline: str | None = None
    comparisons: list[Pair] | None = None
    rows: str | None = None
    keep_checkpoints: bool = True

    @model_validator(mode="after")
    def _keys_agree(self) -> "BenchmarkFile":
        for contradiction in self._contradictions():
            raise ValueError(contradiction)
        return self

    def _contradictions(self) -> Iterator[str]:
        data, names = self.data, self.methods.keys()
        if isinstance(data, str) and data not in VARIANTS and not user_path(data).is_dir():
            yield f"data={data}: no such folder; allowed are {', '.join(VARIANTS)} as well"
        for name in names & UNTRAINED_NAMES.keys():
            yield f"methods.{name}: this name is reserved for an untrained row; choose another"
        chosen = {"only": self.only or [], "comparisons": chain(*self.comparisons or [])}
        chosen["baseline"] = [self.baseline] if self.baseline else []
        for key, name in ((key, name) for key, listed in chosen.items() for name in listed):
            if name not in names:
                yield f"{key}={name}: allowed are {', '.join(names)}"
        if len({*self.seeds}) < len(self.seeds):
            yield f"seeds={self.seeds}: a seed occurs twice"
        if not any(map(self.seeds_of, self.shown)):
            yield f"seeds={self.seeds}: no method has any of these seeds"
        for name, method in self.methods.items():
            keys = {*map(key_of, method.overrides), *method.search, *self.search}
            for key in keys & RESERVED.keys():
                yield f"methods.{name}: {key} is set by the benchmark's own key {RESERVED[key]}"

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
        return None if self.rows is None else user_path(self.rows).resolve()

    @property
    def searched(self) -> bool:
        """Whether several settings of a method are tried."""
        return bool(self.search) or any(method.search for method in self.methods.values())

    def seeds_of(self, name: str) -> list[int]:
        """The seeds of a method, those of its own that are the file's too; of pixels, one."""
        if name == "pixels":
            return self.seeds[:1]
        chosen = self.methods[name].seeds if name in self.methods else None
        return [seed for seed in self.seeds if chosen is None or seed in chosen]

    def pairs(self, methods: Collection[str], same: Collection[str] = ()) -> list[tuple[str, str]]:
        """The comparisons of some methods: those of the file, or else each one with a baseline.

        The baseline is that of the file, or else joint, or the first: of these methods, so that
        something is compared whatever is left out or failed. Of two methods that are one, only the
        first or the baseline itself takes part.

        Args:
            methods: those with runs.
            same: methods that are one, see :func:`.results.same_methods`.
        """
        chosen = [(method, baseline) for method, baseline in self.comparisons or []]
        chosen = [pair for pair in chosen if {*pair} <= {*methods}]
        names = [name for name in self.trained if name in methods]
        if chosen or not names:
            return chosen
        baseline = next(name for name in (self.baseline, "joint", *names) if name in names)
        left_out = {baseline, *(same if baseline in same else [*same][1:])}
        return [(name, baseline) for name in names if name not in left_out]


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
    keys = [override.partition("=")[0] for override in overrides]
    try:
        merged: Any = OmegaConf.load(path)
        in_file = {*merged.get("methods", {})}
        for override in overrides:
            merged = _changed(merged, override)
        content: Any = OmegaConf.to_container(merged, resolve=True)
        last = content.get(LAST, [])
        shared = [] if "overrides" in keys else content.get("overrides") or []
        methods = content["methods"] if isinstance(content["methods"], dict) else {}
        for method in methods.values():
            method["overrides"] = [*shared, *(method.get("overrides") or []), *last]
        if content.get("quick") and "epochs" not in keys:
            content["epochs"] = QUICK_EPOCHS
        if isinstance(content.get("only"), list):  # a method that the command line adds is wanted
            content["only"] += [name for name in methods if name not in in_file]
        if "baseline" in keys and "comparisons" not in keys:  # the command line wins
            content.pop("comparisons", None)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no mapping with the keys of a benchmark ({error})") from error
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {reason(error)}") from error
    return validated(BenchmarkFile, content)


def _changed(content: Any, override: str) -> Any:
    """The content with a ``KEY=VALUE`` or ``KEY+=LIST`` of the command line."""
    key, _, value = override.partition("=")
    key = {"overrides": LAST, "overrides+": f"{LAST}+"}.get(key, key)
    added = OmegaConf.from_dotlist([f"{key.removesuffix('+')}={value}"])
    if key.endswith("+"):
        lists = [OmegaConf.select(part, key[:-1]) for part in (content, added)]
        if not OmegaConf.is_list(lists[1]):
            raise UserError(f"{override}: += adds a list to a list, as in only+=[metamask]")
        OmegaConf.update(added, key[:-1], [*(lists[0] or ()), *lists[1]])
    return OmegaConf.merge(content, added)


def find_config(config: str | Path, kind: str = "benchmark", *beside: Path) -> Path:
    """A YAML file: a path, ``pkg://metamask_solo.scripts.…``, or the name of a packaged one.

    Args:
        config: such as ``custom``, ``custom.yaml`` or ``pkg://metamask_solo.scripts.benchmark/custom``.
        kind: the folder of the packaged files, such as ``pretrain``.
        beside: folders from which a path may start, too.

    Raises:
        UserError: there is no such file; the line names the packaged ones.
    """
    folder, name = scripts_folder() / kind, str(config)
    if name.startswith("pkg:"):
        parts = name.removeprefix("pkg:").strip("/").removesuffix(".yaml").replace("/", ".")
        name = str(scripts_folder() / parts.removeprefix(PACKAGE).replace(".", "/"))
    packaged = (folder / name).with_suffix(".yaml")
    for path in (*(one / config for one in beside), user_path(config), packaged):
        if path.is_file():
            return path
    names = ", ".join(sorted(path.stem for path in folder.glob("[!_]*")))
    raise UserError(f"{config}: no such file; the package has {names}")
