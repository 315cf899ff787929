"""The whole command, with tiny data: failures, signals, and what is not run again."""

import csv
import glob
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import image_loader, write_images
from small_resnet import replace_resnet18, write_module

from metamask_solo.__main__ import main
from metamask_solo.benchmark import launch
from metamask_solo.checkpoints.reading import load_backbone
from metamask_solo.data.split import split_folder
from metamask_solo.evaluation.features import extract_features, percent
from metamask_solo.evaluation.knn import knn_hits
from metamask_solo.evaluation.linear import linear_probe

pytestmark = pytest.mark.slow
TIMES = ("seconds_per_epoch", "seconds_per_step", "peak_memory_mib")
SIMCLR, METAMASK = {"config": "simclr.yaml"}, {"config": "metamask.yaml"}
# a ResNet-18 without its last layer; the 3 × 3 stem has 1,728 weights, the standard one 9,408
PARAMETERS = 11_176_512 - 9408 + 1728


def read_csv(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def accuracies(*splits: torch.Tensor) -> dict[str, float]:
    """Of training features and labels, and those of the validation images."""
    return {"knn": percent(knn_hits(*splits)[0]), "linear": percent(linear_probe(*splits)[0])}


@pytest.mark.usefixtures("train_here")
def test_a_failing_run_is_reported_and_the_rest_goes_on(
    benchmark_file: Callable[..., Path],
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = {**SIMCLR, "overrides": ["optimizer.lr=1e30"]}
    launcher = {"name": "joblib", "n_jobs": 2}
    file = benchmark_file(
        methods={"simclr": broken, "metamask": METAMASK}, seeds=[3], launcher=launcher
    )
    out = tmp_path / "out"
    assert main(["benchmark", str(file)]) == 1

    simclr, metamask = read_csv(out)
    assert simclr["status"] == "failed" and simclr["knn"] == ""
    assert "not finite" in simclr["error"]
    assert (metamask["status"], metamask["seed"], metamask["epochs"]) == ("finished", "3", "1")
    printed = capsys.readouterr().out
    assert re.search(r"2 runs, about \d+ (s|min) here, one after the other\n", printed)
    assert "simclr, seed 3: FAILED: error: step " in printed
    assert "metamask, seed 3: knn" in printed
    assert f"- simclr, seed 3: {simclr['error']}" in (out / "results.md").read_text()
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")

    # the numbers are those of the checkpoint, masked and plain
    (checkpoint,) = (out / metamask["folder"]).rglob("*.ckpt")
    for masked, ending in ((True, ""), (False, "_plain")):
        backbone, read = load_backbone(checkpoint, masked)
        loaders = (image_loader(images / split, read.config) for split in ("train", "val"))
        splits = [tensor for one in loaders for tensor in extract_features(backbone, one)]
        expected = accuracies(*splits)
        assert {name: float(metamask[f"{name}{ending}"]) for name in expected} == expected

    # the failed run is tried again, mended or not; the finished one is not
    monkeypatch.setattr(launch, "forecast", lambda *_: "")
    started: list[str] = []
    monkeypatch.setattr(launch.hydra_app, "run", lambda *a: started.append(a[1][-1]))
    assert main(["benchmark", str(file)]) == 1
    assert "2 runs, 1 finished before" in capsys.readouterr().out
    assert main(["benchmark", str(file), "methods.simclr.overrides=[]"]) == 1
    again, mended = started
    assert again == f"run={simclr['folder']}" != mended
    assert mended.startswith("run=runs/simclr/seed-3-") and "," not in mended


@pytest.mark.usefixtures("in_this_process")
def test_an_untrained_backbone_and_the_pixels_stand_beside_the_methods(tmp_path: Path) -> None:
    folders = write_images(tmp_path / "cifar", classes=10, train=2, val=1)
    keys = [f"data.{split}_path={folders / split}" for split in ("train", "val")]
    keys += ["overrides+=[data.num_workers=0,accelerator=cpu,precision=32]"]
    out = tmp_path / "out"
    assert main(["benchmark", "cifar10", *keys, "only=[]", "seeds=[3]", f"out={out}"]) == 0

    random, pixels = read_csv(out)
    assert (random["method"], pixels["method"]) == ("random", "pixels")
    assert int(random["parameters"]) == PARAMETERS  # the stem of the methods
    report = (out / "results.md").read_text()
    assert "| untrained backbone | 1 |" in report and "| pixels | 1 |" in report

    # the pixels' accuracies, from the images themselves
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    tensors = []
    for split in ("train", "val"):
        files = sorted((folders / split).rglob("*.png"))
        values = np.stack([np.asarray(Image.open(file)) / 255 for file in files])
        scaled = ((values - mean) / std).transpose(0, 3, 1, 2).reshape(len(files), -1)
        labels = [int(file.parent.name.removeprefix("class_")) for file in files]
        tensors += [torch.from_numpy(scaled).float(), torch.tensor(labels)]
    for name, expected in accuracies(*tensors).items():
        assert float(pixels[name]) == pytest.approx(expected)


@pytest.mark.usefixtures("in_this_process")
def test_without_labels_rankme_is_compared_and_called_no_accuracy(
    images: Path,
    tmp_path: Path,
    benchmark_file: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    flat = split_folder(images / "train", tmp_path / "flat", 0.2, flat=True)
    data = {"train_path": str(flat.out / "train"), "no_labels": True}
    file = benchmark_file(data=data, seeds=[0], untrained=["random"])

    assert main(["benchmark", str(file), "only=[metamask]"]) == 0

    printed = capsys.readouterr().out
    assert "It is no accuracy" in printed and "RankMe, no mask" in printed
    random, metamask = read_csv(tmp_path / "out")
    assert "knn" not in metamask and 1 < float(metamask["rankme_plain"]) <= 16  # of sixteen images
    assert 1 < float(random["rankme"]) <= 16


@pytest.mark.usefixtures("in_this_process")
def test_a_stopped_benchmark_saves_and_ends_with_the_results_of_a_whole_one(
    benchmark_file: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The stopped one in processes of its own, the others in this one."""
    torch.set_num_threads(1)  # as there
    replace_resnet18(monkeypatch.setattr)
    monkeypatch.setenv("PYTHONPATH", write_module(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    overrides = ["optimizer.batch_size=6", "scheduler.name=warmup_cosine"]
    overrides += ["imports=[small]", "log_every_n_steps=1"]
    overrides += ["+scheduler.warmup_epochs=1"]
    overrides += ["+method_kwargs.mask={optimizer: adam, lr: 0.1}"]
    file = benchmark_file(
        methods={"metamask": METAMASK},
        seeds=[0],
        epochs=5,
        overrides=overrides,
        keep_checkpoints=False,
    )
    assert main(["benchmark", str(file), f"out={tmp_path / 'whole'}"]) == 0

    parts, output = tmp_path / "parts", tmp_path / "output"
    command = [sys.executable, "-m", "metamask_solo", "benchmark", str(file), f"out={parts}"]
    with output.open("w") as stream:
        stopped = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True)
    try:
        # rglob fails where a temporary folder goes while it looks
        while not glob.glob(f"{parts}/**/*ep=[12].ckpt", recursive=True):
            assert stopped.poll() is None, output.read_text()
            time.sleep(0.05)
        stopped.terminate()  # the command alone, which passes it on
        assert stopped.wait(300) == 128 + signal.SIGTERM
    finally:
        with suppress(ProcessLookupError):
            os.killpg(stopped.pid, signal.SIGKILL)
    said = output.read_text().splitlines()[-1]
    assert "error: stopped by SIGTERM" in said and "the same command continues" in said
    (log,) = parts.rglob("log.txt")
    assert "error: stopped by SIGTERM in epoch" in log.read_text()
    assert not [*parts.rglob("result.json"), *parts.rglob("failed.json")]

    capsys.readouterr()
    assert main(["benchmark", str(file), f"out={parts}"]) == 0

    assert "resuming from" in capsys.readouterr().out and len(list(parts.rglob("args.json"))) == 1
    assert not list(parts.rglob("*.ckpt"))
    ((whole,), (part,)) = (read_csv(tmp_path / "whole"), read_csv(parts))
    for row in (whole, part):
        assert all(float(row.pop(name)) > 0 for name in TIMES)
        assert float(row.pop("seconds_between_epochs")) >= 0  # too short to be seen, at times
    # an epoch that was entered in its middle has no online kNN
    curves = [{*row.pop("curve").split()} for row in (whole, part)]
    assert whole == part
    assert len(curves[0]) == 5 and len(curves[1]) >= 4 and curves[1] <= curves[0]
