"""The keys of a benchmark's YAML file, and what is allowed in them."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from annotated_types import Ge, Lt, MinLen
from omegaconf import ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from metamask_solo.data.digits import VARIANTS
from metamask_solo.errors import UserError
from metamask_solo.training.hydra_app import reason
from metamask_solo.validation import Allowed, Left, Settings, refusal, validated

Evaluation = Literal["knn", "linear", "rankme"]
# each with a number that changes when what it measures does: results of before are no result then
EVALUATIONS: dict[str, int] = {"knn": 1, "linear": 2, "rankme": 1}
# what can be measured where the images have no labels
LABEL_FREE = ("rankme",)
# what stands beside the methods without any training: an untrained backbone, and the pixels
Reference = Literal["random", "pixels"]
REFERENCES: tuple[str, ...] = get_args(Reference)
# two runs of one method with one seed: a mask that stays where it is cancels in both heads
NOISE_FLOOR = ("joint", "fixed_mask")
# the benchmark sets these itself
RESERVED = {
    "seed": "seeds",
    "max_epochs": "epochs",
    "data.train_path": "data",
    "data.val_path": "data",
    "checkpoint.dir": "out",
}


def _each_once(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        raise refusal("a seed occurs twice")
    return seeds


def _is_data(data: Any) -> Any:
    if not (data is None or isinstance(data, dict) or (isinstance(data, str) and data in VARIANTS)):
        allowed = f"{', '.join(VARIANTS)}, or a mapping with train_path and val_path"
        raise refusal(f"allowed are {allowed}")
    return data


def _label(label: Any) -> str:
    if not isinstance(label, str) or not re.fullmatch(r"[A-Za-z0-9][\w-]*", label):
        raise refusal("a name is made of letters, digits, '_' and '-'")
    return label


Label = Annotated[str, BeforeValidator(_label)]
Folder = Annotated[str, Allowed("the path of a folder")]
Seeds = Annotated[
    list[Annotated[int, Ge(0), Lt(2**32)]],
    MinLen(1),
    Allowed("a list of integers from 0 to below 2^32"),
    AfterValidator(_each_once),
]
Overrides = Annotated[list[str], Allowed("a list of texts such as optimizer.lr=0.1")]
Values = Annotated[list[bool | int | float | str | None], MinLen(1), Allowed("a list of values")]


def _dotted(search: Any, prefix: str = "") -> Any:
    """``search.optimizer.lr=[0.1]`` of a command line, as the file has it: one key with dots."""
    if not isinstance(search, dict):
        return search
    found: dict[str, Any] = {}
    for key, values in search.items():
        nested = isinstance(values, dict) and values
        found |= _dotted(values, f"{prefix}{key}.") if nested else {f"{prefix}{key}": values}
    return found


Search = Annotated[
    dict[str, Values],
    BeforeValidator(_dotted),
    Allowed("a mapping of keys to lists of values"),
]


def override_key(override: str) -> str:
    """The key that one of the ``overrides`` sets, adds or deletes."""
    return override.lstrip("+~").partition("=")[0]


class Method(Settings):
    """One method: a pretraining file, and what is changed in it."""

    config: Annotated[str, Allowed("the path of a YAML file")]
    overrides: Overrides = []
    search: Search = {}
    seeds: Left[Seeds] = None


class Folders(Settings):
    """Images of the user's own; ``val_path`` is None where they have no labels."""

    no_labels: bool = False
    train_path: Folder
    val_path: Left[Folder] = Field(None, validate_default=True)

    @field_validator("val_path")
    @classmethod
    def _with_labels(cls, path: str | None, info: ValidationInfo) -> str | None:
        without_labels = info.data.get("no_labels")
        if path is None and without_labels is False:
            raise refusal("must be the path of a folder")
        return None if without_labels else path

    def given(self) -> dict[str, str]:
        """The paths that there are."""
        paths = {"train_path": self.train_path, "val_path": self.val_path}
        return {key: path for key, path in paths.items() if path is not None}

    def of_config(self) -> dict[str, Any]:
        """What a run's config says of them."""
        no_labels = {"no_labels": True} if self.no_labels else {}
        return {"train_path": self.train_path, "val_path": self.val_path, **no_labels}


