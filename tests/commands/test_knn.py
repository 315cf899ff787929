"""The command ``metamask-solo knn``; whose features it reads: test_embed.py."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints_of_runs import read_by_torchvision

from metamask_solo.__main__ import main
from metamask_solo.checkpoints.reading import load_backbone
from metamask_solo.evaluation.features import percent
from metamask_solo.evaluation.knn import knn_hits
from metamask_solo.evaluation.linear import linear_probe


def rows_of(tmp_path: Path, checkpoint: Path, *options: str) -> dict[str, Any]:
    """Runs the command and returns what it wrote."""
    file = tmp_path / "result.json"
    assert main(["knn", str(checkpoint), *options, "--num-workers=0", f"--json={file}"]) == 0
    return json.loads(file.read_text())


def test_a_row_for_each_combination(
    runs: dict[str, Path], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = "--k 1 5 --temperature 0.07 0.2 --distance cosine euclidean --linear"
    result = rows_of(tmp_path, runs["metamask"].parent, *grid.split())

    settings = [(row["distance"], row.get("temperature"), row.get("k")) for row in result["rows"]]
    assert settings == [
        (distance, temperature, k)
        for distance, temperature in (("cosine", 0.07), ("cosine", 0.2), ("euclidean", None))
        for k in (1, 5)
    ] + [("linear", None, None)]
    features: Any = []
    for split in ("train", "val"):
        tensors, labels = read_by_torchvision(images / split)
        with torch.no_grad():
            features += [load_backbone(runs["metamask"])[0](tensors), labels]
    for (distance, temperature, k), row in zip(settings[:-1], result["rows"], strict=False):
        hits = knn_hits(*features, k, distance, temperature)
        assert [row["top1"], row["top5"]] == [percent(correct) for correct in hits]
    correct, c = linear_probe(*features)
    assert (result["rows"][-1]["top1"], result["rows"][-1]["C"]) == (percent(correct), c)
    assert result["masked"] is True

    head, titles, *lines = capsys.readouterr().out.splitlines()
    assert "masked backbone features, 20 training and 10 validation images" in head
    assert titles.split() == ["distance", "temperature", "k", "C", "top1", "top5"]
    assert len({len(line) for line in (titles, *lines)}) == 1
    assert lines[4].split()[:3] == ["euclidean", "-", "1"]


def test_unequal_classes_get_the_mean_over_classes(
    runs: dict[str, Path], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(shutil.copytree(images, tmp_path / "data"))
    for label in range(1, 5):
        (data / f"val/class_{label}/1.png").unlink()
        for i in range(2, 4):
            (data / f"train/class_{label}/{i}.png").unlink()
    (row,) = rows_of(tmp_path, runs["simclr"], f"--data={data}", "--k=12")["rows"]
    assert row["top1"] == pytest.approx(100 / 3) and row["mean_over_classes"] == 20
    out, err = capsys.readouterr()
    _, titles, line = out.splitlines()
    assert titles.split()[-1] == "mean_over_classes" and line.split()[-1] == "20.00"
    assert "always guessing the largest class" in err and "33.33 %" in err
