"""The fenced blocks of README and docs, and a shell for them.

The shell runs our own commands in this process.

A block is run, or an HTML comment in the line above says why not:
``<!-- not run: needs a GPU -->``.
"""

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN = ("python", "sh")
READ = ("yaml", "json", "toml")
SHOWN = ("text", "bibtex", "mermaid")
_FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,})(?P<language>[^`]*)$")
_REASON = re.compile(r"^ *<!-- not run: (?P<reason>\S.*) -->$")


@dataclass(frozen=True)
class Block:
    """One fenced block: where it begins, its language and text, and why it is not run."""

    page: Path
    line: int
    language: str
    text: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, those in list items and admonitions too."""
    found = []
    lines = iter(enumerate(page.read_text(encoding="utf-8").splitlines(), start=1))
    before = ""
    for number, line in lines:
        fence = _FENCE.match(line)
        if fence is None:
            before = line if line.strip() else before
            continue
        indent, ticks = fence["indent"], fence["ticks"]
        text = []
        for _, inner in lines:
            if inner.strip() == ticks:
                break
            text.append(inner.removeprefix(indent))
        else:
            raise ValueError(f"{page.name}:{number}: the block is not closed")
        reason = _REASON.match(before)
        language = fence["language"].strip()
        found.append(
            Block(page, number, language, "\n".join(text) + "\n", reason and reason["reason"])
        )
        before = ""
    return found


def commands(text: str) -> Iterator[str]:
    """The commands of a shell block: without comments, with continued lines joined."""
    joined = re.sub(r"\\\n\s*", " ", text)
    for line in joined.splitlines():
        line = re.sub(r"(^|\s+)# .*$", "", line).strip()
        if line:
            yield line


def prose(page: Path) -> str:
    """The text of a page without its fenced blocks and comments."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"^( *)(`{3,})[^`]*\n.*?^\1\2 *$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)


@dataclass
class Shell:
    """What a reader types into, in one folder: remembers variables from line to line."""

    folder: Path
    variables: dict[str, str] = field(default_factory=dict)

    def expand(self, command: str) -> list[str]:
        """The words that bash makes of a command: variables, globs and quotes resolved."""
        return self._bash(f"printf '%s\\0' {command}").split("\0")[:-1]

    def run(self, command: str) -> str:
        """Runs a command that is none of ours, and keeps the variable that it sets."""
        assignment = re.match(r"^([A-Za-z_]\w*)=(.*)$", command)
        if assignment is None:
            return self._bash(command)
        name, value = assignment.groups()
        self.variables[name] = self._bash(f"printf '%s' {value}")
        return ""

    def _bash(self, script: str) -> str:
        done = subprocess.run(
            ["bash", "-euc", script],
            cwd=self.folder,
            env={**os.environ, **self.variables},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{script}: exit code {done.returncode}; {done.stderr}")
        return done.stdout


def words(command: str) -> list[str]:
    """The words of a command, nothing expanded."""
    return shlex.split(command)
