"""Every YAML file under scripts/ is composed, checked, built, and trained for one step."""

import math
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

from metamask_solo import hosts
from metamask_solo.data.datasets import pretrain_dataset
from metamask_solo.training.config_checks import check_linear_config, check_pretrain_config

SCRIPTS = Path(__file__).parents[2] / "scripts"
PRETRAIN = sorted(
    file.relative_to(SCRIPTS).as_posix()
    for file in (SCRIPTS / "pretrain").rglob("*.yaml")
    if file.parent.name != "augmentations" and file.name != "base.yaml"
)
LINEAR = sorted(file.relative_to(SCRIPTS).as_posix() for file in SCRIPTS.glob("linear/*/*.yaml"))
METAMASK = [file for file in PRETRAIN if "metamask" in file or "joint" in file]
DIGITS = ("digits", "textured-digits")

KNOWN = {
    "accelerator": None,
    "augmentations": None,
    "auto_resume": {"enabled", "max_hours"},
    "backbone": {"name", "stem"},
    "checkpoint": {"enabled", "dir", "frequency", "keep_prev"},
    "data": {"dataset", "train_path", "val_path", "format", "num_workers"}
    | {"no_labels", "augmentations"},
    "devices": None,
    "knn_eval": {"enabled", "k", "distance_func"},
    "masked": None,
    "max_epochs": None,
    "method": None,
    "method_kwargs": None,
    "momentum": {"base_tau", "final_tau"},
    "name": None,
    "optimizer": {"name", "batch_size", "lr", "classifier_lr", "weight_decay", "kwargs"},
    "precision": None,
    "pretrain_method": None,
    "pretrained_feature_extractor": None,
    "scheduler": {"name", "warmup_epochs", "warmup_start_lr", "interval", "lr_decay_steps"},
    "seed": None,
    "strategy": None,
    "sync_batchnorm": None,
    "wandb": {"enabled", "entity", "project", "offline"},
}


@cache
def composed(file: str, *overrides: str) -> DictConfig:
    """A file below scripts/ as Hydra composes it, its own settings under ``hydra`` included."""
    path = SCRIPTS / file
    with initialize_config_dir(str(path.parent), version_base="1.2"):
        return compose(path.stem, overrides=list(overrides), return_hydra_config=True)


def load(file: str, *overrides: str) -> DictConfig:
    """The config that Hydra hands to a program, without any default of the host."""
    cfg = composed(file, *overrides).copy()
    OmegaConf.set_struct(cfg, False)
    del cfg.hydra
    return cfg


def complete(file: str, images: Path, *overrides: str) -> DictConfig:
    """The config as a run sees it, checked; a run on class folders takes those in ``images``."""
    cfg = load(file, *overrides)
    if cfg.data.dataset in ("custom", "imagenet", "imagenet100"):
        cfg.data.train_path, cfg.data.val_path = str(images / "train"), str(images / "val")
    if file.startswith("pretrain/"):
        check_pretrain_config(cfg)
        return hosts.complete_pretrain_config(cfg)
    cfg.pretrained_feature_extractor = "some.ckpt"
    check_linear_config(cfg)
    return hosts.complete_linear_config(cfg)


