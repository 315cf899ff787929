"""Checks of what a user gives against a pydantic model: one line for the first error.

The texts come from the model itself: error, ``--help`` and documentation say the same of a setting.
Importing this module imports pydantic, so modules that a bare import reads must not.
"""

import difflib
import math
import re
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from metamask_solo.errors import UserError

T = TypeVar("T")
M = TypeVar("M", bound="Settings")
# stands for a value in a file that is yet to be given (OmegaConf)
MISSING = "???"
# keys that a line can list
MOST_LISTED = 30
BOUNDS = {Ge: "of at least", Gt: "above", Le: "at most", Lt: "below"}
LONGEST = 300


class Settings(BaseModel):
    """Base of a model: strict types, and no key but the model's own."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, data: Any) -> Any:
        """A section that is not there is an empty one; null may stand for a default."""
        if not isinstance(data, Mapping):
            return data
        sections: dict[str, Any] = {
            name: {}
            for name, field in cls.model_fields.items()
            if field.is_required() and field.annotation is section_of(field)
        }
        by_default = {*sections, *(n for n, f in cls.model_fields.items() if NULL in f.metadata)}
        given = {k: v for k, v in data.items() if v is not None or k not in by_default}
        # what no type accepts stands for what is yet to be given
        return sections | {k: object() if _is_missing(v) else v for k, v in given.items()}

    def plain(self) -> dict[str, Any]:
        """All settings as a nested mapping, the sections first."""
        dumped = self.model_dump()
        return dict(sorted(dumped.items(), key=lambda item: not isinstance(item[1], dict)))


@dataclass(frozen=True)
class Allowed:
    """In an ``Annotated``: words for what is allowed, where the annotation has none of its own."""

    words: str


def about(meaning: str, default: Any = ..., **bounds: Any) -> Any:
    """A field of a model; without a default it must be given.

    Args:
        meaning: what the help and the documentation say of it.
        default: its value where nothing is given.
        bounds: see ``pydantic.Field``.
    """
    return Field(default, description=meaning, **bounds)


def refusal(words: str) -> PydanticCustomError:
    """What a validator of a model raises to say in its own words what a value must be."""
    # in the context, since braces in the template are pydantic's
    return PydanticCustomError("refusal", "{words}", {"words": words})


def _is_missing(value: Any) -> bool:
    return isinstance(value, str) and value == MISSING


def _without_null(value: str) -> str:
    if "\0" in value:
        raise refusal("must not hold a null character")
    return value


def _read_number(value: Any) -> Any:
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)  # YAML 1.1 takes 1e-3, without a point, for a text
    if isinstance(value, int | float) and not abs(value) <= sys.float_info.max:
        raise ValueError("not finite")
    return value


# an integer stays one; strict types keep true and false out
Number = Annotated[int | float, BeforeValidator(_read_number)]
Text = Annotated[str, AfterValidator(_without_null)]
# null stands for the default: the key may as well be left out; with Left, which is null itself
NULL = "null is the default"
Defaulted = Annotated[T, NULL]
Left = Annotated[T | None, NULL]


def validated(model: type[M], data: Any, prefix: str = "") -> M:
    """The checked settings.

    Args:
        model: what is allowed.
        data: what is given: a mapping of plain Python values.
        prefix: what stands before a key in messages, such as ``method_kwargs.``.

    Raises:
        UserError: the first thing in the order of ``data`` that is not allowed, with its dotted
            key; of keys that are missing, after all that is there.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False)
        places = [_Place(model, data, each["loc"], prefix) for each in errors]
        first = min(range(len(errors)), key=lambda i: places[i].order)
        raise places[first].error(errors[first]["type"], errors[first]["msg"]) from None


def allowed(annotation: Any, constraints: Iterable[Any] = ()) -> str:
    """What a field takes, in words, such as ``an integer of at least 1``.

    Args:
        annotation: a field of a model, or a type.
        constraints: bounds and :class:`Allowed` of that type.
    """
    given = list(constraints)
    if isinstance(annotation, FieldInfo):
        return allowed(annotation.annotation, annotation.metadata)
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        parts = [p for m in more for p in (m.metadata if isinstance(m, FieldInfo) else [m])]
        return allowed(inner, [*parts, *given])
    told = [each.words for each in given if isinstance(each, Allowed)]
    if _members(annotation) == (annotation,):
        return told[-1] if told else _words(annotation, given)
    members = [member for member in _members(annotation) if member is not type(None)]
    kinds = [float] if {*members} == {int, float} else members
    bounds = given if len(kinds) == 1 else []
    words = told[-1] if told else " or ".join(allowed(kind, bounds) for kind in kinds)
    optional = len(members) < len(_members(annotation)) and NULL not in given
    return f"null or {words}" if optional else words


