"""The table of the settings in the documentation follows from the settings themselves."""

import pytest
from marked import with_table
from settings_table import PAGE, table

from metamask_solo.method.settings import SETTINGS


def test_the_table_is_that_of_the_settings() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_table(page, "settings", table()), (
        "run `make docs`, which writes the table anew"
    )


def test_every_setting_says_what_it_does() -> None:
    assert [key for key, setting in SETTINGS.items() if not setting.description] == []


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="must hold"):
        with_table("# Settings\n<!-- settings: begin -->\n", "settings", table())