def train(model: Any, batch: Any, **settings: Any) -> None:
    """Trains on one batch over and over, as far as ``settings`` of the trainer say."""
    trainer = hosts.pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(model, DataLoader([batch], batch_size=None))
    assert trainer.global_step == settings.get("max_steps", settings["max_epochs"])
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def differences(one: Any, other: Any, key: str = "") -> dict[str, Any]:
    """Dotted keys whose values differ, with the second value."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return {} if one == other else {key: other}
    found: dict[str, Any] = {}
    for name in one.keys() | other.keys():
        found |= differences(one.get(name), other.get(name), f"{key}.{name}".lstrip("."))
    return found


def plain(file: str) -> dict[str, Any]:
    return OmegaConf.to_container(load(file))  # type: ignore[return-value]


def test_the_catalogue_is_whole() -> None:
    folders = {file.split("/")[1] for file in PRETRAIN}

    assert folders == {"cifar", "custom", "imagenet", "imagenet-100", "stl10", "tiny-imagenet"} | {
        *DIGITS
    }
    assert {file.split("/")[1] for file in LINEAR} == folders
    for folder in folders:
        for name in ("joint", "simclr", "barlow", "metamask", "metamask_heads", "metamask_fast"):
            assert f"pretrain/{folder}/{name}.yaml" in PRETRAIN
        assert f"linear/{folder}/metamask.yaml" in LINEAR


@pytest.mark.parametrize("file", PRETRAIN)
def test_a_pretraining_config_trains_a_step(file: str, images: Path) -> None:
    cfg = complete(file, images)
    model = hosts.build_method(cfg)
    size = cfg.augmentations[0].crop_size
    torch.manual_seed(0)
    views = [torch.randn(2, 3, size, size) for _ in range(2)]
    before = {name: value.clone() for name, value in model.state_dict().items()}

    batch = (torch.arange(2), views, torch.arange(2))
    train(model, batch, max_epochs=cfg.max_epochs, max_steps=1)

    after = model.state_dict()
    first = f"{hosts.BACKBONE_PREFIX}conv1.weight"
    assert not torch.equal(after[first], before[first])
    if cfg.method == "metamask":
        meta = cfg.method_kwargs.meta
        moves = meta.enabled and meta.every_n_steps == 1
        assert torch.equal(after["mask.logits"], before["mask.logits"]) != moves


@pytest.mark.parametrize("file", LINEAR)
def test_a_linear_config_trains_a_step(file: str, images: Path) -> None:
    cfg = complete(file, images)
    model = hosts.build_linear(hosts.build_backbone(cfg), cfg)
    built_in = {"cifar10": 32, "stl10": 96}.get(cfg.data.dataset, 224)
    size = OmegaConf.select(cfg, "data.augmentations.crop_size") or built_in
    torch.manual_seed(0)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    batch = (torch.randn(2, 3, size, size), torch.arange(2))
    train(model, batch, max_epochs=cfg.max_epochs, max_steps=1)

    after = model.state_dict()
    assert not torch.equal(after["classifier.weight"], before["classifier.weight"])
    backbone = [name for name, _ in model.backbone.named_parameters()]
    assert all(torch.equal(after[f"backbone.{n}"], before[f"backbone.{n}"]) for n in backbone)


@pytest.mark.parametrize("folder", sorted({file.rpartition("/")[0] for file in PRETRAIN}))
def test_the_augmentations_give_two_views(folder: str, images: Path) -> None:
    for shared in sorted((SCRIPTS / folder / "augmentations").glob("*.yaml")):
        cfg = complete(
            f"{folder}/metamask.yaml",
            images,
            f"augmentations={shared.name}",
            "data.dataset=custom",
        )
        size = cfg.augmentations[0].crop_size
        _, views, label = pretrain_dataset(cfg)[-1]

        assert label == 4
        assert [tuple(view.shape) for view in views] == [(3, size, size)] * 2
        assert all(view.isfinite().all() for view in views)


@pytest.mark.parametrize("file", PRETRAIN + LINEAR)
def test_a_config_has_known_keys_only(file: str) -> None:
    cfg = plain(file)

    assert cfg.keys() <= KNOWN.keys()
    for key, allowed in KNOWN.items():
        if allowed is not None and key in cfg:
            assert cfg[key].keys() <= allowed, key


@pytest.mark.parametrize("file", PRETRAIN + LINEAR)
def test_a_run_makes_no_hydra_folder(file: str) -> None:
    hydra = composed(file).hydra

    assert hydra.run.dir == "."
    assert hydra.output_subdir is None
    assert hydra.sweep.dir.startswith("multirun/")
    assert "handlers" not in hydra.hydra_logging and "handlers" not in hydra.job_logging


def test_every_name_is_given_once() -> None:
    # solo-learn resumes a run by its name: two configs of one name would continue each other
    names = [load(file).name for file in PRETRAIN + LINEAR]

    assert len(set(names)) == len(names)


@pytest.mark.parametrize("file", LINEAR)
def test_a_linear_config_fits_its_pretraining(file: str) -> None:
    linear, pretrain = plain(file), plain(file.replace("linear/", "pretrain/"))

    assert OmegaConf.is_missing(load(file), "pretrained_feature_extractor")
    assert linear["pretrain_method"] == pretrain["method"]
    assert pretrain["backbone"].pop("stem", None) is None  # a probe reads it off the weights
    assert linear["backbone"] == pretrain["backbone"]
    given = linear["data"].pop("augmentations", {})
    pretrain["data"].pop("no_labels", None)
    assert linear["data"] == pretrain["data"]
    for key, value in given.items():
        assert pretrain["augmentations"][0][key] == value


@pytest.mark.parametrize("folder", DIGITS)
@pytest.mark.parametrize("baseline", ["simclr", "barlow", "vicreg", "byol"])
def test_a_baseline_differs_by_its_method_only(folder: str, baseline: str) -> None:
    metamask = plain(f"pretrain/{folder}/metamask.yaml")
    other = plain(f"pretrain/{folder}/{baseline}.yaml")
    own = ("name", "method", "method_kwargs", "momentum")

    shared = [{k: v for k, v in cfg.items() if k not in own} for cfg in (metamask, other)]
    assert differences(*shared).keys() <= {"optimizer.lr"}


ABLATIONS = {
    "joint": {"mask.kind": "linear", "meta.enabled": False},
    "metamask_fixed_mask": {"meta.enabled": False},
    "metamask_plain_gradient": {"meta.hypergradient": "plain"},
    "metamask_first_order": {"meta.hypergradient": "first_order"},
    "metamask_finite_difference": {"meta.hypergradient": "finite_difference"},
    "metamask_heads": {"meta.trial_scope": "heads"},
}


@pytest.mark.parametrize("folder", DIGITS)
@pytest.mark.parametrize("ablation", ABLATIONS)
def test_an_ablation_differs_by_its_lines_only(folder: str, ablation: str) -> None:
    metamask = plain(f"pretrain/{folder}/metamask.yaml")
    found = differences(metamask, plain(f"pretrain/{folder}/{ablation}.yaml"))

    assert found.pop("name") == f"{ablation.replace('_', '-')}-{folder}"
    assert found == {f"method_kwargs.{key}": value for key, value in ABLATIONS[ablation].items()}


@pytest.mark.parametrize("file", [f for f in PRETRAIN if f.endswith(("_fast.yaml", "_heads.yaml"))])
def test_a_cheap_config_differs_by_the_mask_update_only(file: str) -> None:
    paper = file.replace("_fast", "").replace("_heads", "")
    found = differences(plain(paper), plain(file))

    assert found.pop("name")
    assert found
    assert all(key.startswith("method_kwargs.meta.") for key in found)


@pytest.mark.parametrize("file", [f for f in METAMASK if "official" not in f])
def test_neither_loss_drowns_the_other_at_the_start(file: str) -> None:
    cfg = load(file)
    method = cfg.method_kwargs
    barlow = method.scale_loss * method.proj_output_dim
    contrastive = method.alpha * math.log(2 * cfg.optimizer.batch_size - 1)

    assert 0.5 < barlow / contrastive < 2


@pytest.mark.parametrize("variant", ["metamask_official", "metamask_official_fixed_rate"])
def test_the_official_run_has_the_papers_settings(variant: str, images: Path) -> None:
    cfg = complete(f"pretrain/cifar/{variant}.yaml", images)
    fixed = variant.endswith("fixed_rate")

    assert cfg.optimizer.lr == pytest.approx(1e-3)  # after solo-learn's scaling by batch / 256
    assert (cfg.optimizer.name, cfg.optimizer.kwargs.momentum) == ("sgd", 0.9)
    assert cfg.optimizer.weight_decay == 5e-4
    assert (cfg.optimizer.batch_size, cfg.max_epochs, cfg.data.dataset) == (512, 800, "cifar10")
    assert cfg.scheduler.name == ("none" if fixed else "warmup_cosine")
    assert (cfg.scheduler.warmup_epochs, cfg.scheduler.interval) == (0, "epoch")
    assert cfg.augmentations[0].gaussian_blur.prob == 0
    method = cfg.method_kwargs
    assert (method.alpha, method.lamb, method.scale_loss) == (10, 5e-3, 1)
    assert (method.temperature, method.contrastive_output_dim) == (0.07, 256)
    assert (method.meta.hypergradient, method.meta.radius) == ("finite_difference", 1e-2)
    mask = method.mask
    assert (mask.kind, mask.optimizer, mask.lr) == ("sigmoid", "sgd", 1e-3)
    assert (mask.momentum, mask.weight_decay) == (0.9, 5e-4)
    assert mask.schedule == ("fixed" if fixed else "cosine")


def test_the_official_rate_is_annealed_without_a_warm_up(images: Path) -> None:
    small = ("method_kwargs.proj_hidden_dim=8", "method_kwargs.proj_output_dim=8")
    cfg = complete("pretrain/cifar/metamask_official.yaml", images, "max_epochs=4", *small)
    model = hosts.build_method(cfg)
    views = [torch.randn(2, 3, 8, 8) for _ in range(2)]
    rates = []

    class Record(hosts.pl.Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    # the meta-update has no part in this
    model.settings.meta.enabled = False
    batch = (torch.arange(2), views, torch.arange(2))
    train(model, batch, max_epochs=4, callbacks=[Record()])

    cosine = [1e-3 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)]
    assert rates == pytest.approx(cosine)


def test_cifar100_is_one_override_away(images: Path) -> None:
    for file in ("pretrain/cifar/metamask.yaml", "linear/cifar/metamask.yaml"):
        assert complete(file, images, "data.dataset=cifar100").data.num_classes == 100


def test_a_sweep_keeps_its_jobs_under_multirun(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import hydra\n\n"
        '@hydra.main(version_base="1.2")\n'
        "def main(cfg):\n"
        "    print(cfg.name, cfg.seed, cfg.augmentations[0].num_crops)\n\n"
        "main()\n"
    )
    command = [sys.executable, program, "--config-path", SCRIPTS / "pretrain/digits"]
    command += ["--config-name", "joint"]
    once = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert once.stdout == "joint-digits 5 2\n"
    assert [path.name for path in tmp_path.iterdir()] == ["program.py"]

    sweep = [*command, "-m", "seed=1,2"]
    many = subprocess.run(sweep, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert many.stdout == "joint-digits 1 2\njoint-digits 2 2\n"
    assert {path.name for path in tmp_path.iterdir()} == {"program.py", "multirun"}
