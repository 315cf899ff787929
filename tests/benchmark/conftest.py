"""Tiny benchmarks: noise images, pretraining configs of a few steps, and a file naming them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf
from runs import pretrain_config

from metamask_solo.benchmark import launch, worker

KNN = {"enabled": True, "k": 3, "distance_func": "cosine"}
HEADS = {"proj_hidden_dim": 16, "proj_output_dim": 16}


@pytest.fixture(autouse=True)
def one_thread_in_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def benchmark_file(images: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes simclr.yaml, metamask.yaml and bench.yaml; arguments replace keys of the last."""

    def write(**keys: Any) -> Path:
        for method in ("simclr", "metamask"):
            cfg = pretrain_config(images, tmp_path / "elsewhere", method, knn_eval=KNN)
            if method == "simclr":
                cfg.method_kwargs = {**HEADS, "temperature": 0.2}
            OmegaConf.save(cfg, tmp_path / f"{method}.yaml")
        content = {
            "name": "tiny",
            "out": str(tmp_path / "out"),
            "data": {"train_path": str(images / "train"), "val_path": str(images / "val")},
            "methods": {
                "simclr": {"config": "simclr.yaml"},
                "metamask": {"config": "metamask.yaml"},
            },
            "seeds": [0, 1],
            "epochs": 1,
            **keys,
        }
        path = tmp_path / "bench.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write


@pytest.fixture
def train_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs, and those of a forecast, are made in this process, but not those of a launcher's."""
    monkeypatch.setattr(launch, "_train", lambda folder: worker.main([str(folder)]))


@pytest.fixture
def in_this_process(train_here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are made in this process, and none beforehand to tell how long they will take."""
    monkeypatch.setattr(launch, "forecast", lambda *_: "")
