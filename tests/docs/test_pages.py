"""Every block of README and docs runs on small data; commands, files, settings and links are real.

Each page is one session in a folder of its own, as if a reader typed all of it in order. Commands
of the package run in this process, with what makes them small. A block that cannot run has a
comment above it: ``<!-- not run: needs a GPU -->``.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import write_images

from metamask_solo import DimensionalMask
from metamask_solo.__main__ import COMMANDS, main
from metamask_solo.data import digits
from metamask_solo.method.settings import SETTINGS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?P<reason><!-- not run: \S.* -->\n)?^```(?P<language>.*)\n(?P<text>(?:.*\n)*?)```$",
    re.MULTILINE,
)
TRAINING = [
    *("++max_epochs=1", "++limit_train_batches=2", "++optimizer.batch_size=16", "++precision=32"),
    *("++data.num_workers=0", "++accelerator=cpu", "++enable_progress_bar=False"),
    *("++enable_model_summary=False", "++num_sanity_val_steps=0"),
]
HEADS = [
    f"++method_kwargs.{head}_{size}_dim=16"
    for head in ("proj", "contrastive")
    for size in ("hidden", "output")
]
# what is appended to a command so that it takes seconds
TINY = {
    "pretrain": [*TRAINING, *HEADS],
    "linear": TRAINING,
    "analyze": ["--draws", "2", "--num-workers", "0"],
    "benchmark": ["--tables-only"],
    "demo": ["--help"],  # trains in processes of its own: tests/commands/test_demo.py
    "knn": ["--num-workers", "0"],
    "embed": ["--num-workers", "0"],
    "umap": ["--help"],  # compiles for long: tests/commands/test_umap.py
}
CROPS = {
    "pretrain": "++augmentations.0.crop_size=32",
    "linear": "++data.augmentations.crop_size=32",
}


def prose(page: Path) -> str:
    """The text of a page without its blocks and comments."""
    return re.sub(r"<!--.*?-->", "", BLOCK.sub("", page.read_text()), flags=re.DOTALL)


def name(page: Path) -> str:
    return page.stem


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks_say_what_they_are(page: Path) -> None:
    text = page.read_text()
    blocks = list(BLOCK.finditer(text))
    assert len(re.findall(r"^ *```", text, re.MULTILINE)) == 2 * len(blocks)
    for block in blocks:
        assert block["language"] in ("python", "sh", "text", "bibtex"), block[0]
        if block["language"] == "python":
            compile(block["text"], page.name, "exec")


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if "```" in page.read_text()], ids=name)
def test_the_blocks_run(page: Path, reader: pytest.MonkeyPatch) -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    for block in BLOCK.finditer(page.read_text()):
        if block["language"] == "python" and not block["reason"]:
            exec(compile(block["text"], page.name, "exec"), names)
        elif block["language"] == "sh" and not block["reason"]:
            for command in block["text"].replace("\\\n", " ").splitlines():
                type_in(command, reader)


def type_in(command: str, reader: pytest.MonkeyPatch) -> None:
    """Runs one command; of one that would install something, only the names are looked at."""
    if assignment := re.match(r"(\w+)=", command):
        reader.setenv(assignment[1], bash(f"{command}\nprintf %s ${assignment[1]}"))
        return
    first, *arguments = bash(f"printf '%s\\0' {command}").split("\0")[:-1]
    if first == "metamask-solo":
        run_ours(arguments)
    elif first == "make":
        subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, check=True, capture_output=True)
    else:
        assert first == "pip", command
        pyproject = (ROOT / "pyproject.toml").read_text()
        for extra in re.findall(r"\[([\w-]+)", command):
            assert f"\n{extra} = [" in pyproject, command


def bash(script: str) -> str:
    """What a script prints, with the variables that were set before."""
    done = subprocess.run(["bash", "-euc", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_ours(arguments: list[str]) -> None:
    command = arguments[0]
    tiny = [] if "--help" in arguments else list(TINY.get(command, []))
    if tiny and any("custom" in word for word in arguments) and command in CROPS:
        tiny.append(CROPS[command])
    try:
        code = main([*arguments, *tiny])
    except SystemExit as stopped:  # argparse's help
        code = int(stopped.code or 0)
    # the results of runs that were not made say so in the exit code
    assert code in ((0, 1) if command == "benchmark" else (0,)), arguments


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A folder with the scripts of the project, and small data in place of all data sets."""
    small = write_images(tmp_path / "small", classes=10, train=8, val=4)

    def write(name: str, out: str | Path, force: bool = False) -> bool:
        shutil.copytree(small, Path(out) / name, dirs_exist_ok=True)
        return True

    work = tmp_path / "work"
    work.mkdir()
    for folder in ("scripts", "docs"):
        (work / folder).symlink_to(ROOT / folder)
    shutil.copytree(small / "train", work / "photos")
    shutil.copytree(small / "train", work / "unlabelled")
    monkeypatch.setattr(digits, "write_dataset", write)
    monkeypatch.chdir(work)
    return monkeypatch


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_names_in_the_text_are_real(page: Path) -> None:
    for span in re.findall(r"`([^`\n]+)`", prose(page)):
        if command := re.match(r"metamask-solo ([a-z][\w-]*)", span):
            assert command[1] in COMMANDS, span
        if re.fullmatch(r"(scripts|tools|tests|docs|metamask_solo)/[\w./-]+", span):
            assert (ROOT / span).exists(), span
        if setting := re.fullmatch(r"(?:method_kwargs\.)?((?:mask|meta)\.[a-z_]+)(=.*)?", span):
            assert setting[1] in SETTINGS or hasattr(DimensionalMask(1), setting[1][5:]), span
        if target := re.fullmatch(r"make ([a-z-]+)", span):
            assert f"\n{target[1]}:" in (ROOT / "Makefile").read_text(), span


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_of_pages_outside_the_site_lead_somewhere(page: str) -> None:
    for target, anchor in re.findall(r"\]\(([^):#]+)(#[^)]+)?\)", prose(ROOT / page)):
        assert (ROOT / target).exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", prose(ROOT / target), re.MULTILINE)
            anchors = {re.sub(r"\W+", "-", heading.lower()).strip("-") for heading in headings}
            assert anchor[1:] in anchors, f"{target}{anchor}"


def test_the_front_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Also for a page that is in no menu, and a link that leads nowhere: see mkdocs.yml."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
