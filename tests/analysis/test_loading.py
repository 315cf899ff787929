"""Data folders, backgrounds and features that cannot be used."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import nn

from metamask_solo.analysis import loading
from metamask_solo.analysis.loading import (
    Reading,
    check_data,
    load_subject,
    read_background,
    title,
)
from metamask_solo.checkpoints.reading import Checkpoint
from metamask_solo.errors import UserError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for name in ("x", "y"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for index in range(3):
                value = index * 20 + (100 if name == "y" else 10)
                Image.new("RGB", (4, 4), (value,) * 3).save(folder / f"{index}.png")
    return tmp_path / "data"


def test_a_good_folder(root):
    (root / "train" / "notes.txt").write_text("")
    assert check_data(root) == 2


def test_folders_that_cannot_be_used(root, tmp_path):
    with pytest.raises(UserError, match="--data=.*nowhere: no such folder"):
        check_data(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no folder train/"):
        check_data(root / "train")
    (root / "val" / "y" / "0.png").unlink()
    (root / "val" / "y" / "1.png").rename(root / "val" / "y" / "1.txt")
    with pytest.raises(UserError, match="class folder val/y has 1 images; each needs at least 2"):
        check_data(root)
    shutil.rmtree(root / "val" / "y")
    with pytest.raises(
        UserError, match="2 classes in train and 1 in val must be the same; class y"
    ):
        check_data(root)
    shutil.rmtree(root / "train" / "y")
    with pytest.raises(UserError, match="has 1 classes; at least 2"):
        check_data(root)


HEADER = "file,split,label,photograph,row,column,mean_red,mean_green,mean_blue\n"


def test_background_follows_the_order_of_the_files(root):
    rows = [
        "train/x/0.png,train,x,sea.jpg,1,2,0.1,0.2,0.3",
        "train/y/1.png,train,y,air.jpg,1,2,0,0,1",
    ]
    (root / "metadata.csv").write_text(HEADER + "\n".join(rows) + "\n")
    found = read_background(root, [root / "train/y/1.png", root / "train/x/0.png"])
    assert found is not None
    np.testing.assert_array_equal(found.photograph, [0, 1])
    np.testing.assert_allclose(found.colour, [[0, 0, 1], [0.1, 0.2, 0.3]])
    with pytest.raises(UserError, match=r"has no row for train/x/2\.png"):
        read_background(root, [root / "train/x/2.png"])


def test_no_background(root):
    assert read_background(root, []) is None
    (root / "metadata.csv").write_text("file_name,caption\na.png,sea\n")  # another tool's
    assert read_background(root, [root / "a.png"]) is None
    (root / "metadata.csv").write_text("")
    assert read_background(root, []) is None


def test_a_colour_that_is_not_a_number(root):
    (root / "metadata.csv").write_text(HEADER + "train/x/0.png,train,x,sea.jpg,1,2,red,0,0\n")
    with pytest.raises(UserError, match="a mean colour is not a number"):
        read_background(root, [root / "train/x/0.png"])


def test_titles():
    checkpoint = Checkpoint(Path("a/last.ckpt"), None, {}, None, None, {})
    assert title(checkpoint) == "last"
    checkpoint.method = "simclr"
    assert title(checkpoint) == "simclr"
    checkpoint.raw = {"metamask": {"folded": True}}
    assert title(checkpoint) == "simclr (folded)"
    checkpoint.raw = {}
    checkpoint.config = OmegaConf.create({"name": "cost $5 and $6" + "x" * 60})
    assert title(checkpoint) == "cost 5 and 6" + "x" * 28


class Brightness(nn.Module):
    """Features that tell the grey value, so that their order can be checked."""

    def __init__(self, transform=lambda grey: torch.stack([grey, 1 - grey], dim=1)):
        super().__init__()
        self.transform = transform

    def forward(self, images):
        return self.transform(images.mean(dim=(1, 2, 3)))


@pytest.fixture
def load(root, monkeypatch):
    def load(backbone: nn.Module, samples: int = 1000, mask=None, raw=None):
        checkpoint = Checkpoint(Path("a/last.ckpt"), None, {}, "simclr", mask, raw or {})
        monkeypatch.setattr(loading, "load_backbone", lambda path, masked: (backbone, checkpoint))
        reading = Reading(root, samples, 0, 4, 0, "cpu")
        return load_subject(Path("a/last.ckpt"), "1: simclr", reading, two_views=False)

    return load


def test_files_are_in_the_order_of_the_features(load, root):
    for samples in (1000, 5):  # all images, or a draw of them
        subject, files = load(Brightness(), samples)
        assert len(files) == len(subject.train.labels) == min(samples, 6)
        for file, feature in zip(files, subject.train.features, strict=True):
            grey = np.asarray(Image.open(file)).mean() / 255
            assert feature[0] == pytest.approx(grey, abs=1e-6)
            assert file.is_relative_to(root / "train")
    assert subject.mask is None and subject.views is None and subject.history is None


def test_features_that_cannot_be_used(load):
    with pytest.raises(UserError, match="features are not finite"):
        load(Brightness(lambda grey: torch.stack([grey / 0, grey], dim=1)))
    with pytest.raises(UserError, match="of 6 of 6 images are all zero"):
        load(Brightness(lambda grey: torch.zeros(len(grey), 2)))


def test_too_small_a_sample(load):
    with pytest.raises(UserError, match="--samples=3: leaves a class of train with [01] images"):
        load(Brightness(), 3)


def test_the_final_mask_ends_the_history(load):
    mask = torch.tensor([0.2, 0.8])
    noted = {"step": torch.tensor([0, 5]), "mask": torch.tensor([[0.5, 0.5], [0.4, 0.6]])}
    raw = {"metamask": {"kind": "sigmoid", "history": noted}, "global_step": 9}
    subject, _ = load(Brightness(), mask=mask, raw=raw)
    np.testing.assert_allclose(subject.mask, [0.2, 0.8])
    np.testing.assert_array_equal(subject.history[0], [0, 5, 9])
    np.testing.assert_allclose(subject.history[1][1:], [[0.4, 0.6], [0.2, 0.8]])
    subject, _ = load(Brightness(), mask=mask, raw={**raw, "global_step": 5})
    np.testing.assert_array_equal(subject.history[0], [0, 5])
    subject, _ = load(Brightness(), mask=mask)
    assert subject.mask is not None and subject.history is None


def test_a_folded_mask_is_no_mask(load):
    raw = {"metamask": {"kind": "linear", "folded": True, "history": {}}, "global_step": 9}
    subject, _ = load(Brightness(), mask=torch.ones(2), raw=raw)
    assert subject.mask is None and subject.history is None
