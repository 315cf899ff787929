"""Checks of what a user gives against a pydantic model: one line, in pydantic's own words.

Importing this module imports pydantic, so modules that a bare import reads must not.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from metamask_solo.errors import UserError

M = TypeVar("M", bound="Settings")
BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
LONGEST = 300  # characters of a value that a message shows


class Settings(BaseModel):
    """Base of a model: strict types, finite numbers, and no key but the model's own.

    A text that is a number is taken where a number is meant: environment variables are texts, and
    YAML 1.1 reads 1e-3 as one. Null stands for the default where it is no value of its own.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        fields = cls.model_fields
        default = {n for n, f in fields.items() if not f.is_required() and not _takes_null(f)}
        return {n: v for n, v in data.items() if v is not None or n not in default}

    @field_validator("*", mode="before")
    @classmethod
    def _number_of_text(cls, value: Any, info: Any) -> Any:
        kinds = set(_members(cls.model_fields[info.field_name].annotation))
        if isinstance(value, str) and kinds & {int, float} and str not in kinds:
            for kind in (int, float):
                with suppress(ValueError):
                    return kind(value)
        return value


def validated(model: type[M], data: Any, prefix: str = "") -> M:
    """The checked settings.

    Args:
        model: what is allowed.
        data: what is given: a mapping of plain Python values.
        prefix: what stands before a key in messages, such as ``method_kwargs.``.

    Raises:
        UserError: ``key=value: what is wrong with it`` of the first error.
    """
    try:
        return model.model_validate(data)
    except ValidationError as caught:
        errors = caught.errors(include_url=False)
    located = [(*_locate(data, error["loc"], error["type"]), error) for error in errors]
    key, value, first = located[0]
    if first["type"] in ("extra_forbidden", "invalid_key"):
        raise unknown(key, (name for name, _ in fields(model)), prefix)
    # of a union, each of its types has a say
    says = dict.fromkeys(_says(error) for name, _, error in located if name == key)
    missing = first["type"] == "missing" or isinstance(value, Mapping)
    said = "" if missing else f"={shown(value)}"
    raise UserError(f"{prefix}{key}{said}: {' or '.join(says)}".lstrip(":= "))


def _says(error: Mapping[str, Any]) -> str:
    return str(error["msg"]).removeprefix("Value error, ")


def _locate(data: Any, loc: Iterable[Any], kind: str) -> tuple[str, Any]:
    """Dotted key and value of an error; names of the types of a union are no keys."""
    parts = []
    for part in loc:
        inside = isinstance(data, Mapping) and part in data
        if inside or (isinstance(data, list) and isinstance(part, int)):
            data = data[part]
        elif kind != "missing":
            continue
        parts.append(str(part))
    return ".".join(parts), data


def unknown(key: str, known: Iterable[str], prefix: str = "") -> UserError:
    """The error of a key that nothing reads.

    Args:
        key: the key, dotted, without the prefix.
        known: dotted keys; one that is spelled alike beside it, or else elsewhere, is suggested.
        prefix: what stands before the key in the message.
    """
    section, _, name = key.rpartition(".")
    keys = {k.rsplit(".", n)[0]: None for k in known for n in range(k.count(".") + 1)}  # sections
    beside = {k.rpartition(".")[2]: k for k in keys if k.rpartition(".")[0] == section}
    elsewhere = {k.rpartition(".")[2]: k for k in reversed(keys) if k != key}
    for names in (beside, elsewhere):
        for match in difflib.get_close_matches(name, names, n=1, cutoff=0.75):
            return UserError(
                f"{prefix}{key}: unknown setting; did you mean {prefix}{names[match]}?"
            )
    listed = f"; allowed are {', '.join(beside)}" if 0 < len(beside) <= 30 else ""
    return UserError(f"{prefix}{key}: unknown setting{listed}")


def shown(value: Any) -> str:
    """A value as a YAML file has it, on one line; a long one is cut."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    plain = isinstance(value, str) and value.strip() == value != "" and value.isprintable()
    text = value if plain else repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Dotted key and field of each setting; of a section, or a list of sections, those in it."""
    for name, field in model.model_fields.items():
        section, number = _section(field.annotation)
        if section is None or number:
            yield f"{prefix}{name}", field
        if section is not None:
            yield from fields(section, f"{prefix}{name}.{number}")


def allowed(field: FieldInfo) -> str:
    """What a field takes, in short, such as ``integer >= 1``."""
    kind: Any = Annotated[field.annotation, field]
    return _words(TypeAdapter(kind).json_schema())


def _words(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(_words, schema["anyOf"])))
    if "enum" in schema or "const" in schema:
        return ", ".join(map(shown, schema.get("enum", [schema.get("const")])))
    bounds = [f"{sign} {schema[name]:g}" for name, sign in BOUNDS.items() if name in schema]
    kind = {"string": "text", "object": "mapping", "boolean": "true, false"}.get(
        schema.get("type", "anything"), schema.get("type", "anything")
    )
    if kind == "array":
        kind = f"list of {_words(schema['items'])}" if "type" in schema["items"] else "list"
    return " ".join([kind, " and ".join(bounds)]).strip()


def _members(annotation: Any) -> Iterator[Any]:
    """The types of a union, without what ``Annotated`` adds to each."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


def _takes_null(field: FieldInfo) -> bool:
    return not {NoneType, Any}.isdisjoint(_members(field.annotation))


def _section(annotation: Any, number: str = "") -> tuple[type[BaseModel] | None, str]:
    """The model within a type, and ``0.`` where it is that of the items of a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, number
    inside = number if get_origin(annotation) in (Annotated, Union, UnionType) else "0."
    sections = (_section(part, inside) for part in get_args(annotation))
    return next((one for one in sections if one[0]), (None, ""))
