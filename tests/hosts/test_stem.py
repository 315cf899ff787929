"""The 3×3 stem on data that are not CIFAR."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints_of_runs import write_run
from runs import pretrain_config

from metamask_solo.__main__ import main
from metamask_solo.checkpoints.exporting import fold_checkpoint
from metamask_solo.checkpoints.reading import load_backbone
from metamask_solo.errors import UserError
from metamask_solo.hosts import build_method, complete_pretrain_config
from metamask_solo.training.config import read_pretraining_config

BYOL = {"proj_hidden_dim": 16, "proj_output_dim": 8, "pred_hidden_dim": 16}


def built(images: Path, method: str, **changes: Any) -> Any:
    cfg = pretrain_config(images, images, method, **changes)
    if method == "byol":
        cfg.method_kwargs = BYOL
    cfg = complete_pretrain_config(cfg)
    dataset = cfg.data.dataset
    model = build_method(cfg)
    assert cfg.data.dataset == dataset
    return model


def shape(backbone: Any) -> tuple[Any, ...]:
    conv, pool = backbone.conv1, backbone.maxpool
    return conv.kernel_size, conv.stride, conv.padding, type(pool).__name__


@pytest.mark.parametrize("method", ["metamask", "byol"])
def test_it_is_the_one_that_cifar_gets(method: str, images: Path) -> None:
    wanted = built(images, method, backbone__stem="3x3")
    of_cifar = built(images, method, data__dataset="cifar10")
    standard = built(images, method)

    def backbones(model: Any) -> list[Any]:
        names = ("backbone", "encoder", "momentum_backbone", "momentum_encoder")
        return [getattr(model, name) for name in names if name in dict(model.named_children())]

    assert [shape(b) for b in backbones(wanted)] == [shape(b) for b in backbones(of_cifar)]
    assert shape(backbones(wanted)[0])[0] == (3, 3)
    assert [shape(b) for b in backbones(standard)] != [shape(b) for b in backbones(of_cifar)]
    assert len(backbones(wanted)) == (2 if method == "byol" else 1)
    first = [b.conv1.weight for b in backbones(wanted)]
    assert all(torch.equal(weight, first[0]) for weight in first)  # the teacher's start
    against = built(images, method, data__dataset="cifar10", backbone__stem="standard")
    assert shape(backbones(against)[0]) == shape(backbones(standard)[0])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    checkpoint = write_run(tmp_path_factory.mktemp("runs") / "run", images, backbone__stem="3x3")
    return checkpoint.parent


def test_what_reads_a_run_takes_its_stem(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = torch.randn(2, 3, 32, 32)
    backbone, checkpoint = load_backbone(run)
    assert shape(backbone.backbone)[0] == (3, 3)
    assert checkpoint.config is not None and checkpoint.config.backbone.stem == "3x3"

    folded, _ = load_backbone(fold_checkpoint(run, tmp_path / "folded").path, masked=False)
    torch.testing.assert_close(folded(x), backbone(x), rtol=1e-4, atol=1e-5)

    assert main(["fold", "--timm", str(run), str(tmp_path / "for-timm")]) == 0
    hint = 'open it: import metamask_solo.checkpoints.timm_stems; timm.create_model("local-dir:'
    assert hint in capsys.readouterr().out


def test_a_config_without_the_key_reads_it_too(run: Path) -> None:
    """A probe's config tells nothing of the stem: the weights do."""
    _, checkpoint = load_backbone(run)
    assert checkpoint.config is not None
    config = checkpoint.config.copy()
    del config.backbone["stem"]
    backbone, _ = load_backbone(run, config=config)
    assert shape(backbone.backbone)[0] == (3, 3)


def test_only_a_resnet_has_one(images: Path) -> None:
    cfg = pretrain_config(images, images, backbone__stem="3x3", backbone__name="vit_tiny")
    with pytest.raises(UserError, match="only a ResNet has one"):
        read_pretraining_config(cfg)
