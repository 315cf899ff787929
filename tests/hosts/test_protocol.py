"""Both releases give what the protocol of a host asks for; mypy checks the types beside."""

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest

from metamask_solo import hosts
from metamask_solo.hosts.protocol import Host

FUNCTIONS = {n: f for n, f in vars(Host).items() if inspect.isfunction(f) and n[0] != "_"}
NAMES = {*Host.__annotations__, *FUNCTIONS}
PACKAGE = Path(hosts.__file__).parents[1]
ONLY = "1_0_2"  # ends the names of the files of that release


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("release", ["github_main", "release_1_0_2"])
def test_a_release_defines_every_name_with_the_arguments_of_the_protocol(release: str) -> None:
    found: dict[str, Any] = {}
    for node in tree(PACKAGE / "hosts" / f"{release}.py").body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = [argument.arg for argument in node.args.args]
        elif isinstance(node, ast.ClassDef):
            found[node.name] = None
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= dict.fromkeys(name.asname or name.name for name in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= dict.fromkeys(t.id for t in targets if isinstance(t, ast.Name))
    assert set(found) >= NAMES
    for name, function in FUNCTIONS.items():
        assert found[name] == list(inspect.signature(function).parameters)[1:], name


def test_the_release_at_hand_is_a_host() -> None:
    for name, function in FUNCTIONS.items():
        own = inspect.signature(getattr(hosts.host, name)).parameters.values()
        asked = list(inspect.signature(function).parameters.values())[1:]
        assert [(p.name, p.default) for p in own] == [(p.name, p.default) for p in asked]
    assert all(hasattr(hosts.host, name) for name in NAMES)


def test_to_drop_1_0_2_is_to_delete_its_files_and_where_they_are_chosen() -> None:
    users = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(name.name for name in node.names)]
                if any(name.endswith(ONLY) for name in names):
                    users.add(file.relative_to(PACKAGE).as_posix())
    others = {name for name in users if not name.endswith(f"{ONLY}.py")}
    assert others == {"hosts/__init__.py", "registration.py"}
