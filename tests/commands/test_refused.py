"""What the commands refuse before they begin: one line, and nothing is written."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from metamask_solo.__main__ import main
from metamask_solo.training.endings import scripts_folder

DIGITS = scripts_folder() / "pretrain" / "digits"
Refused = Callable[[list[str]], str]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The text files of the working folder, which no command may change."""
    header = "epoch,step,train_loss_epoch\n"
    texts = {
        "taken.csv": "mine",
        "images.npy": "mine",
        "begun/metrics.csv": header,
        "diverged/metrics.csv": f"{header}0,8,nan\n",
        "latin/metrics.csv": "epoch,größe\n",
        "latin/file.yaml": "name: Größe\n",
        "odd/file.yaml": "name: {a\n",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="latin-1")
    monkeypatch.chdir(tmp_path)
    return texts


def content() -> dict[str, str]:
    """The files of the working folder."""
    paths = [path for path in Path().rglob("*") if not path.is_dir()]
    return {path.as_posix(): path.read_text(encoding="latin-1") for path in paths}


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("pretrian", "unknown command pretrian"),
        ("knn gone.ckpt", "gone.ckpt: no such checkpoint"),
        ("knn simclr --data gone", "gone"),
        ("knn simclr --masked", "holds no mask"),
        ("knn folded --plain", "folded into the backbone"),
        ("knn metamask --plain --features projector", "masked features only"),
        ("knn simclr --k 5 21", "--k=21: there are only 20 training images"),
        ("knn simclr --k 0", "argument --k: must be at least 1, not 0; see metamask-solo knn --h"),
        ("knn simclr --num-workers -1", "argument --num-workers: must be at least 0, not -1"),
        ("knn simclr --temperature 0", "argument --temperature: must be a number above 0, not 0"),
        ("embed simclr --out features.npz", "argument --out: features.npz must end in .npy"),
        ("embed simclr --out taken.npy", "taken.csv exists already"),
        ("umap simclr --split train --samples 15", "15 images: UMAP needs more than 15; give"),
        ("analyze simclr --data=gone", "gone"),
        ("analyze simclr --out=begun", "holds other files"),
        ("plot gone", "gone: no such run"),
        ("plot .", "no metrics were logged"),
        ("plot begun", "no metrics were logged"),
        ("plot diverged", "the runs logged no finite number of what is drawn"),
        ("plot latin", "not a table of metrics"),
        ("data digits mnist", "data set 'mnist' is unknown: allowed are digits"),
        ("fold metamask m.ckpt --force", "images.npy: exists already, and is not of m.ckpt"),
        ("run no.py --config-name x", "no.py: no such script"),
        ("finetune --config-name x finetune=False", "finetune=False: this command trains the"),
        # overrides may stand behind options: the arguments were read, what they name is wrong
        ("benchmark no-such-file.yaml --tables-only seeds=[0]", "no-such-file"),
        ("demo --epochs=0 seed=1", "epochs=0"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    command: str, line: str, files: dict[str, str], runs: dict[str, Path], refused: Refused
) -> None:
    if command.startswith("umap"):
        pytest.importorskip("umap")
    assert line in refused([str(runs.get(word, word)) for word in command.split()])
    assert content() == files


def pretrain(images: Path, arguments: str) -> list[str]:
    """A check of a packaged file; of an option that is given twice, the latter counts."""
    return [
        *("pretrain", "--config-path", str(DIGITS), "--config-name=metamask", "--cfg-check"),
        *(f"data.train_path={images / 'train'}", f"data.val_path={images / 'val'}"),
        *("optimizer.batch_size=10", "data.num_workers=0", *arguments.split()),
    ]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("data.train_path=/data/a=b", "quote the value: 'data.train_path=\"/data/a=b\"'"),
        ("augmentations.crop_size=32", "write augmentations.0.KEY=VALUE"),
        ("augmentations=null", "config: Config group override must be a string or a list"),
        ("max_epochs", "max_epochs: must be KEY=VALUE"),
        ("resume_from_checkpoint=no.ckpt", "no.ckpt: no such"),
        ("callbacks=[{_target_:nowhere.Callback}]", "nowhere.*No module named 'nowhere'"),
        ("data.train_path=${oc.env:NO_SUCH}/a", "data.train_path: .*'NO_SUCH' not found"),
        ("+optimizer.lrr=1", r"optimizer.lrr: unknown setting; did you mean optimizer.lr\?"),
        ("hydra.job.chdir=True", "hydra.job.chdir=True: not supported"),
        ("hydra/launcher=nowhere", "Could not find 'hydra/launcher/nowhere'"),
        ("--config-path latin --config-name file", "UTF-8"),
        ("--config-path odd --config-name file", "odd/file.yaml"),
        ("--config-path nowhere", "no such folder"),
        ("--config-path scripts/pretrain/digits", "has pkg://metamask_solo.scripts.pretrain.digit"),
        ("--config-name nothing", "nothing"),
        ("--config-name=", "--config-name: missing"),
    ],
)
def test_what_hydra_cannot_compose_or_no_run_reads_is_one_line(
    arguments: str, line: str, images: Path, files: dict[str, str], refused: Refused
) -> None:
    assert re.search(line, refused(pretrain(images, arguments)))
    assert content() == files


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_wrong_job_of_a_checked_sweep_is_an_error(
    launcher: str, images: Path, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(pretrain(images, f"-m hydra/launcher={launcher} max_epochs=0,1")) == 2
    assert "error: max_epochs=0: " in capsys.readouterr().err.splitlines()[-1]
    assert content() == files
