"""What an analysis reads of checkpoints and of a data folder."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from metamask_solo.analysis.loading import (
    check_same_data,
    mask_and_history,
    read_background,
    titles,
)
from metamask_solo.checkpoints.reading import Checkpoint
from metamask_solo.errors import UserError


def checkpoint(path: str = "a/last.ckpt", config: Any = None, **fields: Any) -> Checkpoint:
    known = {"backbone": {}, "rest": {}, "method": None, "mask": None, "raw": {}} | fields
    config = None if config is None else OmegaConf.create(config)
    return Checkpoint(path=Path(path), config=config, **known)


def test_titles():
    folded = checkpoint(method="simclr", raw={"metamask": {"folded": True}})
    long = checkpoint(config={"name": "cost $5 and $6" + "x" * 60})
    expected = ["1: last", "2: simclr (folded)", "3: cost $5 and $6" + "x" * 26]
    assert titles([checkpoint(), folded, long]) == expected
    alike = [checkpoint("offline-a1/x.ckpt"), checkpoint("b2/x.ckpt")]
    assert titles(alike) == ["1: x (a1)", "2: x (b2)"]


def test_runs_of_different_data_are_not_compared(tmp_path):
    def run(**data: Any) -> Checkpoint:
        return checkpoint(config={"data": {"dataset": "custom", "train_path": "t/", **data}})

    check_same_data(
        [run(), run(num_workers=3), run(train_path=f"{Path.cwd()}/x/../t", no_labels=False)]
    )
    for different in (run(val_path="v"), run(no_labels=True), run(train_path="u/")):
        with pytest.raises(UserError, match="runs of different data: data.*; analyse"):
            check_same_data([run(), different])


def test_mask_and_history():
    mask = torch.tensor([0.2, 0.8])
    noted = {"step": torch.tensor([0, 5]), "mask": torch.tensor([[0.5, 0.5], [0.2, 0.8]])}
    values, history, _ = mask_and_history(
        checkpoint(mask=mask, raw={"metamask": {"kind": "sigmoid", "history": noted}})
    )
    np.testing.assert_allclose(values, [0.2, 0.8])
    assert history.index.tolist() == [0, 5]
    np.testing.assert_allclose(history.to_numpy(), noted["mask"])
    assert mask_and_history(checkpoint(mask=mask))[1] is None
    diverged = mask_and_history(checkpoint(mask=mask * torch.nan))
    assert diverged == (None, None, ["its mask is not finite: the run diverged"])


def test_background_follows_the_order_of_the_files(tmp_path):
    rows = ["file,photograph", "train/x/0.png,sea.jpg", "train/y/1.png,air.jpg", "train/y/2.png,"]
    (tmp_path / "metadata.csv").write_text("\n".join(rows) + "\n")
    files = [str(tmp_path / row.split(",")[0]) for row in rows[1:]]
    np.testing.assert_array_equal(read_background(tmp_path, [files[1], files[0]]), [0, 1])
    assert read_background(tmp_path, files[:1]) is None  # one photograph only
    for file in (files[2], str(tmp_path / "train/x/9.png")):
        with pytest.raises(UserError, match=r"has no row for train/\w/\d\.png with a photograph"):
            read_background(tmp_path, [files[0], file])
    for content in ("", "file_name,caption\na.png,sea\n"):  # of another tool
        (tmp_path / "metadata.csv").write_text(content)
        assert read_background(tmp_path, files[:2]) is None
    assert read_background(tmp_path / "train", files) is None
