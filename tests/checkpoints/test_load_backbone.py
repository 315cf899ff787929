"""load_backbone with a config of the caller's."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from metamask_solo import load_backbone
from metamask_solo.errors import UserError
from metamask_solo.hosts import build_backbone

CONFIG = {"method": "simclr", "backbone": {"name": "resnet18"}, "data": {"dataset": "custom"}}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without a config beside it."""
    file = tmp_path_factory.mktemp("run") / "a.ckpt"
    state = build_backbone(OmegaConf.create(CONFIG)).state_dict()
    torch.save({"state_dict": {f"backbone.{k}": v for k, v in state.items()}}, file)
    return file


@pytest.mark.parametrize("config", [{"backbone": {"name": "resnet18"}}, OmegaConf.create(CONFIG)])
def test_a_dictionary_does(path: Path, config: object) -> None:
    backbone, _ = load_backbone(path, config=config)  # type: ignore[arg-type]
    assert backbone(torch.randn(2, 3, 32, 32)).shape == (2, 512)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "args.json: missing"),
        ("resnet18", "config='resnet18': must be a mapping, such as"),
        ({"backbone": "resnet18"}, "backbone.name=None"),
        ({"backbone": {"name": "alexnet"}}, "backbone.name=alexnet"),
    ],
)
def test_another_config_is_refused(path: Path, config: object, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_backbone(path, config=config)  # type: ignore[arg-type]
