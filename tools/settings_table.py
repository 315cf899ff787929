"""Writes the table of the method's settings into docs/settings.md: `make docs` calls it.

What stands between the two marks is replaced; a test keeps it equal to method/settings.py.
"""

from __future__ import annotations

from pathlib import Path

from marked import with_table

from metamask_solo.method.settings import SETTINGS
from metamask_solo.validation import allowed, shown

PAGE = Path(__file__).resolve().parent.parent / "docs" / "settings.md"


def table() -> str:
    """A Markdown table with a row for each setting, in the order of the file."""
    lines = ["| setting | default | allowed | meaning |", "| --- | --- | --- | --- |"]
    for key, field in SETTINGS.items():
        row = (f"`{key}`", f"`{shown(field.default)}`", allowed(field), str(field.description))
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(
        with_table(PAGE.read_text(encoding="utf-8"), "settings", table()), encoding="utf-8"
    )