def fields(
    model: type[BaseModel], prefix: str = "", numbered: str = "0"
) -> Iterator[tuple[str, FieldInfo]]:
    """Dotted key and field of each setting; of a section, the settings in it.

    Args:
        model: the model.
        prefix: what stands before each key.
        numbered: what stands for the number of an item of a list of sections.
    """
    for name, field in model.model_fields.items():
        section = section_of(field)
        holder = holder_of(field)
        below = {None: "", list: f"{numbered}.", dict: "NAME."}[holder]
        if section is None or holder:
            yield f"{prefix}{name}", field
        if section is not None:
            yield from fields(section, f"{prefix}{name}.{below}", numbered)


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The model of a field that is a section, or a list or mapping of them; else None."""
    return next(_models(field), None)


def unknown(
    key: str, known: Iterable[str], prefix: str = "", elsewhere: Iterable[str] = ()
) -> UserError:
    """The error of a key that nothing reads.

    Args:
        key: the key, dotted, without the prefix.
        known: the keys that may stand in its place, as ``key`` is.
        prefix: what stands before the key in the message.
        elsewhere: dotted keys of other places.
    """
    names = {_leaf(name): name for name in known}
    near = [names[n] for n in difflib.get_close_matches(_leaf(key), names, n=1, cutoff=0.7)]
    if not near:  # perhaps it stands in the wrong section
        others = {_leaf(name): name for name in reversed(list(elsewhere)) if name != key}
        near = [others[n] for n in difflib.get_close_matches(_leaf(key), others, n=1, cutoff=0.8)]
    listed = f"allowed are {', '.join(names) or 'none'}"
    hint = listed if len(names) <= MOST_LISTED else "nothing reads it"
    hint = f"did you mean {near[0]}?" if near else hint
    return UserError(f"{prefix}{key}: unknown setting; {hint}")


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def shown(value: Any) -> str:
    """A value as a YAML file has it, on one line; a long one is cut."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    plain = isinstance(value, str) and value.strip() == value != "" and value.isprintable()
    text = value if plain else repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


class _Place:
    """Where in the data an error of pydantic is: its dotted key, value, and field."""

    def __init__(self, model: type[BaseModel], data: Any, loc: Iterable[Any], prefix: str):
        self.root, self.prefix = model, prefix
        self.key, self.value, self.given = "", data, True
        self.field: Any = model
        self.beside: list[str] = []  # dotted keys that may stand where this one does
        order: list[float] = []
        for part in loc:
            holder, models = holder_of(self.field), list(_models(self.field))
            if holder is list and not models:
                break  # a list of values is told as a whole
            beside = {} if holder else {k: f for m in models for k, f in m.model_fields.items()}
            inside = self.value
            there = isinstance(inside, Mapping) and part in inside
            if holder is not list and not there and part not in beside:
                continue  # the name of a type within a union
            self.beside = [f"{self.key}.{name}".lstrip(".") for name in beside]
            self.key = f"{self.key}.{part}".lstrip(".")
            self.field = get_args(_unwrapped(self.field))[-1] if holder else beside.get(part)
            self.given = there or holder is list
            self.value = inside[part] if self.given else None
            order.append(part if holder is list else [*(inside or ()), part].index(part))
        # what is missing comes last; of a type that does not fit and what is wrong within one
        # that does, the latter first
        self.order = [*order, math.inf]

    def error(self, kind: str, message: str) -> UserError:
        key = f"{self.prefix}{self.key}".rstrip(".")
        if kind in ("extra_forbidden", "invalid_key"):
            elsewhere = (key for key, _ in fields(self.root))
            return unknown(self.key, self.beside, self.prefix, elsewhere)
        words = allowed(self.field)
        required = isinstance(self.field, FieldInfo) and self.field.is_required()
        if not self.given or _is_missing(self.value) or (required and self.value is None):
            return UserError(f"{key}: missing; give it {words}")
        says = message if kind == "refusal" else f"must be {words}"
        return UserError(f"{key}={shown(self.value)}: {says}" if key else says)


def _unwrapped(annotation: Any) -> Any:
    """The one type of a field, without what may stand around it."""
    if isinstance(annotation, FieldInfo):
        annotation = annotation.annotation
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    members = [m for m in _members(annotation) if m is not type(None)]
    holders = [m for m in members if get_origin(m) in (list, dict)]
    return holders[0] if holders else members[0]


def holder_of(annotation: Any) -> Any:
    """``list`` or ``dict`` where a field holds these, else None."""
    origin = get_origin(_unwrapped(annotation))
    return origin if origin in (list, dict) else None


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models within a type, such as that of the items of a list."""
    if isinstance(annotation, FieldInfo):
        annotation = annotation.annotation
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def _members(annotation: Any) -> tuple[Any, ...]:
    is_union = get_origin(annotation) in (Union, types.UnionType)
    return get_args(annotation) if is_union else (annotation,)


def _words(kind: Any, constraints: list[Any]) -> str:
    """Words for a type that is no union."""
    arguments = get_args(kind)
    if get_origin(kind) is Literal:
        return f"{'one of ' * (len(arguments) > 1)}{', '.join(map(shown, arguments))}"
    if get_origin(kind) is list:
        plural = re.sub(r"^an? (integer|number)|^(text)", r"\1\2s", allowed(*arguments))
        return f"a list of {plural.removeprefix('one of ')}"
    named = {bool: "true or false", str: "text", int: "an integer", float: "a number"}
    return named.get(kind, "a mapping of settings") + _bounds(constraints)


def _bounds(constraints: Iterable[Any]) -> str:
    bounds = [
        (BOUNDS[type(c)], getattr(c, type(c).__name__.lower()))
        for c in constraints
        if type(c) in BOUNDS
    ]
    return " " + " and ".join(f"{word} {_bound(value)}" for word, value in bounds) if bounds else ""


def _bound(value: Any) -> str:
    power = isinstance(value, int) and value > 10**6 and value == 2 ** (value.bit_length() - 1)
    return f"2^{value.bit_length() - 1}" if power else f"{value:g}"
