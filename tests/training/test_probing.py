"""What a probe makes of images: size and normalisation of the run, auto_augment."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from runs import image_loader, pretrain_config

from metamask_solo.checkpoints.reading import read_checkpoint
from metamask_solo.hosts import build_method, complete_pretrain_config
from metamask_solo.training.config import read_pretraining_config
from metamask_solo.training.linear import _auto_augment, prepare_probe

MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]


def write_run(folder: Path, data: Path, **changes: Any) -> Path:
    """A SimCLR run on 32 pixels with a mean of its own, as its end leaves it."""
    cfg = pretrain_config(data, folder, method="simclr")
    cfg.augmentations[0].update({"mean": MEAN, "std": STD})
    cfg.augmentations[0].horizontal_flip.prob = 0.0
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value, force_add=True)
    cfg.devices = [0]
    args = complete_pretrain_config(read_pretraining_config(cfg))
    folder.mkdir()
    state = build_method(args).state_dict()
    torch.save({"state_dict": state}, folder / "a-ep=0.ckpt")
    (folder / "args.json").write_text(json.dumps(OmegaConf.to_container(args, resolve=True)))
    return folder / "a-ep=0.ckpt"


def probe_config(data: Path, checkpoint: Path, **changes: Any) -> DictConfig:
    cfg = pretrain_config(data, checkpoint.parent / "runs")
    for key in ("augmentations", "method", "method_kwargs"):
        del cfg[key]
    del cfg.optimizer.classifier_lr
    cfg.pretrained_feature_extractor = str(checkpoint)
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value, force_add=True)
    return cfg


@pytest.fixture(scope="module")
def checkpoint(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run", images)


def pixels(path: str) -> Any:
    with Image.open(path) as image:
        return (np.asarray(image) / 255 - MEAN) / STD


def test_what_the_file_does_not_say_comes_from_the_run(
    images: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, cfg, train, val = prepare_probe(probe_config(images, checkpoint))
    first, _ = val.dataset[0]
    expected = pixels(val.dataset.samples[0][0])
    assert np.abs(first.permute(1, 2, 0).numpy() - expected).max() < 1e-5
    assert train.dataset[0][0].shape == (3, 32, 32)
    settings = cfg.data.augmentations
    assert (settings.crop_size, settings.horizontal_flip, settings.crop_min_scale) == (32, 0.0, 0.5)
    assert list(settings.mean) == MEAN and list(settings.std) == STD
    assert "images: 32 x 32 pixels, mean 0.1 0.2 0.3" in capsys.readouterr().err


def test_what_the_file_says_counts(images: Path, checkpoint: Path) -> None:
    said = {"crop_size": 24, "mean": [0.5] * 3}
    cfg = probe_config(images, checkpoint, data__augmentations=said, data__background="black")
    _, cfg, train, val = prepare_probe(cfg)
    assert train.dataset[0][0].shape == val.dataset[0][0].shape == (3, 24, 24)
    assert list(cfg.data.augmentations.mean) == [0.5] * 3
    assert list(cfg.data.augmentations.std) == STD
    assert train.dataset.read.keywords["rule"].background == (0, 0, 0)


def test_the_rule_of_reading_comes_from_the_run(images: Path, tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", images, data__background="#010203")
    path.parent.joinpath("args.json").touch()
    _, _, train, val = prepare_probe(probe_config(images, path))
    for loader in (train, val, image_loader(images / "val", read_checkpoint(path).config)):
        assert loader.dataset.read.keywords["rule"].background == (1, 2, 3)


def test_auto_augment_normalises_as_validation(images: Path, checkpoint: Path) -> None:
    _, cfg, train, val = prepare_probe(probe_config(images, checkpoint, auto_augment=True))
    last = {type(t).__name__: t for t in train.dataset.transform.transforms}["Normalize"]
    assert torch.allclose(torch.as_tensor(last.mean), torch.tensor(MEAN))
    assert torch.allclose(torch.as_tensor(last.std), torch.tensor(STD))
    assert train.dataset[0][0].shape == val.dataset[0][0].shape == (3, 32, 32)


def test_auto_augment_takes_every_image(images: Path, checkpoint: Path) -> None:
    cfg = probe_config(images, checkpoint, data__augmentations={"crop_size": 32})
    transform = _auto_augment(cfg)
    (chosen,) = [part for part in transform.transforms if hasattr(part, "ops")]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    for operation in chosen.ops:  # each at all strengths, which it else takes by chance
        for magnitude in range(11):
            operation.magnitude, operation.prob, operation.magnitude_std = magnitude, 1.0, 0
            assert operation(image).size == image.size, operation.name
