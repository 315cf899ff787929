"""The site builds without a warning, and every page of docs is in its menu."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from documented import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def test_every_page_is_built(site: Path) -> None:
    for page in (ROOT / "docs").glob("*.md"):
        built = site / "index.html" if page.stem == "index" else site / page.stem / "index.html"
        assert built.is_file(), page.name


def test_the_menu_holds_every_page() -> None:
    # mkdocs names a page that is in no menu, but does not warn of it
    nav = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader=yaml.BaseLoader)[
        "nav"
    ]
    listed = set()
    for section in nav:
        for value in section.values():
            listed |= {value} if isinstance(value, str) else {p for e in value for p in e.values()}
    pages = {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")}
    assert pages <= listed
