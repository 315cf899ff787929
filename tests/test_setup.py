"""The set-up command: what it installs, what it keeps, and when it has nothing to do."""

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import setup_environment
from setup_environment import SetupError, fingerprint, pip_source, set_up

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
NEEDS = {"1.0.2": "pytorch-lightning (==1.4.7)", "1.0.6": "lightning==2.1.2"}


class Environment:
    """A virtual environment whose pip only writes down what it was asked for."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=True)
        self.folder = folder
        self.packages = next(folder.glob("lib/python*/site-packages"))
        self.calls: list[tuple[str, ...]] = []
        self.fails_at = ""

    def pip_install(self, python: Path, *arguments: str, env: dict[str, str] | None = None) -> None:
        assert python == self.folder / "bin" / "python"
        if self.fails_at and self.fails_at in arguments:
            raise KeyboardInterrupt
        self.calls.append(arguments)
        if "solo-learn==1.0.2" in arguments:
            self.put_host("1.0.2")
        elif "--force-reinstall" in arguments:
            self.put_host("1.0.6")

    def put_host(self, version: str) -> None:
        self.remove_host()
        host = self.packages / f"solo_learn-{version}.dist-info"
        host.mkdir()
        lines = ["Metadata-Version: 2.1", "Name: solo-learn", f"Version: {version}"]
        (host / "METADATA").write_text("\n".join([*lines, f"Requires-Dist: {NEEDS[version]}", ""]))
        (host / "RECORD").write_text(f"solo/__init__.py,{version},\n")

    def remove_host(self) -> None:
        for host in self.packages.glob("solo_learn-*"):
            for file in host.iterdir():
                file.unlink()
            host.rmdir()

    def hosts(self) -> list[str]:
        return [path.name for path in self.packages.glob("solo_learn-*")]

    def set_up(self, wanted_host: str = "") -> list[tuple[str, ...]]:
        """Sets up, and returns what pip was asked for."""
        self.calls = []
        set_up(self.folder, wanted_host)
        return self.calls


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Environment:
    fake = Environment(tmp_path / "environment")
    monkeypatch.setattr(setup_environment, "make_environment", lambda folder: None)
    monkeypatch.setattr(setup_environment, "check_torch", lambda python: None)
    monkeypatch.setattr(setup_environment, "pip_install", fake.pip_install)
    return fake


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A solo-learn source folder, with the data and leftovers of a working clone in it."""
    folder = tmp_path / "solo-learn"
    for name in ("setup.py", "solo/__init__.py", "solo/methods/base.py", "datasets/1.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_where_there_is_no_host_the_release_is_installed_without_its_pins(environment):
    host, project = environment.set_up()
    assert host == ("--no-deps", "solo-learn==1.0.2")
    assert "pypi-release" in project[-1]


def test_a_host_that_is_there_stays(environment):
    environment.put_host("1.0.6")
    (project,) = environment.set_up()
    assert "--editable" in project
    assert "pypi-release" not in project[-1]
    assert environment.hosts() == ["solo_learn-1.0.6.dist-info"]


def test_a_second_set_up_does_nothing(environment):
    environment.set_up()
    assert environment.set_up() == []


def test_an_interrupted_set_up_is_not_taken_for_a_finished_one(environment):
    environment.set_up()
    environment.remove_host()
    environment.fails_at = "--editable"
    with pytest.raises(KeyboardInterrupt):
        environment.set_up()
    environment.fails_at = ""
    assert environment.set_up() != []
    assert environment.set_up() == []


def test_a_changed_pyproject_is_set_up_again(environment, tmp_path, monkeypatch):
    monkeypatch.setattr(setup_environment, "ROOT", tmp_path)
    (tmp_path / "pyproject.toml").write_text("before")
    environment.set_up()
    (tmp_path / "pyproject.toml").write_text("after")
    assert environment.set_up() != []


def test_the_named_host_replaces_the_one_there(environment, clone):
    environment.set_up()
    host, project = environment.set_up(str(clone))
    assert host[:2] == ("--no-deps", "--force-reinstall")
    assert environment.hosts() == ["solo_learn-1.0.6.dist-info"]
    assert environment.set_up(str(clone)) == []
    assert environment.set_up() == []


def test_a_named_folder_with_other_content_is_installed_again(environment, clone):
    environment.set_up(str(clone))
    (clone / "datasets" / "2.png").write_text("data")
    assert environment.set_up(str(clone)) == []
    (clone / "solo" / "methods" / "base.py").write_text("edited")
    assert len(environment.set_up(str(clone))) == 2


def test_a_named_host_that_was_exchanged_by_hand_is_installed_again(environment, clone):
    environment.set_up(str(clone))
    environment.put_host("1.0.2")
    assert len(environment.set_up(str(clone))) == 2


def test_a_new_set_up_remembers_the_named_host(environment, clone, tmp_path, monkeypatch):
    monkeypatch.setattr(setup_environment, "ROOT", tmp_path)
    (tmp_path / "pyproject.toml").write_text("before")
    environment.set_up(str(clone))
    (tmp_path / "pyproject.toml").write_text("after")
    (project,) = environment.set_up()
    assert "--editable" in project
    assert environment.set_up(str(clone)) == []


def test_only_what_builds_is_copied_from_a_clone(clone, tmp_path):
    copy = Path(pip_source(str(clone), tmp_path / "scratch"))
    files = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()}
    assert files == {"setup.py", "solo/__init__.py", "solo/methods/base.py"}


