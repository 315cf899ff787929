"""Checkpoints of other scripts and damaged ones: names, containers of settings, args.json."""

import contextlib
import importlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from checkpoints_of_runs import backbone_config, random_backbone, write_run
from omegaconf import OmegaConf

from metamask_solo.__main__ import main
from metamask_solo.checkpoints.reading import (
    LIGHTNINGS,
    config_beside,
    load_backbone,
    load_raw,
    newest_whole,
)
from metamask_solo.data.transforms import image_settings
from metamask_solo.errors import UserError
from metamask_solo.hosts import BACKBONE_PREFIX, RELEASE, build_backbone


@pytest.fixture
def run(images: Path, tmp_path: Path) -> Path:
    return write_run(tmp_path / "simclr", images, "simclr")


def save(path: Path, **changes: Any) -> None:
    torch.save({**load_raw(path), **changes}, path)


def weights_of(path: Path, **settings: Any) -> dict[str, torch.Tensor]:
    return load_backbone(path, **settings)[0].state_dict()


def renamed(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    """A state whose backbone has another prefix."""
    return {
        prefix + name.removeprefix(BACKBONE_PREFIX) if name.startswith(BACKBONE_PREFIX) else name: w
        for name, w in state.items()
    }


PREFIXES = ["backbone.", "encoder.", "encoder_q.", "module.module.backbone.", "backbone.module."]
PREFIXES += ["model.encoder.", "_orig_mod.module.backbone.", "_orig_mod.encoder_q._orig_mod."]


def test_names_of_either_release_of_moco_and_of_wrappers_are_read(run: Path) -> None:
    wanted, state = weights_of(run), load_raw(run)["state_dict"]
    for prefix in PREFIXES:
        save(run, state_dict=renamed(state, prefix))
        read = weights_of(run)
        assert read.keys() == wanted.keys()
        assert all(torch.equal(read[name], wanted[name]) for name in wanted)
    for second in {"backbone.", "encoder.", "encoder_q.", "module.backbone.", "module.encoder."}:
        if second != BACKBONE_PREFIX:  # two networks are named, and none is taken
            save(run, state_dict={**state, **renamed(state, second)})
            with pytest.raises(UserError, match="twice|two networks") as caught:
                load_backbone(run)
            assert all(p in str(caught.value) for p in (BACKBONE_PREFIX, second.split(".")[-2]))


def test_mocos_own_file_is_read(tmp_path: Path) -> None:
    backbone = random_backbone(backbone_config("resnet18"))
    state = {}
    for network in ("q", "k"):
        weights = {name: w + (network == "k") for name, w in backbone.state_dict().items()}
        weights |= {"fc.0.weight": torch.randn(512, 512), "fc.2.weight": torch.randn(128, 512)}
        state |= {f"module.encoder_{network}.{name}": w for name, w in weights.items()}
    state["module.queue"] = torch.randn(128, 16)
    torch.save({"epoch": 200, "arch": "resnet18", "state_dict": state}, tmp_path / "moco.pth.tar")
    read = weights_of(tmp_path / "moco.pth.tar", config={"backbone": {"name": "resnet18"}})
    assert all(torch.equal(read[name], w) for name, w in backbone.state_dict().items())


def test_a_config_of_the_callers(run: Path) -> None:
    flat = {"encoder": "resnet18"}  # what scripts of 1.0.2 write, which is no config
    (run.parent / "args.json").write_text(json.dumps(flat))
    backbone, _ = load_backbone(run, config={"backbone": {"name": "resnet18"}})
    assert backbone(torch.randn(2, 3, 32, 32)).shape == (2, 512)
    wrong: list[tuple[Any, str]] = [
        (None, r"1.0.2's own scripts, .* load_backbone\(\.\.\., config="),
        ({"backbone": "resnet18"}, "backbone.name=None"),
        ({"backbone": {"name": "alexnet"}}, "backbone.name=alexnet"),
        ({"backbone": {"name": "resnet50"}}, "does not fit; first difference at layer1.0.conv1"),
    ]
    for config, words in wrong:
        with pytest.raises(UserError, match=words):
            load_backbone(run, config=config)
    (run.parent / "args.json").unlink()
    with pytest.raises(UserError, match="args.json: missing; it names the backbone"):
        load_backbone(run)


@pytest.mark.skipif(RELEASE == "main", reason="GitHub main has it")
@pytest.mark.parametrize(("key", "method"), [("pretrain_method", "mae"), ("method", "mocov3")])
def test_a_vit_that_only_github_main_builds_is_refused(key: str, method: str) -> None:
    config: Any = OmegaConf.merge(backbone_config("vit_tiny"), {key: method})
    with pytest.raises(UserError, match=f"vit_tiny: that of {method} .*GitHub main has it"):
        build_backbone(config)


DAMAGED = ["null", "[1]", "3", '"text"', '{"backbone": {"na', "\xff", '{"backbone": null}']
DAMAGED += ['{"backbone": {"name": "resnet18"}}', '{"backbone": {"name": "resnet18"}, "data": [1]}']


def test_a_damaged_config_is_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in DAMAGED:
        (run.parent / "args.json").write_bytes(content.encode("latin-1"))
        assert main(["knn", str(run)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "args.json: " in line


class Evil:
    """What must never be called."""

    def __reduce__(self) -> Any:
        return os.system, ("false",)


def test_containers_of_settings_are_read_and_code_is_named(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"a": 1, "b": [0.5, True, "x", None], "c": {"d": {"e": [1, {"f": 2}]}}}
    save(run, hyper_parameters=OmegaConf.create(config), plain={"cfg": OmegaConf.create([1, 2])})
    assert OmegaConf.to_container(load_raw(run)["hyper_parameters"]) == config
    for module in LIGHTNINGS:
        kind = type("AttributeDict", (dict,), {"__module__": module})
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
        with monkeypatch.context() as patch:  # as if that release had written it
            patch.setitem(sys.modules, module, sys.modules.get(module) or ModuleType(module))
            patch.setattr(sys.modules[module], "AttributeDict", kind, raising=False)
            save(run, hyper_parameters=kind(lr=0.1))
        assert load_raw(run)["hyper_parameters"]["lr"] == 0.1
    save(run, more=Evil())
    with pytest.raises(UserError, match=r"other than tensors and plain data \(\w+\.system\)"):
        load_raw(run)


def test_the_size_that_main_linear_fills_in_is_not_used(tmp_path: Path) -> None:
    content: dict[str, Any] = {"backbone": {"name": "resnet18"}}
    content["data"] = {"dataset": "cifar10", "augmentations": {"crop_size": 224}}
    for more, size in (({}, 32), ({"started_from": {}}, 224)):
        (tmp_path / "args.json").write_text(json.dumps({**content, **more}))
        assert image_settings(config_beside(tmp_path)).size == size  # type: ignore[arg-type]


def test_a_mask_without_a_kind_is_not_guessed(images: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", images)
    state = load_raw(run)["state_dict"]
    assert torch.equal(load_backbone(run)[1].mask, torch.sigmoid(state["mask.logits"]))
    state["mask._extra_state"] += 1
    save(run, state_dict=state)
    assert torch.equal(load_backbone(run)[1].mask, state["mask.logits"])  # linear
    del state["mask._extra_state"]
    save(run, state_dict=state)
    with pytest.raises(UserError, match="its mask is of no kind; mask._extra_state must be one of"):
        load_backbone(run)


def test_the_newest_has_the_most_steps(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    later = run.with_name("a-later.ckpt")
    torch.save({**load_raw(run), "global_step": 7}, later)
    os.utime(later, (1, 1))  # copied, with another time
    content = bytearray(later.read_bytes())
    content[len(content) // 2] ^= 1  # torch itself reads it without a word
    run.with_name("damaged.ckpt").write_bytes(content)
    run.with_name("half.ckpt").write_bytes(content[: len(content) // 2])
    assert newest_whole(run.parent) == later
    assert capsys.readouterr().out.count("skipped: ") == 2
    # a folder above says where checkpoints are
    above = tmp_path / "benchmark"
    deep = above / "seed-0" / "training" / "simclr"
    deep.mkdir(parents=True)
    with pytest.raises(UserError, match=r"no whole checkpoint \(\*\.ckpt\)$"):
        newest_whole(above)
    os.link(run, deep / "last.ckpt")
    with pytest.raises(UserError, match=f"no whole checkpoint .*; look in {deep}$"):
        newest_whole(above)
