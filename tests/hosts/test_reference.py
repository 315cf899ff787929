"""Ten steps of solo-learn's methods by our run, and by what solo-learn does itself.

On GitHub main that is its own script, step by step: its config, data sets, model and Lightning. Of
1.0.2 no script runs with today's Lightning: its class takes plain steps, at the rates of main.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from runs import pretrain_config, train, write_images

from metamask_solo import hosts

STEPS, EPOCHS = 10, 2
SETTINGS: dict[str, dict[str, Any]] = {
    "simclr": {"proj_hidden_dim": 16, "proj_output_dim": 8, "temperature": 0.2},
    "barlow_twins": {"proj_hidden_dim": 16, "proj_output_dim": 8},
    "byol": {"proj_hidden_dim": 16, "proj_output_dim": 8, "pred_hidden_dim": 16},
    "simsiam": {"proj_hidden_dim": 16, "proj_output_dim": 8, "pred_hidden_dim": 16},
}


class Record(hosts.pl.Callback):  # type: ignore[name-defined]
    """Weights at the start, and batch, loss and rates of each step."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}
        self.batches: list[Any] = []
        self.losses: list[float] = []
        self.rates: list[list[float]] = []

    def on_fit_start(self, trainer: Any, model: Any) -> None:
        self.weights = {name: value.clone() for name, value in model.state_dict().items()}

    def on_train_batch_end(
        self, trainer: Any, model: Any, outputs: Any, batch: Any, i: int
    ) -> None:
        self.batches.append(batch)
        self.losses.append(float(outputs["loss"]))

    def on_before_optimizer_step(self, trainer: Any, model: Any, optimizer: Any) -> None:
        self.rates.append([group["lr"] for group in optimizer.param_groups])


def config(method: str, images: Path, out: Path) -> DictConfig:
    cfg = pretrain_config(images, out, method, max_epochs=EPOCHS, method_kwargs=SETTINGS[method])
    cfg.optimizer.batch_size = 8  # 40 images: 5 steps an epoch
    cfg.optimizer.update({"lr": 1.0, "weight_decay": 1e-3})
    cfg.scheduler = {"name": "warmup_cosine", "warmup_epochs": 1, "min_lr": 0.01}
    cfg.momentum = {"base_tau": 0.9, "final_tau": 1.0}
    cfg.augmentations[0].rrc.enabled = hosts.RELEASE != "main"  # 1.0.2 always crops
    cfg.augmentations[0].rrc.crop_min_scale = 1.0
    cfg.augmentations[0].horizontal_flip.prob = 0.0
    cfg.data.val_path = None
    if hosts.RELEASE == "main":
        cfg.optimizer.exclude_bias_n_norm_wd = True
    return cfg


def by_github_main(cfg: DictConfig, ours: Record) -> Record:
    """What main_pretrain.py does, on the images of our run in their order."""
    from solo.args.pretrain import parse_cfg
    from solo.data.pretrain_dataloader import (
        FullTransformPipeline,
        NCropAugmentation,
        build_transform_pipeline,
        prepare_datasets,
    )
    from solo.utils.misc import make_contiguous

    cfg.devices = [0]
    cfg = parse_cfg(cfg)
    model = hosts.METHODS[cfg.method](cfg)
    make_contiguous(model)
    model = model.to(memory_format=torch.channels_last)
    model.load_state_dict(ours.weights)
    (aug,) = cfg.augmentations
    pipeline = NCropAugmentation(build_transform_pipeline("custom", aug), aug.num_crops)
    data = prepare_datasets(
        "custom", FullTransformPipeline([pipeline]), train_data_path=cfg.data.train_path
    )
    indices = [int(i) for batch in ours.batches for i in batch[0]]
    epoch = len(indices) // EPOCHS
    loaders = [
        torch.utils.data.DataLoader(data, 8, sampler=indices[start : start + epoch])
        for start in range(0, len(indices), epoch)
    ]
    model.train_dataloader = lambda: loaders[model.current_epoch]
    record = Record()
    hosts.pl.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        callbacks=[record],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        reload_dataloaders_every_n_epochs=1,
    ).fit(model)
    return record


