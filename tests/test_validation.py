"""Checks against a model: which error comes first, and its one line."""

import subprocess
import sys
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, field_validator

from metamask_solo.errors import UserError
from metamask_solo.validation import (
    Allowed,
    Left,
    Number,
    Settings,
    Text,
    allowed,
    fields,
    refusal,
    shown,
    unknown,
    validated,
)

Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Rates(Settings):
    lr: Number = Field(0.1, ge=0, description="rate")
    clip: Number | None = Field(None, gt=0, le=1)
    kind: Literal["sgd", "adam"] = "sgd"

    @field_validator("lr")
    @classmethod
    def _even(cls, value: float) -> float:
        if value == 13:
            raise refusal("brings {bad} luck")
        return value


class Method(Settings):
    config: Annotated[Text, Allowed("the path of a file")]
    seeds: list[Seed] = Field([], description="its own")


class Folders(Settings):
    train: Text


class Study(Settings):
    name: Text
    epochs: int = Field(1, ge=1)
    on: Left[bool] = True
    rates: Rates = Rates()
    methods: dict[str, Method] = {}
    crops: list[Rates] = []
    data: Literal["digits", "letters"] | Folders | None = None
    share: Literal[-1] | Annotated[Number, Field(gt=0, lt=1)] = -1
    parts: list[Literal["knn", "linear"]] | None = None
    whole: dict[Any, Any] = {}


ERRORS: list[tuple[Any, str]] = [
    (3, "x=3: must be a mapping of settings"),
    ({}, "x.name: missing; give it text"),
    ({"name": None}, "x.name: missing; give it text"),
    ({"name": "???"}, "x.name: missing; give it text"),
    ({"epochs": "???"}, "x.epochs: missing; give it an integer of at least 1"),
    ({"on": "???", "epochs": 0}, "x.on: missing; give it true or false"),
    ({"name": 3}, "x.name=3: must be text"),
    ({"name": "a\0b"}, r"x.name='a\x00b': must not hold a null character"),
    ({"nane": "a"}, "x.nane: unknown setting; did you mean name?"),
    ({"clip": 1}, "x.clip: unknown setting; did you mean rates.clip?"),
    ({"clap": 1}, "x.clap: unknown setting; allowed are name"),
    ({"zoom": 1}, "x.zoom: unknown setting; allowed are name, epochs, on, rates, methods, "),
    ({3: 1}, "x.3: unknown setting; allowed are name, "),
    ({"epochs": True}, "x.epochs=true: must be an integer of at least 1"),
    ({"epochs": 1.0}, "x.epochs=1.0: must be an integer of at least 1"),
    ({"epochs": "1"}, "x.epochs=1: must be an integer of at least 1"),
    ({"epochs": None}, "x.epochs=null: must be an integer of at least 1"),
    ({"on": "yes"}, "x.on=yes: must be true or false"),
    ({"on": 1}, "x.on=1: must be true or false"),
    ({"rates": 3}, "x.rates=3: must be a mapping of settings"),
    ({"rates": {"lr": -1}}, "x.rates.lr=-1: must be a number of at least 0"),
    ({"rates": {"lr": "fast"}}, "x.rates.lr=fast: must be a number of at least 0"),
    ({"rates": {"lr": float("nan")}}, "x.rates.lr=nan: must be a number of at least 0"),
    ({"rates": {"lr": False}}, "x.rates.lr=false: must be a number of at least 0"),
    ({"rates": {"lr": 10**400}}, "x.rates.lr=1000"),
    ({"rates": {"lr": 13}}, "x.rates.lr=13: brings {bad} luck"),
    ({"rates": {"clip": 2}}, "x.rates.clip=2: must be null or a number above 0 and at most 1"),
    ({"rates": {"kind": ["sgd"]}}, "x.rates.kind=['sgd']: must be one of sgd, adam"),
    ({"rates": {"klip": 1}}, "x.rates.klip: unknown setting; did you mean rates.clip?"),
    ({"methods": {"a": {}}}, "x.methods.a.config: missing; give it the path of a file"),
    ({"methods": {"a": "b.yaml"}}, "x.methods.a=b.yaml: must be a mapping of settings"),
    (
        {"methods": {"a": {"seeds": [1, 2**32], "config": "b"}}},
        "x.methods.a.seeds=[1, 4294967296]: must be a list of integers of at least 0 and",
    ),
    ({"crops": [{}, {"lr": "a\nb"}]}, r"x.crops.1.lr='a\nb': must be a number of at least 0"),
    ({"crops": [3]}, "x.crops.0=3: must be a mapping of settings"),
    ({"data": "mnist"}, "x.data=mnist: must be null or one of digits, letters or a mapping"),
    ({"data": {"train": 3}}, "x.data.train=3: must be text"),
    ({"data": {}}, "x.data.train: missing; give it text"),
    ({"share": 0}, "x.share=0: must be -1 or a number above 0 and below 1"),
    ({"parts": ["guess"]}, "x.parts=['guess']: must be null or a list of knn, linear"),
    # the file's order; what is missing comes after what is there
    ({"on": 3, "epochs": 0}, "x.on=3"),
    ({"epochs": 0, "on": 3}, "x.epochs=0"),
    ({"methods": {"a": {}}, "epochs": 0}, "x.methods.a.config"),
    ({"crops": [{"lr": 1, "x": 2}, 3], "x": 3}, "x.crops.0.x: unknown"),
]


