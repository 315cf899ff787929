"""The whole command, with tiny data: failures, kills, and what is not run again."""

import csv
import fcntl
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metamask_solo.__main__ import main
from metamask_solo.benchmark import launch
from metamask_solo.benchmark.plan import read_plan
from metamask_solo.checkpoints.reading import load_backbone
from metamask_solo.data.images import image_loader
from metamask_solo.evaluation.features import extract_features
from metamask_solo.evaluation.knn import knn_accuracy
from metamask_solo.evaluation.linear import linear_probe

pytestmark = pytest.mark.slow
TIMES = ("seconds_per_epoch", "seconds_per_step", "peak_memory_mib")
SIMCLR, METAMASK = {"config": "simclr.yaml"}, {"config": "metamask.yaml"}


def read_csv(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_failing_run_is_reported_and_the_rest_goes_on(
    benchmark_file: Callable[..., Path],
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = {**SIMCLR, "overrides": ["optimizer.batch_size=1000"]}
    launcher = {"name": "joblib", "n_jobs": 2}
    file = benchmark_file(
        methods={"simclr": broken, "metamask": METAMASK}, seeds=[3], launcher=launcher
    )
    out = tmp_path / "out"

    assert main(["benchmark", str(file)]) == 1

    simclr, metamask = read_csv(out)
    assert simclr["status"] == "failed" and simclr["knn"] == ""
    assert "optimizer.batch_size=1000" in simclr["error"]
    assert (metamask["status"], metamask["seed"], metamask["epochs"]) == ("finished", "3", "1")
    printed = capsys.readouterr().out
    assert "simclr, seed 3: FAILED: error: optimizer.batch_size=1000" in printed
    assert "metamask, seed 3: knn" in printed and "of 2: metamask, seed 3" in printed
    assert f"- simclr, seed 3: {simclr['error']}" in (out / "results.md").read_text()
    for name in ("accuracy", "time", "curves"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    # the numbers are those of the checkpoint, masked and plain
    (checkpoint,) = (out / metamask["folder"]).rglob("*.ckpt")
    for masked, ending in ((True, ""), (False, "_plain")):
        backbone, read = load_backbone(checkpoint, masked)
        train, val = (
            extract_features(backbone, image_loader(images / split, read.config))
            for split in ("train", "val")
        )
        expected = {
            "knn": knn_accuracy(*train, *val)[0],
            "linear": linear_probe(*train, *val).accuracy,
        }
        assert {name: float(metamask[f"{name}{ending}"]) for name in expected} == expected
    # all that the run's optimiser trains: neither statistics nor the mask
    other = ("running_mean", "running_var", "num_batches_tracked", "mask.logits", "_extra_state")
    sizes = [t.numel() for name, t in read.state_dict.items() if not name.endswith(other)]
    assert int(metamask["parameters"]) == sum(sizes)

    # mended: the failed run would be run again, the finished one not
    started: list[str] = []
    monkeypatch.setattr(launch.hydra_app, "run", lambda *a: started.append(a[1][-1]))
    assert main(["benchmark", str(file), "methods.simclr.overrides=[]"]) == 1
    (mended,) = started
    assert mended.startswith("run=runs/simclr/seed-3-") and "," not in mended
    assert mended != f"run={simclr['folder']}"
    assert "2 runs, 1 finished before" in capsys.readouterr().out
    assert main(["benchmark", str(file)]) == 1  # as it was: it is tried again
    assert started[1:] == [f"run={simclr['folder']}"]

    # without running: what is there, and what is missing
    assert main(["benchmark", str(file), "seeds=[3,4]", "--tables-only"]) == 1
    statuses = [(row["method"], row["seed"], row["status"]) for row in read_csv(out)]
    assert statuses == [
        ("simclr", "3", "pending"),
        ("simclr", "4", "pending"),
        ("metamask", "3", "finished"),
        ("metamask", "4", "pending"),
    ]


def test_another_config_is_another_run_and_said(
    benchmark_file: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = benchmark_file(methods={"simclr": SIMCLR}, seeds=[0])
    started: list[list[str]] = []
    monkeypatch.setattr(launch.hydra_app, "run", lambda *a: started.append(a[1]))
    plan = read_plan(file, [])
    launch.execute(plan)
    (run,) = plan.runs
    (run.folder / "result.json").write_text(json.dumps({"metrics": {}}))
    launch.execute(plan)
    assert len(started) == 1
    capsys.readouterr()

    launch.execute(read_plan(file, ["overrides=[optimizer.lr=0.25]"]))

    assert "finished with another config (optimizer.lr: 0.5 then, 0.25 now)" in (
        capsys.readouterr().out
    )
    assert len(started) == 2 and started[1] != started[0]


def wait_for(condition: Callable[[], Any], seconds: float) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise TimeoutError


def is_running(lock: Path) -> bool:
    """Whether a process holds the lock of a run."""
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@pytest.mark.faults
@pytest.mark.resume
def test_a_killed_benchmark_ends_with_the_results_of_a_whole_one(
    benchmark_file: Callable[..., Path], tmp_path: Path
) -> None:
    overrides = ["optimizer.batch_size=6", "scheduler.name=warmup_cosine"]
    overrides += ["+scheduler.warmup_epochs=1", "+method_kwargs.mask={optimizer: adam, lr: 0.1}"]
    file = benchmark_file(
        methods={"metamask": METAMASK},
        seeds=[0],
        epochs=5,
        overrides=overrides,
        keep_checkpoints=False,
    )
    assert main(["benchmark", str(file), f"out={tmp_path / 'whole'}"]) == 0

    parts = tmp_path / "parts"
    command = [sys.executable, "-m", "metamask_solo", "benchmark", str(file), f"out={parts}"]
    with (tmp_path / "output").open("w") as output:
        killed = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        wait_for(lambda: [*parts.rglob("*ep=1.ckpt"), *parts.rglob("*ep=2.ckpt")], 300)
    finally:
        killed.kill()
        killed.wait()
    (lock,) = parts.rglob("lock")
    wait_for(lambda: not is_running(lock), 10)  # the run's own process did not live on
    assert not list(parts.rglob("result.json"))

    assert main(["benchmark", str(file), f"out={parts}"]) == 0

    assert "resuming from" in next(parts.rglob("log.txt")).read_text()
    assert len(list(parts.rglob("args.json"))) == 1
    assert not list(parts.rglob("*.ckpt"))
    tables = [read_csv(tmp_path / "whole"), read_csv(parts)]
    for rows in tables:
        for row in rows:
            assert all(float(row.pop(name)) > 0 for name in TIMES)
    assert tables[0] == tables[1]
    curves = [
        json.loads(next((tmp_path / n).rglob("result.json")).read_text())["curve"]
        for n in ("whole", "parts")
    ]
    assert [epoch for epoch, _ in curves[0]] == list(range(1, 6))
    assert curves[0] == curves[1]