def by_plain_steps(cfg: DictConfig, ours: Record) -> Record:
    """The method of 1.0.2, torch's SGD, and the rates of GitHub main by their formula."""
    lr, decay = 8 / 256, 1e-3
    model: Any = hosts.build_method(
        hosts.complete_pretrain_config(OmegaConf.merge(cfg, {"devices": [0]}))
    )
    model.load_state_dict(ours.weights)
    groups = []
    for group in model.learnable_params:
        rates = {"base": group.get("lr", lr), "fixed": group.get("static_lr", False), "lr": lr}
        some = group.get("weight_decay", decay)
        groups.append({"params": group["params"], "weight_decay": some, **rates})
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    record, warmup = Record(), STEPS // EPOCHS
    for step, batch in enumerate(ours.batches):
        for group in optimizer.param_groups:
            base, share = group["base"], (step - warmup) / (STEPS - warmup)
            rise = 3e-5 + (base - 3e-5) * step / (warmup - 1)
            fall = 0.01 + (base - 0.01) * (1 + math.cos(math.pi * share)) / 2
            if group["fixed"] and step > 0:  # it is fixed from the second step on
                group["lr"] = base
            else:
                group["lr"] = rise if step < warmup else fall
        record.rates.append([group["lr"] for group in optimizer.param_groups])
        loss = model.training_step(batch, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        record.losses.append(float(loss.detach()))
        if hasattr(model, "momentum_updater"):
            for pair in model.momentum_pairs:
                model.momentum_updater.update(*pair)
            model.momentum_updater.update_tau(step + 1, STEPS)
    return record


@pytest.fixture(scope="module")
def forty_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("forty"), train=8)


@pytest.mark.filterwarnings("ignore:You are trying to .self.log")
@pytest.mark.parametrize("method", SETTINGS)
def test_ten_steps_are_those_of_solo_learn(method: str, forty_images: Path, tmp_path: Path) -> None:
    ours = Record()
    train(config(method, forty_images, tmp_path), ours)
    by_itself = by_github_main if hosts.RELEASE == "main" else by_plain_steps
    theirs = by_itself(config(method, forty_images, tmp_path), ours)
    assert len(ours.losses) == STEPS
    assert len(set(ours.losses)) == STEPS
    assert ours.rates == [pytest.approx(rates, rel=1e-6) for rates in theirs.rates]
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-6)


@pytest.mark.parametrize(
    "epochs, changes, warmup, end",
    [
        (0, {}, 0, 10),
        (0.05, {}, 0, 10),  # a quarter of a step
        (0.5, {}, 2, 10),  # 2.5
        (0.7, {}, 4, 10),  # 3.5
        (1, {"max_steps": 9}, 5, 9),
        (2, {}, 10, 10),
        (1.5, {"max_epochs": 4, "scheduler__interval": "epoch"}, 2, 4),
    ],
)
def test_a_warm_up_is_rounded_and_each_group_has_its_own_cosine(
    epochs: float,
    changes: dict[str, Any],
    warmup: int,
    end: int,
    forty_images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """GitHub main's schedule would multiply the rates of a run whose warm-up is not whole."""
    cfg = config("simclr", forty_images, tmp_path)
    cfg.scheduler = {"name": "warmup_cosine", "warmup_epochs": epochs}
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value, force_add=True)
    ours = Record()
    train(cfg, ours, small=True)
    assert ("ends within the warm-up" in capsys.readouterr().err) == (warmup >= end)
    for step, rates in enumerate(ours.rates):
        at = step if end > 4 else step // 5
        rise = at / max(1, warmup - 1)
        fall = (1 + math.cos(math.pi * (at - warmup) / max(1, end - warmup))) / 2
        expected = {
            3e-5 + rise * (base - 3e-5) if at < warmup else fall * base for base in (8 / 256, 0.1)
        }
        assert sorted(set(rates)) == pytest.approx(sorted(expected))
