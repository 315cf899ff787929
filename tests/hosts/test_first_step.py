"""What a first step needs is checked before any work, for each method."""

from pathlib import Path
from typing import Any

import pytest
import torch
from method_settings import KWARGS
from runs import pretrain_config

from metamask_solo import hosts
from metamask_solo.errors import UserError
from metamask_solo.training.config_checks import NOT_TRAINABLE
from metamask_solo.training.pretraining import check_run, prepare_pretraining

HOST_METHODS = sorted(set(hosts.METHODS) - {*NOT_TRAINABLE, "metamask", "mae"})
WITH_QUEUE = [m for m in HOST_METHODS if "queue_size" in KWARGS[m] and m != "swav"]


def config(method: str, images: Path, small: int = 0, **kwargs: Any) -> Any:
    cfg = pretrain_config(images, images, method)
    cfg.method_kwargs = {"proj_hidden_dim": 16, "proj_output_dim": 10, **KWARGS[method], **kwargs}
    if small:
        pipeline = cfg.augmentations[0].copy()
        pipeline.crop_size, pipeline.num_crops = 16, small
        cfg.augmentations.append(pipeline)
    return cfg


@pytest.mark.parametrize("method", HOST_METHODS)
def test_small_crops_are_used_or_refused(method: str, images: Path) -> None:
    cfg = config(method, images, small=2)
    if method not in hosts.SMALL_CROPS:
        with pytest.raises(UserError, match="augmentations.1.crop_size=16: .* byol, .*simclr"):
            check_run(cfg)
        return
    model, *_ = prepare_pretraining(cfg)
    if method == "swav":
        model.queue_size, model.sk = 0, _Sinkhorn()
    model.eval()  # so that only the loss tells the crops apart
    torch.manual_seed(0)
    crops = [torch.randn(4, 3, size, size) for size in (32, 32, 16, 16)]
    losses = [_loss(model, crops), _loss(model, [*crops[:3], torch.randn(4, 3, 16, 16)])]
    assert losses[0] != losses[1]


class _Sinkhorn:
    """Assignments in the place of those that need a trainer."""

    def __call__(self, scores: torch.Tensor) -> torch.Tensor:
        return scores.softmax(dim=1)


def _loss(model: Any, crops: list[torch.Tensor]) -> float:
    return float(model.training_step((torch.arange(4), crops, torch.tensor([0, 1, 2, 0])), 0))


@pytest.mark.parametrize("method", WITH_QUEUE)
def test_a_queue_that_batches_do_not_divide_is_refused(method: str, images: Path) -> None:
    with pytest.raises(UserError, match="queue_size=45: must be a multiple .* 10; 40 is one"):
        check_run(config(method, images, queue_size=45))


@pytest.mark.parametrize(
    "method, kwargs, message",
    [
        ("swav", {"queue_size": 5}, "queue_size=5: must be 0, or at least 10"),
        ("deepclusterv2", {"num_prototypes": [30]}, "num_prototypes=.30.: at most 20"),
        ("wmse", {"whitening_size": 11}, "whitening_size"),
    ],
)
def test_sizes_that_do_not_go_with_the_batch_are_refused(
    method: str, kwargs: Any, message: str, images: Path
) -> None:
    with pytest.raises(UserError, match=message):
        check_run(config(method, images, **kwargs))


def test_a_wrong_number_of_large_crops_is_refused(images: Path) -> None:
    cfg = config("vicreg", images)
    cfg.augmentations[0].num_crops = 3
    with pytest.raises(UserError, match="augmentations: 3 crops of 32 pixels; vicreg needs 2"):
        check_run(cfg)


def test_a_falling_momentum_is_refused(images: Path) -> None:
    cfg = config("byol", images)
    cfg.momentum = {"base_tau": 0.99, "final_tau": 0.9}
    with pytest.raises(UserError, match="momentum.base_tau=0.99: must be at most final_tau=0.9"):
        check_run(cfg)


def test_a_warm_up_of_dino_longer_than_the_run_is_refused(images: Path) -> None:
    key = "warmup_teacher_temperature_epochs"
    cfg = config("dino", images, **{key: 3})
    with pytest.raises(UserError, match=f"{key}=3: must be at most max_epochs, 1"):
        check_run(cfg)
    del cfg.method_kwargs[key]
    if hosts.DINO_WARMUP:  # the release's own value is longer than this run
        with pytest.raises(UserError, match=f"{key}=50: must be at most max_epochs, 1"):
            check_run(cfg)
    else:
        check_run(cfg)


@pytest.mark.parametrize("backbone, size", [("vit_tiny", 48), ("swin_tiny", 64)])
def test_backbones_are_built_for_the_size_of_the_crops(
    backbone: str, size: int, images: Path
) -> None:
    cfg = config("simclr", images)
    cfg.backbone.name = backbone
    cfg.augmentations[0].crop_size = size
    model, done, *_ = prepare_pretraining(cfg)
    for built in (model.backbone if hasattr(model, "backbone") else model.encoder,):
        assert built(torch.randn(2, 3, size, size)).shape == (2, model.features_dim)
    again = hosts.build_backbone(done)  # as knn, umap, fold and linear do
    assert again(torch.randn(2, 3, size, size)).shape == (2, model.features_dim)


def test_patches_that_do_not_fill_the_image_are_refused(images: Path) -> None:
    cfg = config("simclr", images)
    cfg.backbone.name = "vit_tiny"
    cfg.augmentations[0].crop_size = 50
    with pytest.raises(UserError, match="augmentations.0.crop_size=50: must be a multiple .* 16"):
        check_run(cfg)
