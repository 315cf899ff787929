"""Every block of README and docs is run on small data; commands, files and links are real.

Each page is one session in a folder of its own, as if a reader typed all of it in order. Our
commands run in this process, with overrides appended that make them small.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from documented import PAGES, READ, ROOT, RUN, SHOWN, Block, Shell, blocks, commands, prose
from runs import write_images

from metamask_solo import DimensionalMask
from metamask_solo.__main__ import COMMANDS, main
from metamask_solo.method.settings import SETTINGS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TINY_RUN = [
    "++max_epochs=1",
    "++limit_train_batches=2",
    "++optimizer.batch_size=16",
    "++data.num_workers=0",
    "++accelerator=cpu",
    "++devices=1",
    "++strategy=auto",
    "++precision=32",
    "++enable_progress_bar=False",
    "++enable_model_summary=False",
    "++num_sanity_val_steps=0",
]
TINY_HEADS = [
    f"++method_kwargs.{name}=16"
    for name in (
        "proj_hidden_dim",
        "proj_output_dim",
        "contrastive_hidden_dim",
        "contrastive_output_dim",
    )
]
# what is appended to a command so that it takes seconds
TINY = {
    "pretrain": TINY_RUN,
    "linear": TINY_RUN,
    "finetune": TINY_RUN,
    "analyze": ["--draws", "2", "--num-workers", "0"],
    "benchmark": ["--tables-only"],
    # in processes of its own: tests/commands/test_demo.py runs it
    "demo": ["--help"],
    "knn": ["--num-workers", "0"],
    "embed": ["--num-workers", "0"],
    "umap": ["--num-workers", "0", "--split", "train"],
    "step-cost": ["--rounds", "1", "--stem", "standard", "--batch-size", "4", "--only", "heads"],
}


def ids(block: Block) -> str:
    return str(block)


ALL_BLOCKS = [block for page in PAGES for block in blocks(page)]
TO_RUN = [
    page
    for page in PAGES
    if any(block.language in RUN and block.reason is None for block in blocks(page))
]


@pytest.mark.parametrize("block", ALL_BLOCKS, ids=ids)
def test_a_block_says_what_it_is(block: Block) -> None:
    assert block.language in (*RUN, *READ, *SHOWN), f"unknown language {block.language!r}"
    if block.language == "yaml":
        yaml.safe_load(block.text)
    elif block.language == "json":
        json.loads(block.text)
    elif block.language == "toml":
        tomllib.loads(block.text)
    elif block.language == "python":
        compile(block.text, str(block), "exec")


@pytest.mark.slow
@pytest.mark.parametrize("page", TO_RUN, ids=lambda page: page.name)
def test_the_blocks_run(page: Path, reader: Shell) -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.reason is not None:
            continue
        if block.language == "python":
            exec(compile(block.text, str(block), "exec"), names)
        elif block.language == "sh":
            for command in commands(block.text):
                type_in(command, block, reader)


def type_in(command: str, block: Block, reader: Shell) -> None:
    """Runs one command of a shell block; for what would install something, checks it alone."""
    first = command.split()[0]
    if first == "metamask-solo":
        run_ours(reader.expand(command)[1:], block)
    elif first == "make":
        subprocess.run(
            ["make", "--dry-run", *reader.expand(command)[1:]],
            cwd=ROOT,
            check=True,
            stdout=subprocess.DEVNULL,
        )
    elif first in ("pip", "git", "pre-commit"):
        for extra in re.findall(r"\[([a-z,-]+)\]", command):
            assert set(extra.split(",")) <= extras(), f"{block}: {command}"
    elif first == "cd":
        assert "/" not in command, f"{block}: {command}"
    else:
        reader.run(command)


def run_ours(arguments: list[str], block: Block) -> None:
    name = arguments[0]
    assert name.startswith("-") or name in COMMANDS, f"{block}: no command {name}"
    tiny = list(TINY.get(name, []))
    if name == "pretrain" and not any(
        re.search(r"simclr|barlow|vicreg|byol", word) for word in arguments
    ):
        tiny += TINY_HEADS
    if any("custom" in word for word in arguments) and name == "pretrain":
        tiny.append("++augmentations.0.crop_size=32")
    if any("custom" in word for word in arguments) and name in ("linear", "finetune"):
        tiny.append("++data.augmentations.crop_size=32")
    if {"--help", "-h", "--version"} & set(arguments):
        tiny = []
    try:
        code = main([*arguments, *tiny])
    except SystemExit as stopped:  # argparse
        code = stopped.code if isinstance(stopped.code, int) else 0
    torch.set_num_threads(1)  # numba, once UMAP ran, leaves the process with more
    # a table of runs that were not made says so in the exit code
    assert code in ((0, 1) if name == "benchmark" else (0,)), f"{block}: {arguments}"


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    """A shell in a folder with the project's scripts and small data in place of all data sets."""
    from metamask_solo.data import digits

    def write(name: str, out: str | Path, force: bool = False) -> bool:
        digits.check_name(name)
        if (Path(out) / name).exists():
            return False
        shutil.copytree(tmp_path / "small", Path(out) / name)
        return True

    write_images(tmp_path / "small", classes=10, train=8, val=4)
    work = tmp_path / "work"
    work.mkdir()
    for name in ("scripts", "docs", "README.md", "tools"):
        (work / name).symlink_to(ROOT / name)
    monkeypatch.setattr(digits, "write_dataset", write)
    monkeypatch.chdir(work)
    shutil.copytree(tmp_path / "small", work / "my")
    shutil.copytree(tmp_path / "small" / "train", work / "photos")
    (work / "unlabelled").mkdir()
    for image in (tmp_path / "small" / "train").glob("*/*"):
        shutil.copyfile(image, work / "unlabelled" / f"{image.parent.name}-{image.name}")
    return Shell(work)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_files_and_settings_in_the_text_are_real(page: Path) -> None:
    text = prose(page)
    spans = re.findall(r"`([^`\n]+)`", text)
    for span in spans:
        if span.startswith("metamask-solo ") and not span.split()[1].isupper():
            assert span.split()[1] in COMMANDS or span.split()[1].startswith("-"), span
        place = re.fullmatch(r"(scripts|tools|tests|docs|metamask_solo)/[\w./-]+", span)
        # what a benchmark writes may not be there yet
        if place and not span.startswith("docs/results/"):
            assert (ROOT / span).exists(), span
        if re.fullmatch(r"(mask|meta)\.[a-z_]+", span):
            assert span in SETTINGS or hasattr(DimensionalMask(1), span.partition(".")[2]), span
        if setting := re.fullmatch(r"method_kwargs\.((mask|meta)\.[a-z_]+)(=.*)?", span):
            assert setting[1] in SETTINGS, span
        if target := re.fullmatch(r"make ([a-z-]+)", span):
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert re.search(rf"^{target[1]}:", makefile, re.MULTILINE), span


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_project_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", prose(page)):
        path, _, anchor = (target[0] or target[1]).partition("#")
        if "://" in path or path.startswith("mailto:"):
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {path}"
        if anchor and file.suffix == ".md":
            assert anchor in headings(file), f"{page.name}: {path}#{anchor}"


def headings(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and MkDocs make them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", title.lower()).strip() for title in titles]
    return {re.sub(r"\s+", "-", title) for title in plain}


def extras() -> set[str]:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return set(pyproject["project"]["optional-dependencies"])


def test_the_front_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
