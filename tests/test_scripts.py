"""The YAML files under scripts/: what they compose to, and that each of them can be trained."""

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
from metamask_solo.data.loaders import pretrain_dataset
from metamask_solo.training.config import read_pretraining_config, read_probe_config

SCRIPTS = Path(__file__).parents[1] / "scripts"
PRETRAIN = sorted(
    file.relative_to(SCRIPTS).as_posix()
    for file in SCRIPTS.glob("pretrain/*/*.yaml")
    if file.name != "base.yaml"
)
LINEAR = sorted(file.relative_to(SCRIPTS).as_posix() for file in SCRIPTS.glob("linear/*/*.yaml"))
DATASETS = sorted({file.split("/")[1] for file in PRETRAIN})
OFFICIAL = "pretrain/cifar/metamask_official.yaml"


@cache
def composed(file: str, *overrides: str) -> DictConfig:
    path = SCRIPTS / file
    with initialize_config_dir(str(path.parent), version_base="1.2"):
        return compose(path.stem, overrides=list(overrides))


def load(file: str, *overrides: str) -> DictConfig:
    """The config that Hydra hands to a program, without any default of the host."""
    cfg = composed(file, *overrides).copy()
    OmegaConf.set_struct(cfg, False)
    return cfg


def complete(file: str, images: Path, *overrides: str) -> DictConfig:
    """The config as a run sees it, checked; a run on class folders takes those in ``images``."""
    cfg = load(file, *overrides)
    if cfg.data.dataset in ("custom", "imagenet", "imagenet100"):
        cfg.data.train_path, cfg.data.val_path = str(images / "train"), str(images / "val")
    if cfg.accelerator == "gpu":  # Lightning refuses it where there is none
        cfg.update(accelerator="cpu", devices=[0], strategy="auto")
    if file.startswith("pretrain/"):
        read_pretraining_config(cfg)
        return hosts.complete_pretrain_config(cfg)
    cfg.pretrained_feature_extractor = "some.ckpt"
    read_probe_config(cfg)
    return hosts.complete_linear_config(cfg)


