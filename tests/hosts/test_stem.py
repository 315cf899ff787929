"""The 3×3 stem on data that are not CIFAR."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints_of_runs import write_run
from runs import pretrain_config

from metamask_solo.checkpoints.exporting import fold_checkpoint
from metamask_solo.checkpoints.reading import load_backbone
from metamask_solo.hosts import build_method, complete_pretrain_config


def shape(backbone: Any) -> tuple[Any, ...]:
    conv, pool = backbone.conv1, backbone.maxpool
    return conv.kernel_size, conv.stride, conv.padding, type(pool).__name__


@pytest.mark.parametrize("method", ["metamask", "byol"])
def test_it_is_the_one_that_cifar_gets(method: str, images: Path) -> None:
    def backbones(dataset: str, stem: str | None) -> list[Any]:
        cfg = pretrain_config(images, images, method, data__dataset=dataset, backbone__stem=stem)
        cfg = complete_pretrain_config(cfg)
        model = build_method(cfg)
        assert cfg.data.dataset == dataset
        names = ("backbone", "encoder", "momentum_backbone", "momentum_encoder")
        return [getattr(model, name) for name in names if name in dict(model.named_children())]

    wanted, of_cifar = backbones("custom", "3x3"), backbones("cifar10", None)
    standard, against = backbones("custom", None), backbones("cifar10", "standard")
    assert len(wanted) == (2 if method == "byol" else 1)
    assert {shape(b) for b in wanted} == {shape(b) for b in of_cifar}
    assert {shape(b) for b in standard} == {shape(b) for b in against}
    assert shape(wanted[0])[0] == (3, 3) != shape(standard[0])[0]
    assert all(torch.equal(b.conv1.weight, wanted[0].conv1.weight) for b in wanted)  # the teacher


def test_what_reads_a_run_takes_its_stem(images: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", images, backbone__stem="3x3").parent
    x = torch.randn(2, 3, 32, 32)
    backbone, checkpoint = load_backbone(run)
    assert shape(backbone.backbone)[0] == (3, 3)
    folded, _ = load_backbone(fold_checkpoint(run, tmp_path / "folded").path)
    torch.testing.assert_close(folded(x), backbone(x), rtol=1e-4, atol=1e-5)

    # a probe's config tells nothing of the stem: the weights do
    assert checkpoint.config is not None
    config = checkpoint.config.copy()
    assert config.backbone.pop("stem") == "3x3"
    assert shape(load_backbone(run, config=config)[0].backbone)[0] == (3, 3)
