"""What a release is known to do wrong is refused; what is beside it, and right, is not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from method_settings import KWARGS
from omegaconf import OmegaConf
from runs import pretrain_config
from solo.losses.barlow import barlow_loss_func
from solo.losses.simclr import simclr_loss_func
from solo.losses.vicreg import vicreg_loss_func
from torch import Tensor

from metamask_solo import hosts
from metamask_solo.errors import UserError
from metamask_solo.training.pretrain import prepare_pretraining

TWO = {"devices": 2}
BOTH, OLD, MAIN = ("main", "1.0.2"), ("1.0.2",), ("main",)
KNN = {"knn_eval.enabled": True}
SMALL = {"small": 2}
COSINE = {"scheduler.name": "warmup_cosine", "scheduler.warmup_epochs": 1}
DINO_WARMUP = "method_kwargs.warmup_teacher_temperature_epochs"
# method, what a file says (20 images, 10 a step), releases that refuse it, and the key
CASES: list[tuple[str, dict[str, Any], tuple[str, ...], str]] = [
    ("barlow_twins", TWO, BOTH, "devices="),
    ("simclr", TWO, OLD, "devices="),
    ("vicreg", TWO, OLD, "devices="),
    ("nnclr", {**TWO, "method_kwargs.queue_size": 40}, OLD, "devices="),
    ("byol", TWO, (), ""),
    ("metamask", TWO, (), ""),
    ("simclr", {"optimizer.name": "lars"}, OLD, "optimizer.name=lars"),
    ("simclr", {"optimizer.exclude_bias_n_norm_wd": True}, OLD, "exclude_bias_n_norm_wd=True"),
    ("simclr", {"num_crops": 3}, BOTH, "data.num_large_crops=3"),
    ("wmse", {"num_crops": 3}, (), ""),
    ("simclr", SMALL, (), ""),
    ("byol", SMALL, (), ""),
    ("vicreg", SMALL, BOTH, "data.num_small_crops=2"),
    ("swav", SMALL, OLD, "data.num_small_crops=2"),
    ("simclr", {"backbone.name": "vit_tiny"}, (), ""),
    ("mocov2plus", {"method_kwargs.queue_size": 45}, BOTH, "queue_size=45"),
    ("mocov2plus", {"optimizer.batch_size": 12}, BOTH, "queue_size=40"),
    ("swav", {"method_kwargs.queue_size": 5}, BOTH, "queue_size=5"),
    ("swav", {"method_kwargs.queue_size": 0}, (), ""),
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
]


def case(method: str, said: dict[str, Any], images: Path) -> Any:
    cfg = pretrain_config(images, images, method)
    if method != "metamask":
        sizes = {"proj_hidden_dim": 16, "proj_output_dim": 10}
        cfg.method_kwargs = {**sizes, **KWARGS[method]}
    said = dict(said)
    if said.pop("small", 0):
        pipeline = cfg.augmentations[0].copy()
        pipeline.crop_size, pipeline.num_crops = 16, 2
        cfg.augmentations.append(pipeline)
    for key in ("num_crops", "crop_size"):
        cfg.augmentations[0][key] = said.pop(key, cfg.augmentations[0][key])
    if said.get(DINO_WARMUP, 0) is None:
        del cfg.method_kwargs[DINO_WARMUP.partition(".")[2]], said[DINO_WARMUP]
    for key, value in said.items():
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


# what is refused, measured


@pytest.mark.skipif(hosts.RELEASE == "main", reason="a fault of 1.0.2")
def test_the_lars_that_is_refused_does_go_wrong() -> None:
    from solo.utils.lars import LARSWrapper

    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer: Any = LARSWrapper(torch.optim.SGD([weight], lr=1.0), eta=0.001)

    def closure() -> Tensor:  # as Lightning calls it
        weight.grad = torch.ones(2, 2)
        return weight.sum()

    optimizer.step(closure)
    assert torch.equal(weight, torch.zeros(2, 2))  # a step of SGD: LARS would move by 0.001


PROCESSES, IMAGES = 2, 6


def gradients(weight: Tensor, views: Tensor, indexes: Tensor) -> dict[str, Tensor]:
    """Of solo-learn's losses."""

    def of(loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        leaf = weight.clone().requires_grad_()
        return torch.autograd.grad(loss(*(torch.tanh(view @ leaf) for view in views)), leaf)[0]

    def simclr(z1: Tensor, z2: Tensor) -> Tensor:
        if hosts.RELEASE == "1.0.2":
            return simclr_loss_func(z1, z2, temperature=0.2)
        return simclr_loss_func(torch.cat((z1, z2)), indexes.repeat(2), 0.2)

    barlow = of(lambda z1, z2: barlow_loss_func(z1.float(), z2.float()))
    return {"simclr": of(simclr), "vicreg": of(vicreg_loss_func), "barlow": barlow}


def of_a_process(rank: int, weight: Tensor, shards: list[Tensor], folder: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/meet", rank=rank, world_size=PROCESSES
    )
    indexes = torch.arange(IMAGES) + rank * IMAGES
    # of the same images, each process has the statistics of all
    same = gradients(weight, shards[0], torch.arange(IMAGES))["barlow"]
    made = gradients(weight, shards[rank], indexes)
    torch.save({**made, "barlow": same}, folder / f"{rank}.pt")
    torch.distributed.barrier()


@pytest.mark.ddp
def test_the_losses_that_are_refused_on_several_processes_do_go_wrong(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    shards = [
        torch.randn(2, IMAGES, 4, generator=draw, dtype=torch.float64) for _ in range(PROCESSES)
    ]
    weight, indexes = torch.randn(4, 3, generator=draw, dtype=torch.float64), torch.arange(IMAGES)
    torch.multiprocessing.start_processes(
        of_a_process, (weight, shards, tmp_path), nprocs=PROCESSES, start_method="fork"
    )
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(PROCESSES)]
    # as DDP takes it
    shared = {name: torch.stack([rank[name] for rank in ranks]).mean(0) for name in ranks[0]}

    of_all = gradients(weight, torch.cat(shards, 1), torch.arange(PROCESSES * IMAGES))
    of_each = [gradients(weight, shard, indexes) for shard in shards]
    for name in ("simclr", "vicreg"):
        each = torch.stack([made[name] for made in of_each]).mean(0)
        assert not torch.allclose(of_all[name], each, rtol=1e-2)
        expected = each if hosts.RELEASE == "1.0.2" else of_all[name]
        assert torch.allclose(shared[name], expected, rtol=1e-6)
    assert torch.allclose(shared["barlow"] * PROCESSES, of_each[0]["barlow"], rtol=1e-4)
