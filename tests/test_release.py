"""What a release is made of: versions that agree, and a wheel and an sdist that install."""

import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import wrapt

import metamask_solo

ROOT = Path(__file__).resolve().parent.parent
VERSION = metamask_solo.__version__
SOURCES = ("metamask_solo", "scripts", "pyproject.toml", "README.md", "LICENSE", "pl_bolts.py")


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with wheel and sdist, built as `make dist` does, from a copy of the sources."""
    work = tmp_path_factory.mktemp("release")
    leave_out = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in SOURCES:
        source, target = ROOT / name, work / "sources" / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=leave_out)
        else:
            shutil.copyfile(source, target)
    # an editable installation may have a link there
    shutil.rmtree(work / "sources" / "metamask_solo" / "scripts", ignore_errors=True)
    # `make dist` builds in a fresh environment, which needs the network
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(work / "dist")]
    done = subprocess.run([*command, str(work / "sources")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return work / "dist"


def test_the_wheel_installs_into_an_empty_environment(dist: Path, tmp_path: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    venv.create(tmp_path / "empty", symlinks=True)
    python = tmp_path / "empty" / "bin" / "python"
    (packages,) = (tmp_path / "empty").glob("lib/python*/site-packages")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index"]
    subprocess.run([*install, "--quiet", "--no-deps", str(wheel)], check=True)
    # the one dependency that the import needs
    shutil.copytree(Path(wrapt.__file__).parent, packages / "wrapt")

    code = "import metamask_solo as m; print(m.__version__, m.__file__)"
    done = subprocess.run(
        [str(python), "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    version, file = done.stdout.split()
    assert version == VERSION
    assert Path(file).parent == packages / "metamask_solo"
    assert (packages / "metamask_solo" / "py.typed").is_file()
    command = tmp_path / "empty" / "bin" / "metamask-solo"
    usage = subprocess.run([str(command), "--help"], capture_output=True, text=True, check=True)
    assert "pretrain" in usage.stdout


def test_wheel_and_sdist_hold_every_file(dist: Path) -> None:
    files = {
        path.relative_to(ROOT).as_posix()
        for folder in ("metamask_solo", "scripts")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yaml", ".jinja", ".typed") or path.name == "py.typed"
    }
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        packed = {n.replace("metamask_solo/scripts/", "scripts/") for n in archive.namelist()}
    assert {name for name in packed if name.startswith(("metamask_solo/", "scripts/"))} == files
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert files | {"pyproject.toml", "LICENSE", "README.md"} <= names


def test_every_file_names_the_same_version_and_date() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {VERSION}\n" in citation
    date = re.search(r"^date-released: (\S+)$", citation, re.MULTILINE)
    assert date is not None
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[(.+)\] - (\d.+)$", changelog, re.MULTILINE)[0] == (VERSION, date[1])
