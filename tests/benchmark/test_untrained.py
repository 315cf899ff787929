"""What is untrained stands beside the methods, with the network and the images of theirs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import write_images

from metamask_solo.__main__ import main
from metamask_solo.benchmark.results import read_csv
from metamask_solo.evaluation.features import percent
from metamask_solo.evaluation.knn import knn_hits
from metamask_solo.evaluation.linear import linear_probe

# a ResNet-18 without its last layer; the 3 × 3 stem has 1,728 weights, the standard one 9,408
PARAMETERS = 11_176_512 - 9408 + 1728


@pytest.mark.slow
def test_an_untrained_backbone_and_the_pixels_of_the_cifar_benchmark(tmp_path: Path) -> None:
    folders = write_images(tmp_path / "cifar", classes=10, train=2, val=1)
    keys = [f"data.{split}_path={folders / split}" for split in ("train", "val")]
    keys += ["overrides+=[data.num_workers=0,accelerator=cpu,precision=32]"]
    out = tmp_path / "out"
    assert main(["benchmark", "cifar10", *keys, "only=[]", "seeds=[3]", f"out={out}"]) == 0

    rows = read_csv(out / "results.csv").set_index("method")
    assert list(rows.index) == ["random", "pixels"]
    assert rows.parameters["random"] == PARAMETERS  # the stem of the methods
    report = (out / "results.md").read_text()
    assert "| untrained backbone | 1 |" in report and "| pixels | 1 |" in report

    # the pixels' accuracies, from the images themselves
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    tensors = []
    for split in ("train", "val"):
        files = sorted((folders / split).rglob("*.png"))
        images = np.stack([np.asarray(Image.open(file)) / 255 for file in files])
        scaled = ((images - mean) / std).transpose(0, 3, 1, 2).reshape(len(files), -1)
        labels = [int(file.parent.name.removeprefix("class_")) for file in files]
        tensors += [torch.from_numpy(scaled).float(), torch.tensor(labels)]
    assert rows.knn["pixels"] == pytest.approx(percent(knn_hits(*tensors)[0]))
    assert rows.linear["pixels"] == pytest.approx(percent(linear_probe(*tensors)[0]))
