"""A run's config against its model: what was passed on to a traceback, and what stays as it was."""

import inspect
from pathlib import Path
from typing import Any, get_args

import pytest
from omegaconf import OmegaConf
from runs import pretrain_config

from metamask_solo.errors import UserError
from metamask_solo.hosts import OPTIMIZERS, pl
from metamask_solo.training.config_checks import check_pretrain_config
from metamask_solo.training.run_config import Optimizer, TrainerArguments


def changed(images: Path, **overrides: Any) -> Any:
    cfg = pretrain_config(images, images)
    for key, value in overrides.items():
        OmegaConf.update(cfg, key.replace("__", "."), value, force_add=True)
    return cfg


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optimizer__lr", 10**400, "optimizer.lr=1000.*…: must be a number of at least 0"),
        ("gradient_clip_val", 10**400, "gradient_clip_val=1000.*…: must be null or a number"),
        ("max_time", {"days": 10**12}, "max_time=.*: must be a time above 0, such as"),
        ("knn_eval__distance_func", "manhattan", "=manhattan: must be one of cosine, euclidean"),
        ("augmentations__0__mean", [True, 1, 1], "augmentations.0.mean=.*three numbers"),
        ("augmentations__0__std", [0, 1, 1], "augmentations.0.std=.*three numbers above 0"),
        ("augmentations__0__rrc__enabled", None, "augmentations.0.rrc.enabled: missing; give it"),
        ("augmentations", [], r"augmentations=\[\]: must be a list of augmentation pipelines"),
        ("scheduler", {"name": "step", "lr_decay_steps": [True]}, "must be null or a list of ep"),
        ("scheduler", {"name": "step"}, "scheduler.lr_decay_steps: missing; give it a list"),
        ("scheduler", None, "scheduler.name: missing; give it one of none, warmup_cosine"),
        ("scheduler__gamma", 0.1, "scheduler.gamma: unknown setting; allowed are"),
        ("optimizer__classifier_lr", None, "optimizer.classifier_lr: missing; give it a number"),
        ("data__format", "a\nb", r"data.format='a\\nb': must be image_folder"),
        ("data__num_workers", None, "data.num_workers=null: must be an integer of at least 0 or"),
        ("checkpoint__dir", "???", "checkpoint.dir: missing; give it a folder"),
        ("name", "a\0b", r"name='a\\x00b': must not hold a null character"),
    ],
)
def test_what_cannot_work_is_one_line(key: str, value: Any, message: str, images: Path) -> None:
    with pytest.raises(UserError, match=f"^.*{message}") as caught:
        check_pretrain_config(changed(images, **{key: value}))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_null_stands_for_a_default(images: Path) -> None:
    cfg = changed(images, momentum={"base_tau": None}, checkpoint__keep_prev=None, knn_eval=None)
    check_pretrain_config(cfg)
    assert cfg.momentum.base_tau is None and cfg.knn_eval is None


def test_a_config_stays_as_it_is_but_for_numbers_and_devices(images: Path) -> None:
    """YAML 1.1 takes 1e-1, without a point, for a text."""
    cfg = changed(images, optimizer__lr="1e-1", augmentations__0__mean=["1e-1", 1, 1])
    before = OmegaConf.to_container(cfg)
    check_pretrain_config(cfg)
    after: Any = OmegaConf.to_container(cfg)
    assert after.pop("devices") == [0] and after["optimizer"].pop("lr") == 0.1
    assert after["augmentations"][0].pop("mean") == [0.1, 1, 1]
    expected = changed(images)
    del expected.devices, expected.optimizer.lr
    assert after == expected and before != after
    assert list(after["optimizer"]) == list(expected.optimizer)


def test_the_model_has_what_the_host_and_lightning_have() -> None:
    assert {*get_args(Optimizer.model_fields["name"].annotation)} == OPTIMIZERS.keys()
    trainer = inspect.signature(pl.Trainer.__init__).parameters.keys()
    # newer releases alone have the last
    assert TrainerArguments.model_fields.keys() - trainer <= {"enable_autolog_hparams"}
