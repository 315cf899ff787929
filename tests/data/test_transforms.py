"""Transforms of evaluation and probes: the numbers of solo-learn and timm, at every size."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from runs import pretrain_config
from torchvision import transforms

from metamask_solo.data.transforms import (
    complete_image_settings,
    evaluation_transform,
    image_settings,
    linear_training_transform,
    timm_image_config,
)
from metamask_solo.hosts import CLASSES, dataset_transforms


def config(dataset: str, size: int | None = None, **overrides: Any) -> DictConfig:
    cfg = pretrain_config(Path("data"), Path("runs"), data__dataset=dataset, **overrides)
    cfg.augmentations[0].crop_size = size
    return cfg


def photo(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.mark.parametrize("dataset", ["custom", "cifar10", "imagenet"])
def test_timm_makes_the_same_of_an_image_at_every_size(dataset: str) -> None:
    cfg, image = config(dataset), photo(311, 207)
    for size in range(32, 513):
        cfg.augmentations[0].crop_size = size
        ours: Any = evaluation_transform(cfg)
        data = timm.data.resolve_data_config({}, pretrained_cfg=timm_image_config(cfg))
        theirs = timm.data.create_transform(**data)
        (_, resize, crop, *_), (their_resize, their_crop, *_) = ours.transforms, theirs.transforms
        assert resize.size == their_resize.size
        assert resize.interpolation == their_resize.interpolation
        assert tuple(crop.size) == tuple(their_crop.size) == (size, size)
        if size in (32, 96, 97, 224, 443, 512):
            assert torch.equal(ours(image), theirs(image))


@pytest.mark.parametrize("dataset", CLASSES)
def test_at_its_own_size_a_data_set_is_as_in_solo_learn(dataset: str) -> None:
    size = {"cifar10": 32, "cifar100": 32, "stl10": 96}.get(dataset, 300)
    image = photo(size, size)
    train, val = dataset_transforms(dataset)
    assert torch.equal(evaluation_transform(config(dataset))(image), val(image))
    if size < 300:
        packed = OmegaConf.create({"data": {"dataset": dataset}})
        draws = []
        for transform in (train, linear_training_transform(packed)):
            torch.manual_seed(0)
            draws.append(transform(image))
        assert torch.equal(*draws)


def test_a_strip_is_cut_before_it_is_scaled() -> None:
    transform: Any = evaluation_transform(config("custom", 224))
    assert transform(photo(2, 20_000)).shape == (3, 224, 224)
    whole = transforms.Compose(transform.transforms[1:])
    assert torch.equal(transform(photo(20, 320)), whole(photo(20, 320)))


def test_a_probe_has_the_settings_of_its_run() -> None:
    run = config("custom", 64, data__background="black")
    run.augmentations[0].update({"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]})
    probe = OmegaConf.create({"data": {"dataset": "custom", "augmentations": {"crop_size": 48}}})
    complete_image_settings(probe, run)
    settings = image_settings(probe)
    assert (settings.size, settings.mean, settings.std) == (48, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (settings.crop_min_scale, settings.horizontal_flip) == (0.5, 0.5)
    assert probe.data.background == "black"
    crop, flip, *_ = linear_training_transform(probe).transforms  # type: ignore[attr-defined]
    assert (crop.size, crop.scale, flip.p) == ((48, 48), (0.5, 1.0), 0.5)
    probe.data.augmentations.crop_min_scale = 0.9  # that of a fine-tuned run is its own
    again = OmegaConf.create({"data": {"dataset": "custom"}})
    complete_image_settings(again, probe)
    assert image_settings(again).crop_min_scale == 0.9


def test_a_probe_of_large_crops_of_small_images_has_large_crops() -> None:
    for run, size in ((config("cifar10", 224), 224), (None, 32)):
        probe = OmegaConf.create({"data": {"dataset": "cifar10"}})
        complete_image_settings(probe, run)
        assert image_settings(probe).size == size
