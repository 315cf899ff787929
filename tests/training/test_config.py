"""A run's config against its model: what cannot work is one line, numbers may be texts."""

import inspect
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from runs import pretrain_config

from metamask_solo.errors import UserError
from metamask_solo.hosts import OPTIMIZERS, complete_pretrain_config, pl
from metamask_solo.training import config
from metamask_solo.training.config import read_pretraining_config, read_probe_config


def changed(images: Path, **overrides: Any) -> Any:
    return pretrain_config(images, images, **overrides)


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("optimizer__lr", 10**400, "optimizer.lr=1000.*…: Input should be"),
        ("optimizer__lr", "???", "optimizer.lr: Missing mandatory value"),
        ("optimizer__kwargs", {"momentun": 1}, r"kwargs.momentun: .* did you mean .*momentum\?"),
        ("optimizer__kwargs", {"momentum": -1}, "optimizer.kwargs: Invalid momentum value: -1"),
        ("optimizer__classifier_lr", None, "optimizer.classifier_lr: missing; data.val_path needs"),
        ("optimiser", {"lr": 1}, "optimiser: unknown setting; did you mean optimizer?"),
        ("batch_size", 64, "batch_size: unknown setting; did you mean optimizer.batch_size?"),
        ("optimizer__brightness", 1, "did you mean augmentations.0.color_jitter.brightness?"),
        ("scheduler", {"name": "step"}, "^scheduler: step needs lr_decay_steps"),
        ("data__format", "h5", "data.format=h5: Input should be 'image_folder'"),
        ("data__fraction", 1, "data.fraction=1: must be above 0 and below 1, or -1"),
        ("data__train_path", "nowhere", "data.train_path=nowhere: no such folder"),
        ("data__train_path", "${oc.env:NO_SUCH}/a", "data.train_path: .*'NO_SUCH' not found"),
        ("method", "simclar", "method=simclar: allowed are .*simclr"),
        ("backbone", {"name": "vit_tiny", "stem": "3x3"}, "stem=3x3: only a ResNet has one"),
        ("backbone__name", "resnet19", "backbone.name=resnet19: allowed are .*resnet18"),
        ("logger", False, "logger=false: the command sets it itself"),
        ("imports", ["no_such_module"], "imports=no_such_module: .*ModuleNotFoundError"),
        ("devices", 0, "devices=0: must be a number such as 2, a list of GPUs"),
        ("devices", [0, 0], "devices=.*: must be a number such as 2"),
        # Lightning's own words
        ("max_time", "12h", "max_time=12h: "),
        ("limit_val_batches", 1.5, r"limit_val_batches=1.5: .* it has to be in \[0.0, 1.0\]"),
        (
            "val_check_interval",
            "1h",
            "val_check_interval=1h: Invalid time|trainer: .* not supported",
        ),
        ("accelerator", "quantum", "accelerator=quantum: You selected an invalid accelerator"),
        ("precision", "8", "precision=8: .* is invalid. Allowed precision values"),
        ("check_val_every_n_epoch", None, "^check_val_every_n_epoch=null needs val_check"),
        ("profiler", "quick", "profiler=quick: .*simple"),
    ],
)
def test_what_cannot_work_is_one_line(key: str, value: Any, line: str, images: Path) -> None:
    with pytest.raises(UserError, match=line) as caught:
        read_pretraining_config(changed(images, **{key: value}))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 900


def test_two_settings_that_do_not_go_together_are_one_line(images: Path) -> None:
    for devices in (1, 2):  # DistributedDataParallel refuses it for one process, too
        with pytest.raises(UserError, match="sync_batchnorm=True: needs GPUs"):
            cfg = changed(images, sync_batchnorm=True, devices=devices, strategy="ddp")
            read_pretraining_config(cfg)
    scheduling = f"{pl.__name__}.callbacks.GradientAccumulationScheduler"
    callbacks = [{"_target_": scheduling, "scheduling": {0: 1, 2: 4}}]
    for cosine in ("scheduler__name=warmup_cosine", "method_kwargs__mask__schedule=cosine"):
        name, _, value = cosine.partition("=")
        read_pretraining_config(changed(images, callbacks=callbacks))
        with pytest.raises(UserError, match=f"{value}: .*GradientAccumulationScheduler"):
            read_pretraining_config(changed(images, callbacks=callbacks, **{name: value}))
    cfg = changed(images, pretrained_feature_extractor="a.ckpt", mixup=0.2)
    del cfg.augmentations, cfg.method, cfg.method_kwargs, cfg.optimizer.classifier_lr
    cfg.optimizer.batch_size = 7
    with pytest.raises(UserError, match="optimizer.batch_size must be even"):
        read_probe_config(cfg)


def test_numbers_paths_and_nulls_are_taken_as_they_are_meant(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TASK", "7")
    monkeypatch.setenv("HOME", str(images.parent))
    cfg = changed(images, seed="${oc.env:TASK}", optimizer__lr="1e-1", knn_eval=None, root="~")
    cfg.momentum, cfg.data.train_path = {"base_tau": None}, f"${{root}}/{images.name}/train"
    checked = read_pretraining_config(cfg)
    assert checked.seed == 7 and checked.optimizer.lr == 0.1
    assert checked.data.train_path == str(images / "train")
    assert "knn_eval" not in checked and "base_tau" not in checked.momentum
    assert cfg.seed == "7" and cfg.data.train_path.startswith("~")  # the config is left alone


def test_half_precision_on_a_cpu_is_what_it_is(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert read_pretraining_config(changed(images, precision="16-mixed")).precision == "bf16-mixed"
    assert "trains in bf16-mixed" in capsys.readouterr().err


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
    completed = complete_pretrain_config(checked.copy())
    assert completed.optimizer.lr == pytest.approx(0.5 * 10 * len(expected) / 256)
    for every in ("auto", -1, "-1"):  # the CPU is one
        assert read_pretraining_config(changed(images, devices=every)).devices == [0]


def test_a_module_of_ones_own_is_imported_first(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_method_of_a_test.py").write_text(
        "from solo.methods import METHODS\nMETHODS['own'] = METHODS['metamask']\n"
    )
    monkeypatch.chdir(tmp_path)
    cfg = changed(images, method="own", imports=["own_method_of_a_test"])
    assert read_pretraining_config(cfg).method == "own"


def test_the_model_has_what_the_host_and_lightning_have() -> None:
    names = get_args(config.Optimizer.model_fields["name"].annotation)
    assert OPTIMIZERS.keys() <= {*names}
    trainer = inspect.signature(pl.Trainer.__init__).parameters.keys()
    assert config.TrainerArguments.model_fields.keys() | config.OURS <= trainer | {
        *("model_registry", "barebones", "use_distributed_sampler")  # of some releases
    }
