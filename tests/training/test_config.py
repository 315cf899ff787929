"""A run's config against its model: what cannot work is one line, numbers may be texts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import pretrain_config

from metamask_solo.errors import UserError
from metamask_solo.hosts import complete_pretrain_config, pl
from metamask_solo.training.config import read_pretraining_config


def named(callback: str, **settings: Any) -> Any:
    return {"_target_": f"{pl.__name__}.callbacks.{callback}", **settings}


ACCUMULATION = [named("GradientAccumulationScheduler", scheduling={0: 1, 2: 4})]
THE_OTHER = {"pytorch_lightning": "lightning.pytorch", "lightning.pytorch": "pytorch_lightning"}


def changed(images: Path, **overrides: Any) -> Any:
    return pretrain_config(images, images, **overrides)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"optimizer__lr": "???"}, "optimizer.lr: Missing mandatory value"),
        ({"optimizer__kwargs": {"momentun": 1}}, r"kwargs.momentun: .* did you mean .*momentum\?"),
        ({"optimizer__kwargs": {"momentum": -1}}, "optimizer.kwargs: Invalid momentum value: -1"),
        ({"optimizer__classifier_lr": None}, "optimizer.classifier_lr: missing; data.val_path"),
        ({"batch_size": 64}, "batch_size: unknown setting; did you mean optimizer.batch_size?"),
        ({"scheduler": {"name": "step"}}, "^scheduler: step needs lr_decay_steps"),
        ({"data__format": "h5"}, "data.format=h5: Input should be 'image_folder'"),
        ({"data__fraction": 1}, "data.fraction=1: must be above 0 and below 1, or -1"),
        ({"data__train_path": "nowhere"}, "data.train_path=nowhere: no such folder"),
        ({"method": "simclar"}, "method=simclar: allowed are .*simclr"),
        ({"backbone": {"name": "vit_tiny", "stem": "3x3"}}, "stem=3x3: only a ResNet has one"),
        ({"backbone__name": "resnet19"}, "backbone.name=resnet19: allowed are .*resnet18"),
        ({"imports": ["no_such_module"]}, "imports=no_such_module: .*ModuleNotFoundError"),
        ({"devices": 0}, "devices=0: must be a number such as 2, a list of GPUs"),
        ({"devices": [0, 0]}, "devices=.*: must be a number such as 2"),
        # DistributedDataParallel refuses it for one process, too
        ({"sync_batchnorm": True, "strategy": "ddp"}, "sync_batchnorm=True: needs GPUs"),
        ({"callbacks": [named("Timer", x=1)]}, r"^callbacks.0._target_=.*'x'"),
        (
            {"callbacks": [{"_target_": f"{THE_OTHER[pl.__name__]}.callbacks.Timer"}]},
            f"^callbacks.0._target_=.*(callback of {pl.__name__},|Error locating)",
        ),
        # the length of a cosine in steps would change while it goes on
        (
            {"callbacks": ACCUMULATION, "scheduler__name": "warmup_cosine"},
            "scheduler.name=warmup_cosine: .*GradientAccumulationScheduler",
        ),
        (
            {"callbacks": ACCUMULATION, "method_kwargs__mask__schedule": "cosine"},
            "mask.schedule=cosine: .*GradientAccumulationScheduler",
        ),
        # Lightning's own words
        ({"max_time": "12h"}, "max_time=12h: "),
        ({"limit_val_batches": 1.5}, r"limit_val_batches=1.5: .* it has to be in \[0.0, 1.0\]"),
        ({"accelerator": "quantum"}, "accelerator=quantum: You selected an invalid accelerator"),
        ({"precision": "8"}, "precision=8: .* is invalid. Allowed precision values"),
        ({"check_val_every_n_epoch": None}, "^check_val_every_n_epoch=null needs val_check"),
    ],
)
def test_what_cannot_work_is_one_line(overrides: Any, line: str, images: Path) -> None:
    with pytest.raises(UserError, match=line) as caught:
        read_pretraining_config(changed(images, **overrides))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 900


def test_numbers_paths_and_nulls_are_taken_as_they_are_meant(
    images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TASK", "7")
    monkeypatch.setenv("HOME", str(images.parent))
    cfg = changed(images, seed="${oc.env:TASK}", optimizer__lr="1e-1", knn_eval=None, root="~")
    cfg.momentum, cfg.data.train_path = {"base_tau": None}, f"${{root}}/{images.name}/train"
    cfg.precision = "16-mixed"
    checked = read_pretraining_config(cfg)
    assert checked.seed == 7 and checked.optimizer.lr == 0.1
    assert checked.data.train_path == str(images / "train")
    assert "knn_eval" not in checked and "base_tau" not in checked.momentum
    # half precision on a CPU is what it is
    assert checked.precision == "bf16-mixed" and "trains in bf16-mixed" in capsys.readouterr().err
    assert cfg.seed == "7" and cfg.data.train_path.startswith("~")  # the config is left alone


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ("3", [0, 1, 2]),
        (2, [0, 1]),
        ("2,", [2]),
        ([1, 3], [1, 3]),
        ("auto", [0, 1, 2, 3]),
        (-1, [0, 1, 2, 3]),
    ],
)
def test_devices_become_a_list_whose_length_scales_the_rates(
    devices: Any, expected: list[int], images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # old releases ask for the count
    checked = read_pretraining_config(changed(images, devices=devices, accelerator="auto"))
    assert checked.devices == expected
    completed = complete_pretrain_config(checked)
    assert completed.optimizer.lr == pytest.approx(0.5 * 10 * len(expected) / 256)
    if devices in ("auto", -1):  # the CPU is one
        assert read_pretraining_config(changed(images, devices=devices)).devices == [0]
