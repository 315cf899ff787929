"""A whole run in other processes: what each draws, and every way to start them."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from runs import pretrain_config, write_images

from metamask_solo.checkpoints.reading import load_raw

pytestmark = pytest.mark.ddp

# run by Python at its start, in every process: writes down each crop box, and chooses how processes
# start
SITE = """
import multiprocessing, os
from pathlib import Path
from wrapt import when_imported

@when_imported("torchvision.transforms.transforms")
def note_boxes(module):
    own = module.RandomResizedCrop.get_params

    def noted(image, scale, ratio):
        box = own(image, scale, ratio)
        with open(Path("boxes") / f"{os.environ.get('LOCAL_RANK', 0)}.txt", "a") as file:
            print(*box, file=file)
        return box

    module.RandomResizedCrop.get_params = staticmethod(noted)

if os.environ["START_METHOD"]:
    multiprocessing.set_start_method(os.environ["START_METHOD"])
"""
Pretrain = Callable[..., Path]


@pytest.fixture(scope="module")
def pretrain(tmp_path_factory: pytest.TempPathFactory) -> Pretrain:
    """Runs ``pretrain`` on twenty images in a folder of its own, which it returns."""
    images = write_images(tmp_path_factory.mktemp("images"))

    def run(*overrides: str, start: str = "") -> Path:
        out = tmp_path_factory.mktemp("run")
        (out / "boxes").mkdir()
        (out / "sitecustomize.py").write_text(SITE)
        OmegaConf.save(pretrain_config(images, out, num_nodes=1), out / "run.yaml")
        command = ["-m", "metamask_solo", "pretrain", "--config-path", str(out)]
        command += ["--config-name", "run.yaml", "hydra.run.dir=.", "hydra.output_subdir=null"]
        settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(out), "START_METHOD": start}
        done = subprocess.run(
            [sys.executable, *command, *overrides],
            cwd=out,
            env={**os.environ, **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stdout[-3000:]
        return out

    return run


@pytest.fixture(scope="module")
def two_processes(pretrain: Pretrain) -> Path:
    return pretrain("devices=2", "strategy=ddp")


def weights(out: Path) -> dict[str, torch.Tensor]:
    (checkpoint,) = out.glob("*/*/*.ckpt")
    found: dict[str, torch.Tensor] = load_raw(checkpoint)["state_dict"]
    return found


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def boxes(out: Path, rank: int) -> list[str]:
    return (out / "boxes" / f"{rank}.txt").read_text().splitlines()


def test_processes_draw_other_crops(two_processes: Path) -> None:
    first, second = boxes(two_processes, 0), boxes(two_processes, 1)
    assert len(first) == len(second) == 20  # ten images each, two views
    # with the same random numbers, all would be equal
    assert sum(one == other for one, other in zip(first, second, strict=True)) <= 3


@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn", "ddp_fork"])
def test_every_launcher_makes_the_same_run(
    strategy: str, two_processes: Path, pretrain: Pretrain
) -> None:
    again = pretrain("devices=2", f"strategy={strategy}")
    if strategy == "ddp":  # the others' processes bear no rank in their environment
        assert [boxes(again, rank) for rank in (0, 1)] == [
            boxes(two_processes, rank) for rank in (0, 1)
        ]
    assert_same_weights(two_processes, again)


def test_every_start_of_workers_makes_the_same_run(pretrain: Pretrain) -> None:
    plain = pretrain("data.num_workers=0")
    for start in ("spawn", "forkserver"):
        assert_same_weights(plain, pretrain("data.num_workers=1", start=start))
