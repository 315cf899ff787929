"""What the commands refuse before they begin: one line, and nothing is written."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("knn simclr --masked", "holds no mask"),
        ("knn folded --plain", "folded into the backbone"),
        ("knn metamask --plain --features projector", "masked features only"),
        ("knn simclr --k 5 21", "--k=21: there are only 20 training images"),
        ("knn simclr --k 0", "argument --k: must be at least 1, not 0; see metamask-solo knn --h"),
        ("knn simclr --temperature 0", "argument --temperature: must be a number above 0, not 0"),
        ("knn simclr --temperature inf", "--temperature: must be a number above 0, not inf"),
        ("knn simclr --num-workers -1", "argument --num-workers: must be at least 0, not -1"),
        ("knn simclr --batch-size many", "argument --batch-size: invalid number value: 'many'"),
        ("knn simclr --data gone", "gone"),
        ("knn", "the following arguments are required: CHECKPOINT"),
        ("knn gone.ckpt", "gone.ckpt: no such checkpoint"),
        ("embed simclr --out features.npz", "argument --out: features.npz must end in .npy"),
        ("embed simclr --out taken.npy", "taken.csv exists already"),
        ("embed simclr --data gone", "gone: no such folder"),
        ("umap simclr --split train --samples 15", "15 images: UMAP needs more than 15; give"),
        ("umap simclr --out u.gif", "argument --out: u.gif must end in .png, .pdf, .svg"),
        ("analyze simclr --draws=0", "argument --draws: must be at least 1, not 0"),
        ("analyze simclr --seed=-1", "argument --seed: must be at least 0, not -1"),
        ("analyze simclr --data=gone", "gone"),
        ("analyze simclr --out=logged", "holds other files"),
        ("plot gone", "gone: no such run"),
        ("plot .", "no metrics were logged"),
        ("plot logged", "the runs logged no finite number of what is drawn"),
        ("plot taken.csv --out plot.gif", "argument --out: plot.gif must end in .png"),
        ("data digits mnist", "data set 'mnist' is unknown: allowed are digits"),
        ("fold metamask taken.csv", "taken.csv: "),
        ("fold metamask m.ckpt --force", "images.npy: exists already, and is not of m.ckpt"),
        ("run no.py --config-name x", "no.py: no such script"),
        ("finetune --config-name x finetune=False", "finetune=False: this command trains the"),
        ("benchmark", "the following arguments are required: CONFIG"),
        ("demo --epochs few", "argument --epochs: invalid int value: 'few'"),
        ("step-cost --rounds 0", "argument --rounds: must be at least 1, not 0"),
        ("pretrian", "unknown command pretrian"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(
    command: str,
    line: str,
    runs: dict[str, Path],
    refused: Callable[[list[str]], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if command.startswith("umap"):
        pytest.importorskip("umap")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.csv").write_text("mine")
    (tmp_path / "images.npy").write_text("mine")
    (tmp_path / "logged").mkdir()
    (tmp_path / "logged/metrics.csv").write_text("epoch,step,train_loss_epoch\n0,8,nan\n")
    words = [str(runs.get(word, word)) for word in command.split()]
    assert line in refused(words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images.npy", "logged", "taken.csv"]
    assert (tmp_path / "taken.csv").read_text() == "mine"
