"""Where an epoch's time goes: parts that add up, each transform by name, nothing left behind."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf
from runs import pretrain_config

from metamask_solo.__main__ import main
from metamask_solo.benchmark import profiling
from metamask_solo.benchmark.profiling import Parts, Profile, profile, table, time_transforms
from metamask_solo.errors import UserError


def test_parts_count_for_themselves_and_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0, 21.0, 28.0])
    monkeypatch.setattr(profiling, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    parts = Parts()
    with parts.part("outer"), parts.part("inner"):
        pass
    with parts.part("inner"):
        pass
    found = parts.finish()
    assert found == {"rest": 1.0 + 5.0 + 7.0, "outer": 2.0 + 4.0, "inner": 3.0 + 6.0}


def test_transforms_keep_what_they_do(images: Path, tmp_path: Path) -> None:
    import torch

    from metamask_solo.training.pretraining import prepare_pretraining

    cfg = pretrain_config(images, tmp_path, method="simclr")
    cfg.method_kwargs = {"proj_hidden_dim": 16, "proj_output_dim": 16, "temperature": 0.2}
    dataset: Any = prepare_pretraining(cfg)[2].dataset
    _, before, _ = dataset[(0, 5)]
    parts = Parts()
    dataset.transform = time_transforms(dataset.transform, parts)
    _, after, _ = dataset[(0, 5)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert {"RandomResizedCrop", "ToTensor", "Normalize"} <= parts.calls.keys()
    assert parts.calls["RandomResizedCrop"] == 2


@pytest.mark.parametrize("method", ["metamask", "simclr"])
def test_an_epoch_by_part(method: str, images: Path, tmp_path: Path, capsys: Any) -> None:
    cfg = pretrain_config(images, tmp_path / "runs", method=method)
    if method == "simclr":
        cfg.method_kwargs = {"proj_hidden_dim": 16, "proj_output_dim": 16, "temperature": 0.2}
    cfg.optimizer.batch_size = 4
    file = tmp_path / "run.yaml"
    file.write_text(OmegaConf.to_yaml(cfg))
    out = tmp_path / "profile.json"
    assert main(["profile", str(file), "seed=3", "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["steps"] == 4 and report["images"] == 16
    parts = report["seconds"]
    expected = {"decode", "collate", "forward", "backward", "optimiser", "checkpoint", "rest"}
    assert expected <= parts.keys() and min(parts.values()) >= 0
    assert ("mask update" in parts) == (method == "metamask")
    # of the four steps that are counted, the first batch's images were read before
    assert report["calls"]["decode"] == 16 and report["calls"]["forward"] == 4
    printed = capsys.readouterr().out
    assert all(name in printed for name in expected) and "100.0%" in printed
    assert table(Profile(**report)) in printed
    assert not (tmp_path / "runs").exists()


def test_what_cannot_be_profiled_is_said(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        profile(tmp_path / "gone.yaml", [])
    file = tmp_path / "run.yaml"
    file.write_text(OmegaConf.to_yaml(pretrain_config(images, tmp_path / "runs")))
    with pytest.raises(UserError, match="--steps=0"):
        profile(file, [], steps=0)
    with pytest.raises(UserError, match="the epoch has 1 step"):
        profile(file, ["optimizer.batch_size=20"])
