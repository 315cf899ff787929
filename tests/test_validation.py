"""Checks against a model: one line, in pydantic's own words."""

from typing import Any, Literal

import pytest
from pydantic import Field, field_validator

from metamask_solo.errors import UserError
from metamask_solo.validation import Settings, allowed, fields, shown, unknown, validated


class Rates(Settings):
    lr: float = Field(0.1, ge=0)
    clip: float | None = Field(None, gt=0, le=1)

    @field_validator("lr")
    @classmethod
    def _lucky(cls, value: float) -> float:
        if value == 13:
            raise ValueError("brings {bad} luck")
        return value


class Study(Settings):
    name: str
    epochs: int = Field(1, ge=1)
    on: bool = True
    rates: Rates = Rates()
    crops: list[Rates] = []
    share: Literal["all"] | int = 1


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({}, "x.name: Field required"),
        ({"name": 3}, "x.name=3: Input should be a valid string"),
        ({"name": None}, "x.name=null: Input should be a valid string"),
        ({"name": "a", "epochs": True}, "x.epochs=true: Input should be a valid integer"),
        ({"name": "a", "epochs": "0"}, "x.epochs=0: Input should be greater than or equal to 1"),
        ({"name": "a", "on": 1}, "x.on=1: Input should be a valid boolean"),
        ({"name": "a", "rates": 3}, "x.rates=3: Input should be a valid dictionary"),
        ({"name": "a", "rates": {"lr": float("nan")}}, "x.rates.lr=nan: Input should be a finite"),
        ({"name": "a", "rates": {"lr": 13}}, "x.rates.lr=13: brings {bad} luck"),
        (
            {"name": "a", "rates": {"klip": 1}},
            "x.rates.klip: unknown setting; did you mean x.rates",
        ),
        ({"name": "a", "clip": 1}, "x.clip: unknown setting; did you mean x.rates.clip?"),
        ({"name": "a", "crops": [{}, {"lr": "b"}]}, "x.crops.1.lr=b: Input should be a valid numb"),
        ({"name": "a", "zoom": 1}, "x.zoom: unknown setting; allowed are name, epochs, on, "),
        (
            {"name": "a", "share": "some"},
            "x.share=some: Input should be 'all' or Input should be a valid integer",
        ),
    ],
)
def test_the_first_error_is_one_line(data: Any, line: str) -> None:
    with pytest.raises(UserError) as caught:
        validated(Study, data, "x.")
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


def test_what_is_right_is_taken_as_it_is_meant() -> None:
    data = {"name": "7", "epochs": "3", "on": None, "rates": {"lr": 2, "clip": "1e-3"}}
    study = validated(Study, data)
    assert (study.name, study.epochs, study.on) == ("7", 3, True)
    assert (study.rates.lr, study.rates.clip) == (2, 1e-3)


def test_help_says_what_a_field_takes() -> None:
    words = {key: allowed(field) for key, field in fields(Study)}
    assert words["epochs"] == "integer >= 1" and words["on"] == "true, false"
    assert words["rates.clip"] == "number > 0 and <= 1 or null"
    assert words["share"] == "all or integer" and words["crops.0.lr"] == "number >= 0"


def test_values_are_shown_as_in_a_file() -> None:
    values: list[Any] = [None, True, 1e-3, "a b", "", "a\nb", [None, "a"]]
    assert [shown(value) for value in values] == [
        *("null", "true", "0.001", "a b", "''", r"'a\nb'", "[None, 'a']")
    ]
    assert len(shown("a" * 1000)) < 310


def test_a_key_is_no_hint_for_itself() -> None:
    assert "did you mean" not in str(unknown("a.temperature", ["a.lamb"]))