class Launcher(Settings):
    """One of Hydra's launchers, with its own settings beside its name."""

    model_config = ConfigDict(extra="allow")
    name: str


def _named(launcher: Any) -> Any:
    return {"name": launcher} if isinstance(launcher, str) else launcher


class BenchmarkFile(Settings):
    """All keys of the file."""

    name: Annotated[
        str,
        Field(pattern=r"^[\w.-]+$"),
        Allowed("a word of letters, digits, '_', '-' and '.'"),
    ]
    out: Left[Folder] = None
    data: Annotated[str | Folders | None, BeforeValidator(_is_data)] = None
    methods: Annotated[
        dict[Label, Annotated[Method, Allowed("a mapping with config")]],
        Allowed("a mapping of names to {config: FILE}"),
    ]
    only: Left[Annotated[list[str], Allowed("a list of methods, such as [simclr]")]] = None
    seeds: Seeds = [0, 1, 2]
    epochs: Left[Annotated[int, Ge(1)]] = None
    overrides: Overrides = []
    search: Search = {}
    evaluations: Left[Annotated[list[Evaluation], MinLen(1)]] = None
    references: list[Reference] = []
    launcher: Annotated[
        Launcher, BeforeValidator(_named), Allowed("a name, or a mapping with name and settings")
    ] = Launcher(name="basic")
    reference: Left[str] = None
    comparisons: Left[Annotated[list[list[str]], Allowed("a list of pairs of methods")]] = None
    noise_floor: Left[Annotated[list[str], Allowed("a list of two methods")]] = None
    rows: Left[Annotated[str, Allowed("the path of a CSV file")]] = None
    keep_checkpoints: bool = True
    _place: Path | None = PrivateAttr(None)
    _replaced: dict[str, list[str]] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _fits_together(self) -> "BenchmarkFile":
        for text in self._contradictions():
            raise refusal(text)
        return self

    def _contradictions(self) -> Iterator[str]:
        labels = ", ".join(self.methods)
        if not self.methods:
            yield "methods: missing; give a mapping of names to {config: FILE}"
        for name in self.untrained:
            if name in self.methods:
                yield f"methods.{name}: the name of a reference; call the method otherwise"
        if not {*(self.only or ())} <= self.methods.keys():
            yield f"only={self.only}: must be a list of {labels}"
        if self.noise_floor is not None and not self._are_two(self.noise_floor):
            yield f"noise_floor={self.noise_floor}: must be two of {labels}"
        if self.reference is not None and self.reference not in self.methods:
            yield f"reference={self.reference}: allowed are {labels}"
        found: list[set[str]] = []
        for pair in self.comparisons or ():
            if not self._are_two(pair):
                yield f"comparisons: {pair} must be two of {labels}"
            if {*pair} in found:
                yield f"comparisons: {pair} is there twice"
            found.append({*pair})
        owners: dict[str, BenchmarkFile | Method] = {"": self}
        owners |= {f"methods.{label}.": method for label, method in self.methods.items()}
        for prefix, owner in owners.items():
            names = [override_key(override) for override in owner.overrides]
            for key, given in (("overrides", names), ("search", [*owner.search])):
                for name, ours in RESERVED.items():
                    if name in given:
                        yield f"{prefix}{key}: {name} is set by the benchmark's own key {ours}"

    def _are_two(self, pair: list[str]) -> bool:
        return len(pair) == len({*pair}) == 2 and {*pair} <= self.methods.keys()

    @property
    def place(self) -> Path | None:
        """The YAML file itself, where the keys come from one."""
        return self._place

    @property
    def replaced(self) -> dict[str, list[str]]:
        """Lists of overrides that the command line replaced, by key: what was in the file only."""
        return self._replaced

    @property
    def without_labels(self) -> bool:
        return isinstance(self.data, Folders) and self.data.no_labels

    @property
    def measured(self) -> list[str]:
        """The evaluations in their usual order; where there are no labels, those that need none."""
        names = LABEL_FREE if self.without_labels else self.evaluations or ("knn", "linear")
        return [name for name in EVALUATIONS if name in names]

    @property
    def trained(self) -> list[str]:
        """The methods that are wanted, in the order of the file."""
        return [m for m in self.methods if self.only is None or m in self.only]

    @property
    def shown(self) -> list[str]:
        """All that a report has a line for: references, then methods."""
        return [*self.untrained, *self.trained]

    @property
    def untrained(self) -> list[str]:
        """The references that are wanted."""
        return [name for name in REFERENCES if name in self.references]

    @property
    def rows_file(self) -> Path | None:
        """Where finished runs are taken from, and added to."""
        return None if self.rows is None else Path(self.rows).resolve()

    @property
    def searched(self) -> bool:
        """Whether several settings of a method are tried."""
        return bool(self.search) or any(method.search for method in self.methods.values())

    def seeds_of(self, label: str) -> list[int]:
        """The seeds of a method or reference: of its own, those that are the file's too."""
        own = self.methods[label].seeds if label in self.methods else None
        return [seed for seed in self.seeds if own is None or seed in own]

    @property
    def floor(self) -> tuple[str, str] | None:
        """Two methods that are one: what their pairs of runs differ by is noise."""
        if self.noise_floor is not None:
            return self.noise_floor[0], self.noise_floor[1]
        return NOISE_FLOOR if {*NOISE_FLOOR} <= self.methods.keys() else None

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The comparisons: those that are given, or the reference with each other method.

        Two methods that are one are not compared, and a method with one of them only.
        """
        if self.comparisons is not None:
            return [(one, other) for one, other in self.comparisons]
        reference = self.reference or ("metamask" if "metamask" in self.methods else None)
        if reference is None:
            return []
        floor = self.floor or ()
        left_out = {reference, *(floor if reference in floor else floor[1:])}
        return [(reference, method) for method in self.methods if method not in left_out]


def read_file(file: str | Path, overrides: list[str]) -> BenchmarkFile:
    """Reads a benchmark's YAML file.

    Args:
        file: the YAML file.
        overrides: ``KEY=VALUE`` for dotted keys of it; ``KEY+=LIST`` adds to a list.

    Raises:
        UserError: the first thing in it that is wrong.
    """
    file = Path(file)
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    for override in overrides:
        if "=" not in override.lstrip("="):
            raise UserError(f"{override}: must be KEY=VALUE")
    try:
        loaded: Any = OmegaConf.load(file)
        keys = [override.partition("=")[0].rstrip("+") for override in overrides]
        before = {key: _list(loaded, key) for key in keys if key.split(".")[-1] == "overrides"}
        merged = loaded
        for override in overrides:
            merged = OmegaConf.merge(merged, _parsed(merged, override))
        if "reference" in keys and "comparisons" not in keys:  # the later choice of two
            merged = OmegaConf.merge(merged, {"comparisons": None})
        content: Any = OmegaConf.to_container(merged, resolve=True)
        replaced = {
            key: [str(text) for text in old if text not in _list(merged, key)]
            for key, old in before.items()
        }
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{file}: {reason(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: must be a mapping")
    found = validated(BenchmarkFile, content)
    found._place = file.resolve()
    found._replaced = {key: texts for key, texts in replaced.items() if texts}
    return found


def _list(content: Any, key: str) -> list[Any]:
    """A list as it is written; an empty one where there is none."""
    found = OmegaConf.select(content, key)
    return OmegaConf.to_container(found) if isinstance(found, ListConfig) else []  # type: ignore[return-value]


def _parsed(content: Any, override: str) -> Any:
    """A ``KEY=VALUE`` or ``KEY+=LIST`` as something to merge into the content so far."""
    key, _, value = override.partition("=")
    if not key.endswith("+"):
        return OmegaConf.from_dotlist([override])
    key = key[:-1]
    found = OmegaConf.from_dotlist([f"{key}={value}"])
    old = OmegaConf.select(content, key)
    if not isinstance(OmegaConf.select(found, key), ListConfig) or (
        old is not None and not isinstance(old, ListConfig)
    ):
        raise ValueError(f"{override}: += adds a list to a list, such as overrides+=[precision=32]")
    OmegaConf.update(found, key, [*_list(content, key), *_list(found, key)])
    return found
