"""The command ``metamask-solo demo``, on a small data folder in place of the digits."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from metamask_solo.commands import demo
from metamask_solo.data import digits
from metamask_solo.training.resume import read_metrics

ROWS = ("random backbone", "raw pixels", "metamask", "simclr", "barlow")


@pytest.fixture
def small_digits(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(name: str, out: Path) -> bool:
        shutil.copytree(images, out / name, dirs_exist_ok=True)
        return True

    monkeypatch.setattr(digits, "write_dataset", write)


def table_of(out: Path) -> dict[str, list[float]]:
    lines = (out / "digits.txt").read_text().splitlines()[1:]
    return {line[:16].strip(): [float(cell) for cell in line[16:].split()] for line in lines}


@pytest.mark.slow
@pytest.mark.usefixtures("small_digits")
def test_a_table_a_figure_and_no_work_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--epochs", "1", "--out", str(tmp_path)]
    arguments += ["optimizer.batch_size=10", "data.num_workers=0", "+num_sanity_val_steps=0"]

    assert demo.main(arguments) == 0

    table = table_of(tmp_path)
    assert tuple(table) == ROWS
    # no training, no time; the accuracies are percentages of the 10 validation images
    assert [len(cells) for cells in table.values()] == [2, 2, 3, 3, 3]
    assert all(cell in range(0, 101, 10) for cells in table.values() for cell in cells[:2])
    assert (tmp_path / "digits.txt").read_text() in capsys.readouterr().out
    with Image.open(tmp_path / "digits.png") as figure:
        assert figure.width > figure.height > 100
    runs = sorted((tmp_path / "runs").glob("*/*/training/*/*"))
    assert [run.parent.name for run in runs] == ["barlow_twins", "metamask", "simclr"]
    steps = {run: [row["step"] for row in read_metrics(run)] for run in runs}
    assert all(steps.values())

    demo.main(arguments)

    assert sorted((tmp_path / "runs").glob("*/*/training/*/*")) == runs
    assert {run: [row["step"] for row in read_metrics(run)] for run in runs} == steps
    assert table_of(tmp_path) == table