def test_a_bare_repository_is_a_git_address(tmp_path):
    bare = tmp_path / "solo.git"
    subprocess.run(["git", "init", "--quiet", "--bare", str(bare)], check=True)
    assert pip_source(str(bare), tmp_path) == f"git+file://{bare}"


def test_a_url_is_left_to_pip(tmp_path):
    url = "git+https://example.org/solo-learn.git@main"
    assert fingerprint(url) == pip_source(url, tmp_path) == url


@pytest.mark.parametrize("source", ["./no-such-folder", "/no/such/folder.whl"])
def test_a_path_to_nothing_is_an_error(source, tmp_path, capsys):
    assert setup_environment.main(["--venv", str(tmp_path / "e"), "--solo-learn", source]) == 1
    assert capsys.readouterr().err == (
        f"setup: error: SOLO_LEARN={source}: no such file or folder\n"
    )
    assert not (tmp_path / "e").exists()


def test_a_folder_without_solo_learn_is_an_error(tmp_path):
    with pytest.raises(SetupError, match="holds no solo-learn"):
        fingerprint(str(tmp_path))


def test_builds_are_held_to_a_setuptools_with_pkg_resources(tmp_path):
    variables = setup_environment.build_environment(tmp_path)
    for name in ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT"):
        assert Path(variables[name]).read_text() == "setuptools<81\n"


def test_an_environment_of_another_python_is_an_error(tmp_path, monkeypatch):
    venv.create(tmp_path / "e", symlinks=True)
    monkeypatch.setattr(setup_environment, "output", lambda command: "3.9")
    with pytest.raises(SetupError, match=r"is of Python 3\.9: say PYTHON=python3\.9"):
        setup_environment.make_environment(tmp_path / "e")


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        ('["2.13.0+cpu", "0.28.0"]', [("torch===2.13.0", "torchvision===0.28.0")]),
        ('["2.13.0+cpu", "0.28.0+cpu"]', []),
        ('["2.13.0", "0.28.0"]', []),
    ],
)
def test_torch_and_torchvision_of_two_builds_are_replaced(versions, expected, monkeypatch):
    calls = []
    monkeypatch.setattr(setup_environment, "output", lambda command: versions)
    monkeypatch.setattr(setup_environment, "succeeds", lambda command: True)
    monkeypatch.setattr(
        setup_environment, "pip_install", lambda python, *arguments: calls.append(arguments)
    )
    setup_environment.check_torch(Path("python"))
    assert calls == expected


def test_torch_that_cannot_be_imported_is_an_error(monkeypatch):
    monkeypatch.setattr(setup_environment, "output", lambda command: '["2.13.0", "0.28.0"]')
    monkeypatch.setattr(setup_environment, "succeeds", lambda command: False)
    with pytest.raises(SetupError, match=r"torch 2\.13\.0 and torchvision 0\.28\.0 cannot be"):
        setup_environment.check_torch(Path("python"))


@pytest.fixture(scope="module")
def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_solo_learn_is_no_dependency(pyproject):
    extras = pyproject["project"]["optional-dependencies"]
    needs = pyproject["project"]["dependencies"] + [
        need for extra in extras.values() for need in extra
    ]
    assert len(needs) > 20
    assert not [need for need in needs if need.startswith("solo")]


def test_the_oldest_versions_are_the_lower_bounds(pyproject):
    extras = pyproject["project"]["optional-dependencies"]
    needs = pyproject["project"]["dependencies"] + extras["pypi-release"]
    needs += [need for need in extras["dev"] if need.startswith("setuptools")]
    bounds = {need.replace(">=", "==") for need in needs if ">=" in need.partition(";")[0]}
    lines = (ROOT / "tools" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    assert {line for line in lines if not line.startswith("#")} == bounds


def test_set_up_installs_every_extra(pyproject):
    extras = set(pyproject["project"]["optional-dependencies"])
    assert extras == {*setup_environment.EXTRAS, "pypi-release"}


def test_every_package_is_shipped(pyproject):
    folders = {path.parent for path in (ROOT / "metamask_solo").rglob("*.py")}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(pyproject["tool"]["setuptools"]["packages"]) == packages | {"metamask_solo.scripts"}


def test_help_lists_every_target():
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets is not None
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.findall(r"^  make ([a-z]+)", listed.stdout, re.MULTILINE) == targets[1].split()


def test_a_python_that_is_too_old_or_missing_is_one_clear_line():
    command = ["make", "--no-print-directory", "setup", "PYTHON=no-such-python"]
    # the suite is itself run by make, whose variables make this one say "make[1]"
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert result.returncode != 0
    assert result.stderr.startswith(
        "setup: error: PYTHON=no-such-python is no Python 3.10 or newer"
    )
    assert len([line for line in result.stderr.splitlines() if "make: ***" not in line]) == 1
