"""A run that is killed at any moment, or asked to stop, and continued, ends as if it never was."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fragile_runs import EPOCHS, MOMENTS, STEPS, SignalAt, fragile_config, run
from omegaconf import OmegaConf
from runs import train

from metamask_solo.checkpoints.reading import load_raw
from metamask_solo.errors import UserError
from metamask_solo.training.resume import checkpoint_to_resume

KILLS = 20


def final_state(out: Path) -> dict[str, Any]:
    """The last checkpoint of the one run in a folder."""
    (folder,) = (out / "metamask").iterdir()
    assert (folder / "finished.json").is_file()
    assert not list(folder.glob(".*")), "a temporary file was left"
    (checkpoint,) = folder.glob("*.ckpt")  # keep_prev is off
    return load_raw(checkpoint)


def assert_same_end(out: Path, unbroken: dict[str, Any]) -> None:
    state = final_state(out)
    assert state["global_step"] == unbroken["global_step"] == EPOCHS * STEPS
    assert state["state_dict"].keys() == unbroken["state_dict"].keys()
    for name, tensor in unbroken["state_dict"].items():
        assert torch.equal(state["state_dict"][name], tensor), name
    for own, other in (
        (state["optimizer_states"][0], unbroken["optimizer_states"][0]),
        (state["metamask"]["mask_optimizer"], unbroken["metamask"]["mask_optimizer"]),
    ):
        assert str(own) == str(other)  # prints tensors in part; weights were compared in full


@pytest.fixture(scope="module")
def unbroken(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("unbroken")
    assert run(out / "log.txt", fragile_config(images, out / "runs")) == 0
    (summary,) = out.rglob("finished.json")
    seconds = EPOCHS * json.loads(summary.read_text())["seconds_per_epoch"]
    return final_state(out / "runs") | {"seconds": seconds}


def survives(kill: int, images: Path, tmp_path: Path, unbroken: dict[str, Any]) -> str:
    """Kills a run at the moment that ``kill`` stands for, and continues it; tells the moment."""
    rng = random.Random(kill)
    cfg = fragile_config(images, tmp_path / "runs")
    moment = rng.choice([*MOMENTS, "any time"])
    if moment == "any time":
        share = rng.uniform(0.0, 0.8)

        def after_a_while(process: Any) -> None:
            while process.is_alive() and not list((tmp_path / "runs").glob("*/*/args.json")):
                time.sleep(0.005)  # that file is written when training starts
            process.join(share * unbroken["seconds"])
            process.kill()

        code = run(tmp_path / "first.txt", cfg, meanwhile=after_a_while)
        moment = f"after {share:.0%} of the time"
    else:
        n = rng.randint(1, MOMENTS[moment])
        code = run(tmp_path / "first.txt", cfg, SignalAt(moment, n))
        moment = f"{moment} {n}"
    assert code == -signal.SIGKILL, f"{moment}: {(tmp_path / 'first.txt').read_text()}"
    saved = list((tmp_path / "runs").glob("*/*/*.ckpt"))
    assert run(tmp_path / "second.txt", cfg) == 0, (tmp_path / "second.txt").read_text()
    printed = (tmp_path / "second.txt").read_text()
    if saved:
        newest = max(saved, key=lambda path: path.stat().st_mtime if path.exists() else 0)
        assert "resuming from" in printed, newest
    else:  # nothing was saved by then, so it began anew, in another folder
        for folder in (tmp_path / "runs" / "metamask").iterdir():
            if not (folder / "finished.json").exists():
                folder.rename(tmp_path / "abandoned")
    assert_same_end(tmp_path / "runs", unbroken)
    return moment


@pytest.mark.parametrize("kill", [1, 2, 3])
def test_a_killed_run_ends_like_an_unbroken_one(
    kill: int, images: Path, tmp_path: Path, unbroken: dict[str, Any]
) -> None:
    print(survives(kill, images, tmp_path, unbroken))


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_twenty_killed_runs_end_like_an_unbroken_one(
    images: Path, tmp_path: Path, unbroken: dict[str, Any]
) -> None:
    moments = []
    for kill in range(100, 100 + KILLS):
        folder = tmp_path / str(kill)
        folder.mkdir()
        moments.append(survives(kill, images, folder, unbroken))
        for checkpoint in folder.rglob("*.ckpt"):
            checkpoint.unlink()
    print(f"{len(moments)} kills survived of {KILLS}: {', '.join(moments)}")


def test_a_run_killed_after_its_last_checkpoint_is_finished(
    images: Path, tmp_path: Path, unbroken: dict[str, Any]
) -> None:
    cfg = fragile_config(images, tmp_path / "runs")
    assert run(tmp_path / "first.txt", cfg, SignalAt("renamed", EPOCHS)) == -signal.SIGKILL
    assert run(tmp_path / "second.txt", cfg) == 0
    assert_same_end(tmp_path / "runs", unbroken)
    (summary,) = tmp_path.rglob("finished.json")
    assert {"val_acc1", "val_loss"} <= json.loads(summary.read_text())["metrics"].keys()


@pytest.mark.parametrize(
    "number, moment, n, batches",
    [
        (signal.SIGUSR1, "step", 3, "batch 1"),  # in the second epoch, after the first of two steps
        (signal.SIGTERM, "hook", 4, ""),  # in the last step of the second epoch
        (signal.SIGTERM, "validation", 1, ""),
    ],
)
def test_a_signal_saves_and_stops(
    number: signal.Signals,
    moment: str,
    n: int,
    batches: str,
    images: Path,
    tmp_path: Path,
    unbroken: dict[str, Any],
) -> None:
    # without the signal, the second epoch would not be saved
    cfg = fragile_config(images, tmp_path / "runs", checkpoint__frequency=2)
    assert run(tmp_path / "first.txt", cfg, SignalAt(moment, n, number)) == 128 + number
    (checkpoint,) = (tmp_path / "runs").rglob("*.ckpt")
    last_line = (tmp_path / "first.txt").read_text().splitlines()[-1]
    assert last_line.startswith(f"stopped by {number.name} in epoch")
    assert f"the last checkpoint is {checkpoint}; the same command continues" in last_line
    assert load_raw(checkpoint)["global_step"] == {"step": 3, "hook": 4, "validation": 2}[moment]
    assert run(tmp_path / "second.txt", cfg) == 0
    printed = (tmp_path / "second.txt").read_text()
    assert f"resuming from {checkpoint} (epoch" in printed
    assert ("after batch" in printed) == bool(batches) and batches in printed
    assert_same_end(tmp_path / "runs", unbroken)


def test_sigterm_ends_the_command_with_143(images: Path, tmp_path: Path) -> None:
    """The real command line in a real process, told to stop as soon as it trains."""
    cfg = fragile_config(images, tmp_path / "runs", optimizer__batch_size=4)
    cfg.max_epochs = 2
    (tmp_path / "run.yaml").write_text(OmegaConf.to_yaml(cfg))
    command = [sys.executable, "-m", "metamask_solo", "pretrain"]
    command += ["--config-path", str(tmp_path), "--config-name", "run.yaml"]
    process = subprocess.Popen(
        [*command, "hydra.run.dir=.", "hydra.output_subdir=null"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not list(tmp_path.glob("runs/*/*/args.json")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    assert "Traceback" not in errors
    line = errors.splitlines()[-1]
    assert line.startswith("metamask-solo pretrain: error: stopped by SIGTERM in epoch ")
    (checkpoint,) = (tmp_path / "runs").rglob("*.ckpt")
    steps = load_raw(checkpoint)["global_step"]
    assert 1 <= steps < 10 and f"after step {steps};" in line
    model, _ = train(cfg)
    assert model.trainer.global_step == 10


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "garbage"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    damage: str,
    resumable: tuple[Any, list[Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cfg, (older, newer) = resumable
    content = bytearray(newer.read_bytes())
    try:
        if damage == "truncated":
            newer.write_bytes(content[: len(content) - 1000])
        elif damage == "flipped":  # one bit in the middle of the weights
            content[len(content) // 2] ^= 1
            newer.write_bytes(content)
        else:
            newer.write_bytes(b"" if damage == "empty" else os.urandom(1000))
        os.utime(newer, (newer.stat().st_mtime + 10,) * 2)
        root = Path(cfg.checkpoint.dir) / "metamask"
        assert checkpoint_to_resume(cfg, root) == older
        assert f"skipped: {newer}" in capsys.readouterr().out
        cfg.resume_from_checkpoint, cfg.auto_resume.enabled = str(newer), False
        with pytest.raises(UserError, match="damaged"):
            checkpoint_to_resume(cfg, root)
    finally:
        cfg.resume_from_checkpoint, cfg.auto_resume.enabled = None, True
        content[len(content) // 2] ^= damage == "flipped"
        newer.write_bytes(content)


@pytest.fixture(scope="module")
def resumable(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[Path]]:
    """The completed config and both checkpoints of a run that keeps them, killed before its end."""
    out = tmp_path_factory.mktemp("resumable")
    cfg = fragile_config(images, out / "runs", checkpoint__keep_prev=True)
    assert run(out / "log.txt", cfg, SignalAt("step", 2 * STEPS + 1)) == -signal.SIGKILL
    checkpoints = sorted((out / "runs").rglob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    assert len(checkpoints) == 2
    cfg = OmegaConf.create(json.loads((checkpoints[0].parent / "args.json").read_text()))
    return cfg, checkpoints
