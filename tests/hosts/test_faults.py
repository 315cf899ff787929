"""What a release is known to do wrong is refused; what is beside it, and right, is not."""

from pathlib import Path
from typing import Any

import pytest
from method_settings import KWARGS
from omegaconf import OmegaConf
from runs import pretrain_config

from metamask_solo import hosts
from metamask_solo.errors import UserError
from metamask_solo.training.pretrain import prepare_pretraining

TWO = {"devices": 2}
BOTH, OLD, MAIN = ("main", "1.0.2"), ("1.0.2",), ("main",)
KNN = {"knn_eval.enabled": True}
SMALL = {"small": 2}
TEACHER = {"momentum.classifier": True}
COSINE = {"scheduler.name": "warmup_cosine", "scheduler.warmup_epochs": 1}
DINO_WARMUP = "method_kwargs.warmup_teacher_temperature_epochs"
# method, what a file says (20 images, 10 a step), releases that refuse it, and the key
CASES: list[tuple[str, dict[str, Any], tuple[str, ...], str]] = [
    ("barlow_twins", TWO, BOTH, "devices="),
    ("simclr", TWO, OLD, "devices="),
    ("vicreg", TWO, OLD, "devices="),
    ("nnclr", {**TWO, "method_kwargs.queue_size": 40}, OLD, "devices="),
    ("byol", TWO, (), ""),
    ("deepclusterv2", TWO, BOTH, "devices="),
    ("swav", TWO, BOTH, "queue_size="),
    ("swav", {**TWO, "method_kwargs.queue_size": 0}, (), ""),
    ("metamask", TWO, (), ""),
    ("simclr", {"optimizer.name": "lars"}, OLD, "optimizer.name=lars"),
    ("simclr", {"optimizer.exclude_bias_n_norm_wd": True}, OLD, "exclude_bias_n_norm_wd=True"),
    ("simclr", {"augmentations.0.num_crops": 3}, BOTH, "data.num_large_crops=3"),
    ("wmse", {"augmentations.0.num_crops": 3}, (), ""),
    ("simclr", SMALL, (), ""),
    ("byol", SMALL, (), ""),
    ("vicreg", SMALL, BOTH, "data.num_small_crops=2"),
    ("swav", SMALL, OLD, "data.num_small_crops=2"),
    ("simclr", {"backbone.name": "vit_tiny"}, (), ""),
    ("mocov2plus", {"method_kwargs.queue_size": 45}, BOTH, "queue_size=45"),
    ("mocov2plus", {"optimizer.batch_size": 12}, BOTH, "queue_size=40"),
    ("swav", {"method_kwargs.queue_size": 5}, BOTH, "queue_size=5"),
    ("dino", {DINO_WARMUP: 3}, BOTH, "epochs=3"),
    ("dino", {DINO_WARMUP: None}, OLD, "epochs="),
    ("simclr", {**COSINE, "scheduler.warmup_start_lr": 1.0}, BOTH, "warmup_start_lr=1.0"),
    ("simclr", COSINE, (), ""),
    ("simclr", KNN, (), ""),
    ("simclr", {**KNN, "data.val_path": None}, BOTH, "knn_eval.enabled=True"),
    ("simclr", {**KNN, "check_val_every_n_epoch": 2}, BOTH, "knn_eval.enabled=True"),
    ("simclr", {**KNN, "limit_val_batches": 1}, BOTH, "knn_eval.enabled=True"),
    ("simclr", {**KNN, "data.no_labels": True}, BOTH, "knn_eval.enabled=True"),
    ("supcon", {"data.no_labels": True}, MAIN, "data.no_labels=True"),
    ("all4one", {**TWO, "method_kwargs.queue_size": 40}, MAIN, "devices="),
    ("byol", {**TEACHER, "data.no_labels": True}, BOTH, "momentum.classifier=True"),
    ("byol", TEACHER, (), ""),
]


def case(method: str, said: dict[str, Any], images: Path) -> Any:
    cfg = pretrain_config(images, images, method)
    if method != "metamask":
        cfg.method_kwargs = {"proj_hidden_dim": 16, "proj_output_dim": 10, **KWARGS[method]}
    for key, value in said.items():
        if key == "small":
            cfg.augmentations.append({**cfg.augmentations[0], "crop_size": 16, "num_crops": value})
        elif value is None and key == DINO_WARMUP:
            del cfg.method_kwargs[key.partition(".")[2]]
        else:
            OmegaConf.update(cfg, key, value, force_add=True)
    return cfg


@pytest.mark.parametrize("method, said, releases, key", CASES)
def test_what_is_known_to_go_wrong_is_refused_and_nothing_else(
    method: str, said: dict[str, Any], releases: tuple[str, ...], key: str, images: Path
) -> None:
    if method not in hosts.METHODS:
        return
    cfg = case(method, said, images)
    if hosts.RELEASE not in releases:
        prepare_pretraining(cfg)
        return
    with pytest.raises(UserError, match=key) as error:
        prepare_pretraining(cfg)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