def values(cfg: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys of a config, and their values."""
    plain = OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else cfg
    if not isinstance(plain, dict):
        return {prefix: plain}
    return {k: v for key in plain for k, v in values(plain[key], f"{prefix}.{key}").items()}


def differences(first: DictConfig, second: DictConfig) -> dict[str, Any]:
    """Dotted keys whose values differ, with the second value."""
    before, after = values(first), values(second)
    keys = before.keys() | after.keys()
    return {k[1:]: after.get(k) for k in keys if before.get(k, ...) != after.get(k, ...)}


@pytest.mark.parametrize("file", PRETRAIN + LINEAR)
def test_a_file_is_accepted_and_its_model_is_built(file: str, images: Path) -> None:
    cfg = complete(file, images)
    assert isinstance(cfg.data.num_workers, int)  # solo-learn's own scripts hand it on to torch
    if file in LINEAR:
        hosts.build_linear(hosts.build_backbone(cfg), cfg)
        return
    if cfg.optimizer.name not in hosts.OPTIMIZERS:  # solo-learn 1.0.2 has no LARS that works
        cfg.optimizer.update(name="sgd", kwargs={})
    model = hosts.build_method(cfg)
    assert (cfg.method == "metamask") == hasattr(model, "mask")


@pytest.mark.parametrize(
    ("dataset", "choice"), [*((name, "") for name in DATASETS), ("custom", "augmentations=small")]
)
def test_the_augmentations_give_two_views(dataset: str, choice: str, images: Path) -> None:
    overrides = ["data.dataset=custom", *filter(None, [choice])]
    cfg = complete(f"pretrain/{dataset}/metamask.yaml", images, *overrides)
    size = cfg.augmentations[0].crop_size
    _, views, label = pretrain_dataset(cfg)[-1]
    assert label == 4
    assert [tuple(view.shape) for view in views] == [(3, size, size)] * 2


def test_every_name_is_used_once() -> None:
    # solo-learn resumes a run by its name: two configs of one name would continue each other
    names = [load(file).name for file in PRETRAIN + LINEAR]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("file", LINEAR)
def test_a_linear_file_fits_its_pretraining(file: str) -> None:
    linear, pretrain = load(file), load(file.replace("linear/", "pretrain/"))
    assert OmegaConf.is_missing(linear, "pretrained_feature_extractor")
    assert linear.backbone.name == pretrain.backbone.name
    for key, value in linear.data.pop("augmentations", {}).items():
        assert pretrain.augmentations[0][key] == value
    pretrain.data.pop("no_labels", None)
    assert linear.data == pretrain.data


VARIANTS = {
    "joint": {"mask.kind": "linear", "meta.enabled": False},
    "fixed_mask": {"meta.enabled": False},
    "heads": {"meta.trial_scope": "heads"},
    "fast": {"meta.every_n_steps": 4, "meta.batch_fraction": 0.5},
}


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_variant_differs_by_its_lines(dataset: str) -> None:
    file = f"pretrain/{dataset}/metamask.yaml"
    for variant, lines in VARIANTS.items():
        changed = differences(load(file), load(file, f"variant={variant}"))
        assert variant.replace("_", "-") in changed.pop("name")
        assert changed == {f"method_kwargs.{key}": value for key, value in lines.items()}
    heads = f"pretrain/{dataset}/metamask_heads.yaml"
    if heads in PRETRAIN:
        assert differences(load(file, "variant=heads"), load(heads)).keys() <= {"name"}


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("baseline", ["simclr", "barlow", "vicreg", "byol"])
def test_a_baseline_differs_by_its_method(dataset: str, baseline: str) -> None:
    file, metamask = f"pretrain/{dataset}/{baseline}.yaml", f"pretrain/{dataset}/metamask.yaml"
    cfg = load(file) if file in PRETRAIN else load(metamask, f"method_kwargs={baseline}")
    allowed = ("name", "method", "momentum.", "optimizer.lr", "scheduler.warmup_start_lr")
    assert "method" in (changed := differences(load(metamask), cfg))
    if baseline == "barlow" and len(cfg.devices) == 1:  # solo-learn's loss is wrong on two
        allowed += ("devices", "optimizer.batch_size")
    assert [key for key in changed if not key.startswith(allowed)] == []


@pytest.mark.parametrize("file", [f for f in PRETRAIN if "metamask" in f and f != OFFICIAL])
def test_neither_loss_drowns_the_other_at_the_start(file: str) -> None:
    cfg = load(file)
    method = cfg.method_kwargs
    barlow = method.scale_loss * method.proj_output_dim
    contrastive = method.alpha * math.log(2 * cfg.optimizer.batch_size - 1)
    assert 0.5 < barlow / contrastive < 2


def test_the_official_run_has_the_papers_settings(images: Path) -> None:
    cfg = complete(OFFICIAL, images)
    assert cfg.optimizer.lr == pytest.approx(1e-3)  # after solo-learn's scaling by batch / 256
    assert (cfg.optimizer.name, cfg.optimizer.kwargs.momentum) == ("sgd", 0.9)
    assert cfg.optimizer.weight_decay == 5e-4
    assert (cfg.optimizer.batch_size, cfg.max_epochs, cfg.data.dataset) == (512, 800, "cifar10")
    assert cfg.augmentations[0].gaussian_blur.prob == 0
    method, mask = cfg.method_kwargs, cfg.method_kwargs.mask
    assert (method.alpha, method.lamb, method.scale_loss) == (10, 5e-3, 1)
    assert (method.temperature, method.contrastive_output_dim) == (0.07, 256)
    assert (method.meta.hypergradient, method.meta.radius) == ("finite_difference", 1e-2)
    assert (mask.kind, mask.optimizer, mask.lr, mask.schedule) == ("sigmoid", "sgd", 1e-3, "cosine")
    assert (mask.momentum, mask.weight_decay) == (0.9, 5e-4)


def test_the_official_rate_is_annealed_without_a_warm_up(images: Path) -> None:
    small = ("method_kwargs.proj_hidden_dim=8", "method_kwargs.proj_output_dim=8")
    small += ("method_kwargs.meta.enabled=False",)
    cfg = complete(OFFICIAL, images, "max_epochs=4", *small)
    rates = []

    class Record(hosts.pl.Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    batch = (torch.arange(2), [torch.randn(2, 3, 8, 8) for _ in range(2)], torch.arange(2))
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = hosts.pl.Trainer(accelerator="cpu", max_epochs=4, callbacks=[Record()], **silent)
    trainer.fit(hosts.build_method(cfg), DataLoader([batch], batch_size=None))
    cosine = [1e-3 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)]
    assert rates == pytest.approx(cosine)


def test_a_packed_data_set_is_one_override_away(images: Path) -> None:
    for file in ("pretrain/cifar/metamask.yaml", "linear/cifar/metamask.yaml"):
        cfg = complete(file, images, "data.dataset=cifar100")
        assert (cfg.data.num_classes, "cifar100" in cfg.name) == (100, True)
    assert complete("linear/cifar/metamask.yaml", images, "data.dataset=stl10").data.num_classes


def test_runs_leave_no_folder_of_hydras_and_sweeps_one(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import hydra\n\n"
        '@hydra.main(version_base="1.2")\n'
        "def main(cfg):\n"
        "    print(cfg.name, cfg.seed, cfg.augmentations[0].num_crops)\n\n"
        "main()\n"
    )
    # as an installed package gives the files, to a program that knows nothing of this project
    folder = "pkg://metamask_solo.scripts.pretrain.stl10"
    command = [sys.executable, program, "--config-path", folder, "--config-name", "metamask.yaml"]

    def run(*arguments: str) -> str:
        settings: Any = {"cwd": tmp_path, "check": True, "capture_output": True, "text": True}
        return str(subprocess.run([*command, *arguments], **settings).stdout)

    assert run("variant=joint") == "joint-stl10 5 2\n"
    assert [path.name for path in tmp_path.iterdir()] == ["program.py"]
    assert run("-m", "variant=joint", "seed=1,2") == "joint-stl10 1 2\njoint-stl10 2 2\n"
    assert {path.name for path in tmp_path.iterdir()} == {"program.py", "multirun"}
