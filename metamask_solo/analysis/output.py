"""The folder that an analysis writes: figures, analysis.json and report.html."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from metamask_solo.analysis.figures import FIGURES, draw_figures
from metamask_solo.analysis.records import Analysis, Data, Settings
from metamask_solo.analysis.report import report_html
from metamask_solo.analysis.study import Study
from metamask_solo.atomic_files import atomic_write
from metamask_solo.errors import UserError

MADE_BY = "metamask-solo analyze"
NUMBERS = "analysis.json"


def check_output(out: Path) -> None:
    """Raises UserError unless ``out`` is new, empty, or holds an earlier analysis."""
    nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"--out={out}: {nearest} is a file; name a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"--out={out}: cannot be written (no permission for {nearest})")
    if nearest != out:
        return
    if any(out.iterdir()) and not _is_ours(out):
        raise UserError(
            f"--out={out}: holds other files and no analysis of this command; name another folder"
        )


def _is_ours(out: Path) -> bool:
    try:
        found = json.loads((out / NUMBERS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("made_by") == MADE_BY


def write_output(out: Path, data: Data, settings: Settings, studies: Sequence[Study]) -> None:
    """Writes the files, each of them whole or not at all; an earlier analysis is replaced.

    Raises:
        UserError: ``out`` cannot be written to.
    """
    analysis = Analysis(MADE_BY, data, settings, [study.numbers for study in studies])
    figures = draw_figures(studies)
    contents = {
        NUMBERS: (json.dumps(asdict(analysis), indent=1, allow_nan=False) + "\n").encode(),
        **{f"{name}.png": content for name, content in figures.items()},
        "report.html": report_html(analysis, figures).encode(),
    }
    for name, content in contents.items():
        with atomic_write(out / name) as temporary:
            temporary.write_bytes(content)
    for name in FIGURES.keys() - figures.keys():  # left by an earlier analysis with a mask
        (out / f"{name}.png").unlink(missing_ok=True)
