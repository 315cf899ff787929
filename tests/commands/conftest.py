"""Checkpoints and images that the tests of several commands read."""

from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints_of_runs import write_run
from matplotlib.figure import Figure

from metamask_solo.__main__ import main
from metamask_solo.checkpoints.exporting import fold_checkpoint


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, images: Path) -> dict[str, Path]:
    """Checkpoints of MetaMask, of the same folded, and of SimCLR."""
    root = tmp_path_factory.mktemp("runs")
    paths = {name: write_run(root / name, images, name) for name in ("metamask", "simclr")}
    paths["folded"] = fold_checkpoint(paths["metamask"], root / "folded").path
    return paths


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """Runs a command and returns the one line that it ends with."""

    def refused(arguments: list[str]) -> str:
        capsys.readouterr()
        code = main(arguments)
        printed = capsys.readouterr()
        assert code == 2, printed
        lines = [line for line in printed.err.splitlines() if not line.startswith("INFO")]
        assert len(lines) == 1 and "Error executing" not in printed.err + printed.out, printed.err
        return lines[0]

    return refused


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    saved: list[Figure] = []
    save = Figure.savefig

    def record(self: Figure, *args, **kwargs) -> None:
        saved.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", record)
    return saved
