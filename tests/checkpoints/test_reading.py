"""Checkpoints of other scripts: containers of settings, prefixes of wrappers, the newest one."""

import contextlib
import importlib
import json
import os
import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from checkpoints_of_runs import write_run
from omegaconf import OmegaConf

from metamask_solo.checkpoints.reading import LIGHTNINGS, load_backbone, load_raw, newest_whole
from metamask_solo.errors import UserError


@pytest.fixture
def run(images: Path, tmp_path: Path) -> Path:
    return write_run(tmp_path / "simclr", images, "simclr")


def save(path: Path, **changes: Any) -> Path:
    torch.save({**load_raw(path), **changes}, path)
    return path


def test_containers_of_settings_are_read(run: Path) -> None:
    config = {"a": 1, "b": [0.5, True, "x", None], "c": {"d": {"e": [1, {"f": 2}]}}}
    save(run, hyper_parameters=OmegaConf.create(config), plain={"cfg": OmegaConf.create([1, 2])})
    assert OmegaConf.to_container(load_raw(run)["hyper_parameters"]) == config
    load_backbone(run)


def test_lightnings_container_is_read(run: Path) -> None:
    pytest.importorskip("lightning_utilities")
    from metamask_solo.hosts import pl

    module = pl.LightningModule()
    module.save_hyperparameters({"lr": 0.1})
    save(run, hyper_parameters=module.hparams)
    assert load_raw(run)["hyper_parameters"]["lr"] == 0.1


@pytest.mark.parametrize("module", LIGHTNINGS)
def test_the_container_of_every_lightning_is_read(
    module: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.suppress(ImportError):
        importlib.import_module(module)
    kind = type("AttributeDict", (dict,), {"__module__": module})
    with monkeypatch.context() as patch:  # as if that release had written it
        patch.setitem(sys.modules, module, sys.modules.get(module) or ModuleType(module))
        patch.setattr(sys.modules[module], "AttributeDict", kind, raising=False)
        save(run, hyper_parameters=kind(lr=0.1))
    assert load_raw(run)["hyper_parameters"]["lr"] == 0.1


class Evil:
    """What must never be called."""

    def __reduce__(self) -> Any:
        return os.system, ("false",)


def test_what_could_run_code_is_named(run: Path) -> None:
    save(run, more=Evil())
    with pytest.raises(UserError, match=r"other than tensors and plain data \(\w+\.system\)"):
        load_raw(run)
    assert pickle  # the format that is refused


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_dropped(prefix: str, run: Path) -> None:
    wanted, _ = load_backbone(run)
    state = load_raw(run)["state_dict"]
    save(run, state_dict={prefix + name: tensor for name, tensor in state.items()})
    found, _ = load_backbone(run)
    for (name, a), b in zip(wanted.state_dict().items(), found.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_compiled_backbone_and_a_query_encoder_are_backbones(run: Path) -> None:
    state = load_raw(run)["state_dict"]
    for new in ("backbone._orig_mod.", "encoder_q."):
        renamed = {}
        for name, tensor in state.items():
            head, _, tail = name.partition(".")
            renamed[new + tail if head in ("encoder", "backbone") else name] = tensor
        save(run, state_dict=renamed)
        load_backbone(run)


def test_the_newest_has_the_most_steps(run: Path) -> None:
    later = run.with_name("a-later.ckpt")
    torch.save({**load_raw(run), "global_step": 7}, later)
    os.utime(later, (1, 1))  # copied, with another time
    assert newest_whole(run.parent) == later


def test_a_folder_above_says_where_checkpoints_are(run: Path, tmp_path: Path) -> None:
    deep = tmp_path / "benchmark" / "seed-0" / "training" / "simclr"
    deep.mkdir(parents=True)
    with pytest.raises(UserError, match=r"no whole checkpoint \(\*\.ckpt\)$"):
        newest_whole(deep.parents[1])
    os.link(run, deep / "last.ckpt")
    with pytest.raises(UserError, match=f"no whole checkpoint .*; look in {deep}$"):
        newest_whole(deep.parents[1])


def test_a_damaged_config_of_another_run_is_no_matter(run: Path) -> None:
    (run.parent / "args.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError, match="args.json: not valid JSON"):
        load_backbone(run)
    config = json.dumps([1])
    (run.parent / "args.json").write_text(config)
    with pytest.raises(UserError, match="args.json"):
        load_backbone(run)
