"""What a probe makes of images: size and normalisation of the run, auto_augment."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints_of_runs import write_run
from omegaconf import DictConfig
from PIL import Image
from runs import image_loader, pretrain_config

from metamask_solo.checkpoints.reading import read_checkpoint
from metamask_solo.training.linear import prepare_probe

MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]


def probe_config(data: Path, checkpoint: Path, **changes: Any) -> DictConfig:
    cfg = pretrain_config(data, checkpoint.parent / "runs", **changes)
    del cfg.augmentations, cfg.method, cfg.method_kwargs, cfg.optimizer.classifier_lr
    cfg.pretrained_feature_extractor = str(checkpoint)
    return cfg


@pytest.fixture(scope="module")
def checkpoint(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a SimCLR run on 32 pixels with a mean of its own."""
    changes = {"augmentations__0__mean": MEAN, "augmentations__0__std": STD}
    changes |= {"augmentations__0__horizontal_flip__prob": 0.0, "data__background": "#010203"}
    folder = tmp_path_factory.mktemp("runs") / "run"
    return write_run(folder, images, "simclr", devices=[0], **changes)


def test_what_the_file_does_not_say_comes_from_the_run(
    images: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, cfg, train, val = prepare_probe(probe_config(images, checkpoint))
    first, _ = val.dataset[0]
    with Image.open(val.dataset.samples[0][0]) as image:
        expected = (np.asarray(image) / 255 - MEAN) / STD
    assert np.abs(first.permute(1, 2, 0).numpy() - expected).max() < 1e-5
    assert train.dataset[0][0].shape == (3, 32, 32)
    settings = cfg.data.augmentations
    assert (settings.crop_size, settings.horizontal_flip, settings.crop_min_scale) == (32, 0.0, 0.5)
    assert "images: 32 x 32 pixels, mean 0.1 0.2 0.3" in capsys.readouterr().err
    loader = image_loader(images / "val", read_checkpoint(checkpoint).config)
    for dataset in (train.dataset, val.dataset, loader.dataset):
        assert dataset.read.keywords["rule"].background == (1, 2, 3)


def test_what_the_file_says_counts(images: Path, checkpoint: Path) -> None:
    said = {"crop_size": 24, "mean": [0.5] * 3}
    cfg = probe_config(images, checkpoint, data__augmentations=said, data__background="black")
    _, cfg, train, val = prepare_probe(cfg)
    assert train.dataset[0][0].shape == val.dataset[0][0].shape == (3, 24, 24)
    assert list(cfg.data.augmentations.mean) == [0.5] * 3
    assert list(cfg.data.augmentations.std) == STD
    assert train.dataset.read.keywords["rule"].background == (0, 0, 0)


def test_auto_augment_normalises_as_validation_and_takes_every_image(
    images: Path, checkpoint: Path
) -> None:
    _, _, train, _ = prepare_probe(probe_config(images, checkpoint, auto_augment=True))
    parts = {type(t).__name__: t for t in train.dataset.transform.transforms}
    assert torch.allclose(torch.as_tensor(parts["Normalize"].mean), torch.tensor(MEAN))
    assert train.dataset[0][0].shape == (3, 32, 32)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    for operation in parts["RandAugment"].ops:  # each at all strengths, which it takes by chance
        for magnitude in range(11):
            operation.magnitude, operation.prob, operation.magnitude_std = magnitude, 1.0, 0
            assert operation(image).size == image.size, operation.name
