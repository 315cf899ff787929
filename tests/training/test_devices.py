"""The setting ``devices``, whatever its form, and the rates that solo-learn scales by it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import pretrain_config

from metamask_solo.errors import UserError
from metamask_solo.hosts import complete_pretrain_config
from metamask_solo.training.config_checks import check_pretrain_config


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("1", [0]),
        ("12", list(range(12))),
        (3, [0, 1, 2]),
        ("0,2", [0, 2]),
        ("2,", [2]),
        ([1, 3], [1, 3]),
        ("auto", [0, 1, 2, 3]),
        (-1, [0, 1, 2, 3]),
    ],
)
def test_every_form_becomes_a_list(
    given: Any, expected: list[int], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    cfg = pretrain_config(images, tmp_path, devices=given, accelerator="auto")
    check_pretrain_config(cfg)
    assert cfg.devices == expected
    lr, batch_size = cfg.optimizer.lr, cfg.optimizer.batch_size
    completed = complete_pretrain_config(cfg)
    assert completed.optimizer.lr == pytest.approx(lr * batch_size * len(expected) / 256)


def test_the_cpu_is_one_device(images: Path, tmp_path: Path) -> None:
    cfg = pretrain_config(images, tmp_path, devices="auto", accelerator="cpu")
    check_pretrain_config(cfg)
    assert cfg.devices == [0]


@pytest.mark.parametrize(
    "given", [0, "0", -2, True, None, 2.0, 10**18, "", ",", "two", "1;2", [], [0, 0], [-1], ["0"]]
)
def test_anything_else_is_refused_in_one_line(given: Any, images: Path, tmp_path: Path) -> None:
    cfg = pretrain_config(images, tmp_path, devices=given)
    with pytest.raises(UserError, match="^devices=.*: must be a number such as 2") as caught:
        check_pretrain_config(cfg)
    assert "\n" not in str(caught.value)