@pytest.mark.parametrize(("data", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_the_first_error_is_one_line(data: Any, message: str) -> None:
    if isinstance(data, dict) and data and not {"name", "nane"} & data.keys():
        data = {**data, "name": "a"}
    with pytest.raises(UserError) as caught:
        validated(Study, data, "x.")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_what_is_right_is_kept_as_it_is() -> None:
    data = {
        "name": "a",
        "rates": {"lr": 2, "clip": "1e-3"},
        "methods": {"m": {"config": "m.yaml"}},
        "data": {"train": "here"},
        "on": None,
        "share": 0.5,
        "whole": {3: {"x": [None]}},
    }
    study = validated(Study, data)
    assert study.rates.lr == 2 and type(study.rates.lr) is int
    assert study.rates.clip == 1e-3  # YAML 1.1 takes it for a text
    assert study.methods["m"].seeds == [] and study.data == Folders(train="here")
    assert study.on is True and study.whole == data["whole"]


def test_the_words_of_a_field_are_those_of_its_errors() -> None:
    words = {key: allowed(field) for key, field in fields(Study, numbered="N")}
    assert words == {
        "name": "text",
        "epochs": "an integer of at least 1",
        "on": "true or false",
        "rates.lr": "a number of at least 0",
        "rates.clip": "null or a number above 0 and at most 1",
        "rates.kind": "one of sgd, adam",
        "methods": "a mapping of settings",
        "methods.NAME.config": "the path of a file",
        "methods.NAME.seeds": "a list of integers of at least 0 and below 2^32",
        "crops": "a list of a mapping of settings",
        "crops.N.lr": "a number of at least 0",
        "crops.N.clip": "null or a number above 0 and at most 1",
        "crops.N.kind": "one of sgd, adam",
        "data.train": "text",
        "share": "-1 or a number above 0 and below 1",
        "parts": "null or a list of knn, linear",
        "whole": "a mapping of settings",
    }


def test_values_are_shown_as_in_a_file() -> None:
    values: list[Any] = [None, True, 1e-3, "a b", "", "a\nb", [None, "a"]]
    assert [shown(value) for value in values] == [
        *("null", "true", "0.001", "a b", "''", r"'a\nb'", "[None, 'a']")
    ]


def test_an_unknown_key_without_any_known_one() -> None:
    assert str(unknown("a.b", [])) == "a.b: unknown setting; allowed are none"


def test_a_bare_import_does_not_import_pydantic() -> None:
    code = (
        "import sys, metamask_solo; from metamask_solo.__main__ import main; "
        "main(['--help']); sys.exit('pydantic' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
