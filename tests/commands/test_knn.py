"""The command ``metamask-solo knn``."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints_of_runs import write_run
from omegaconf import OmegaConf
from runs import pretrain_config

from metamask_solo.checkpoints.folding import fold_checkpoint
from metamask_solo.checkpoints.reading import load_backbone
from metamask_solo.commands import embed, knn, umap
from metamask_solo.data.images import image_loader
from metamask_solo.errors import UserError
from metamask_solo.evaluation import knn as neighbours
from metamask_solo.evaluation.features import extract_features
from metamask_solo.evaluation.knn import knn_accuracy
from metamask_solo.training.pretraining import prepare_pretraining


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, images: Path) -> dict[str, Path]:
    """Checkpoints of MetaMask, of the same folded, and of SimCLR."""
    root = tmp_path_factory.mktemp("runs")
    paths = {name: write_run(root / name, images, name) for name in ("metamask", "simclr")}
    paths["folded"] = fold_checkpoint(paths["metamask"], root / "folded").path
    return paths


def rows_of(tmp_path: Path, checkpoint: Path, *options: str) -> dict[str, Any]:
    """Runs the command and returns what it wrote."""
    file = tmp_path / "result.json"
    assert knn.main([str(checkpoint), *options, "--num-workers", "0", "--json", str(file)]) == 0
    return json.loads(file.read_text())


def test_a_row_for_each_combination(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = (
        "--k 1 5 --temperature 0.07 0.2 --distance cosine euclidean --features backbone projector"
    )

    result = rows_of(tmp_path, runs["simclr"], *grid.split())

    settings = [
        (row["features"], row["distance"], row["temperature"], row["k"]) for row in result["rows"]
    ]
    assert settings == [
        (features, distance, temperature, k)
        for features in ("backbone", "projector")
        for distance, temperature in (("cosine", 0.07), ("cosine", 0.2), ("euclidean", None))
        for k in (1, 5)
    ]
    head, titles, *lines = capsys.readouterr().out.splitlines()
    assert "plain features, 20 training and 10 validation images" in head
    assert titles.split() == ["features", "distance", "temperature", "k", "top-1", "top-5"]
    assert len({len(line) for line in (titles, *lines)}) == 1
    assert [float(line.split()[-2]) for line in lines] == [row["top1"] for row in result["rows"]]
    assert lines[-1].split()[:4] == ["projector", "euclidean", "-", "5"]


@pytest.mark.parametrize(
    ("option", "masked"), [([], True), (["--masked"], True), (["--plain"], False)]
)
def test_a_mask_is_used_unless_plain_features_are_asked_for(
    runs: dict[str, Path], images: Path, tmp_path: Path, option: list[str], masked: bool
) -> None:
    result = rows_of(tmp_path, runs["metamask"], *option, "--k", "3", "--distance", "euclidean")

    backbone, checkpoint = load_backbone(runs["metamask"], masked)
    train, val = (
        extract_features(backbone, image_loader(images / split, checkpoint.config))
        for split in ("train", "val")
    )
    top1, top5 = knn_accuracy(*train, *val, k=3, distance="euclidean")
    row = result["rows"][0]
    assert result["masked"] is masked
    assert (row["top1"], row["top5"]) == (pytest.approx(top1), pytest.approx(top5))


def test_the_folded_checkpoint_gives_the_same_features(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features: list[torch.Tensor] = []

    def record(train: torch.Tensor, *others: Any, **settings: Any) -> tuple[float, float]:
        features.append(train)
        return knn_accuracy(train, *others, **settings)

    monkeypatch.setattr(neighbours, "knn_accuracy", record)
    grid = ["--k", "1", "5", "--distance", "cosine", "euclidean"]

    masked, folded, plain = (
        rows_of(tmp_path, runs[name], *grid, *option)
        for name, option in (("metamask", []), ("folded", []), ("metamask", ["--plain"]))
    )

    assert folded["rows"] == masked["rows"]
    torch.testing.assert_close(features[4], features[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(features[8], features[0], rtol=0.1)
    assert plain["masked"] is False


def test_projected_features_are_those_of_the_method(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []

    def record(train: torch.Tensor, *others: Any, **settings: Any) -> tuple[float, float]:
        shapes.append(tuple(train.shape))
        return 0.0, 0.0

    monkeypatch.setattr(neighbours, "knn_accuracy", record)

    rows_of(tmp_path, runs["metamask"], "--features", "projector", "backbone")

    assert shapes == [(20, 8), (20, 512)]


def test_a_folder_stands_for_its_checkpoint(runs: dict[str, Path], tmp_path: Path) -> None:
    by_folder = rows_of(tmp_path, runs["simclr"].parent, "--features", "backbone", "projector")

    assert by_folder == rows_of(tmp_path, runs["simclr"], "--features", "backbone", "projector")


def test_other_data_than_those_of_the_run(
    runs: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    for split, count in (("train", 3), ("val", 1)):
        for folder in sorted((images / split).iterdir())[:2]:
            (tmp_path / "data" / split / folder.name).mkdir(parents=True)
            for file in sorted(folder.iterdir())[:count]:
                shutil.copy(file, tmp_path / "data" / split / folder.name)

    result = rows_of(tmp_path, runs["simclr"], "--data", str(tmp_path / "data"), "--k", "6")

    assert (result["train_images"], result["val_images"]) == (6, 2)


@pytest.mark.parametrize(
    ("run", "options", "message"),
    [
        ("simclr", ["--masked"], "holds no mask"),
        ("simclr", ["--masked", "--features", "projector"], "holds no mask"),
        ("folded", ["--plain"], "folded into the backbone"),
        ("metamask", ["--plain", "--features", "projector"], "masked features only"),
        ("simclr", ["--k", "5", "21"], "only 20 training images"),
        ("simclr", ["--k", "0"], "k=0"),
        ("simclr", ["--temperature", "-1"], "temperature=-1"),
        ("simclr", ["--batch-size", "0"], "--batch-size=0"),
        ("simclr", ["--num-workers", "-1"], "--num-workers=-1"),
        ("simclr", ["--data", "gone"], "gone/train"),
    ],
)
def test_what_cannot_be_done_is_said(
    runs: dict[str, Path], tmp_path: Path, run: str, options: list[str], message: str
) -> None:
    file = tmp_path / "result.json"

    with pytest.raises(UserError, match=message) as caught:
        knn.main([str(runs[run]), *options, "--json", str(file)])

    assert "\n" not in str(caught.value)
    assert not file.exists()


def change_config(source: Path, target: Path, **changes: Any) -> Path:
    """A copy of a run whose args.json has other values under ``data``, or none where None."""
    shutil.copytree(source.parent, target)
    config = json.loads((target / "args.json").read_text())
    config["data"].update(changes)
    (target / "args.json").write_text(json.dumps(config))
    return target / source.name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_path": "gone"}, "data.train_path=gone: no such folder; give --data"),
        ({"val_path": None}, "data.val_path: missing"),
        ({"dataset": "stl10", "val_path": "gone", "train_path": "/dev/null"}, "as stl10"),
    ],
)
def test_data_of_the_run_that_are_gone(
    runs: dict[str, Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    run = change_config(runs["simclr"], tmp_path / "run", **changes)

    with pytest.raises(UserError, match=message):
        knn.main([str(run), "--num-workers", "0"])


def test_other_images_in_the_folder_of_the_run_are_told_of(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A relative path, which means another folder elsewhere, or a folder that was changed."""
    data = tmp_path / "data"
    shutil.copytree(images, data)
    run = write_run(tmp_path / "run", data, "simclr").parent
    _, trained, *_ = prepare_pretraining(pretrain_config(data, tmp_path))
    config = json.loads((run / "args.json").read_text())
    config["started_from"] = OmegaConf.to_container(trained.started_from)
    (run / "args.json").write_text(json.dumps(config))
    commands: list[tuple[Callable[[list[str]], int], list[str]]] = [
        (knn.main, []),
        (embed.main, ["--out", str(tmp_path / "a.npz"), "--force"]),
        (umap.main, ["--out", str(tmp_path / "a.png"), "--split", "train"]),
    ]
    for changed in (False, True):
        if changed:
            shutil.copy(data / "train/class_0/0.png", data / "train/class_1/more.png")
        for command, options in commands:
            assert command([str(run), "--num-workers", "0", *options]) == 0
            told = f"{data}/train and {data}/val are not those that the run had"
            assert (told in capsys.readouterr().err) == changed


def test_train_and_val_must_have_the_same_classes(
    runs: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    shutil.copytree(images, tmp_path / "data")
    (tmp_path / "data/val/class_4").rename(tmp_path / "data/val/class_9")

    with pytest.raises(UserError, match="class_4"):
        knn.main([str(runs["simclr"]), "--data", str(tmp_path / "data"), "--num-workers", "0"])


def test_a_method_without_weights_for_its_projector_is_refused(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(runs["simclr"].parent, tmp_path / "run")
    content = torch.load(runs["simclr"], weights_only=True)
    del content["state_dict"]["projector.0.weight"]
    torch.save(content, tmp_path / "run" / "run.ckpt")

    with pytest.raises(UserError, match=r"projector\.0\.weight is missing"):
        knn.main([str(tmp_path / "run"), "--features", "projector"])


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        knn.main(["--help"])

    assert caught.value.code == 0
    text = capsys.readouterr().out
    options = "CHECKPOINT --data --k --temperature --distance --features --masked --plain --json"
    assert all(word in text for word in options.split())
