"""The command ``metamask-solo demo``, on a small data folder in place of the digits."""

import csv
import shutil
from pathlib import Path

import pytest

from metamask_solo.commands import demo
from metamask_solo.data import digits


@pytest.fixture
def small_digits(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(name: str, out: Path) -> bool:
        shutil.copytree(images, out / name, dirs_exist_ok=True)
        return True

    monkeypatch.setattr(digits, "write_dataset", write)


@pytest.mark.slow
@pytest.mark.usefixtures("small_digits")
def test_a_table_figures_and_no_work_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--epochs", "1", "--out", str(tmp_path)]
    arguments += ["optimizer.batch_size=10", "data.num_workers=0", "+num_sanity_val_steps=0"]

    assert demo.main(arguments) == 0

    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == [
        *("random", "pixels", "metamask", "simclr", "barlow_twins")
    ]
    # percentages of the 10 validation images
    assert all(float(row[name]) in range(0, 101, 10) for row in rows for name in ("knn", "linear"))
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "One seed shows no difference: take at least three" in printed
    assert (tmp_path / "results.md").read_text() in printed

    assert demo.main(arguments) == 0
    assert "5 runs, 5 finished before" in capsys.readouterr().out
