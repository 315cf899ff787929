"""Mutated configs: ``pretrain --cfg-check`` accepts or refuses each in one line."""

import copy
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf
from runs import pretrain_config

from metamask_solo.__main__ import main

METHODS = ("metamask", "simclr", "barlow_twins")
# what takes the place of a value: of the wrong type, out of range, or strange in some other way
VALUES: list[Any] = [None, True, False, 0, 1, -1, 2, 7, 10**12, -(10**12), 0.0, 0.5, -0.5, 1e-3]
VALUES += [1e308, float("nan"), float("inf"), -float("inf"), "", " ", "0", "1e-3", "no", "null"]
VALUES += [
    "../..",
    "a\0b",
    "ä\n$",
    "x" * 300,
    "${name}",
    "${nowhere}",
    "${",
    "${oc.env:HOME}",
    "???",
]
VALUES += [[], [1, 2], [[]], ["a"], [None], {}, {"a": 1}, {"name": "x"}, {1: 2}]
# one valid value of another setting, which may not fit here
VALUES += ["adam", "lars", "adamw", "step", "warmup_cosine", "cosine", "linear", "heads", "plain"]
VALUES += ["simclr", "byol", "cifar10", "image_folder", "resnet50", "ddp", "gpu", "16-mixed"]


def base_config(method: str, data: Path, out: Path) -> dict[str, Any]:
    cfg: Any = OmegaConf.to_container(pretrain_config(data, out, method))
    cfg["scheduler"] = {"name": "warmup_cosine", "warmup_epochs": 1}
    cfg["knn_eval"] = {"enabled": True, "k": 3, "distance_func": "cosine"}
    if method == "metamask":
        cfg["method_kwargs"] |= {"alpha": 1.0, "temperature": 0.2, "mask": {}, "meta": {}}
        cfg["method_kwargs"]["mask"] = {"kind": "sigmoid", "optimizer": "adam", "lr": 0.1}
        cfg["method_kwargs"]["meta"] = {"hypergradient": "exact", "trial_lr": 0.1}
    else:
        cfg["method_kwargs"] = {"proj_hidden_dim": 16, "proj_output_dim": 8}
        cfg["method_kwargs"] |= {"temperature": 0.2} if method == "simclr" else {"lamb": 0.1}
    return cfg


def places(node: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a nested config."""
    keys = list(node) if isinstance(node, dict) else range(len(node))
    found = [(node, key) for key in keys]
    for key in keys:
        if isinstance(node[key], dict | list):
            found += places(node[key])
    return found


def replace(rng: random.Random, node: Any, key: Any) -> None:
    node[key] = copy.deepcopy(rng.choice(VALUES))


def delete(rng: random.Random, node: Any, key: Any) -> None:
    del node[key]


def nest(rng: random.Random, node: Any, key: Any) -> None:
    node[key] = {str(key): node[key]} if rng.random() < 0.5 else [node[key]]


def flatten(rng: random.Random, node: Any, key: Any) -> None:
    if isinstance(node[key], dict) and node[key]:
        node[key] = rng.choice(list(node[key].values()))


def misspell(rng: random.Random, node: Any, key: Any) -> None:
    if isinstance(node, dict) and isinstance(key, str):
        at = rng.randrange(len(key) + 1)
        node[key[:at] + rng.choice(["", "x", "_", "."]) + key[at + rng.randrange(2) :]] = node.pop(
            key
        )


def add(rng: random.Random, node: Any, key: Any) -> None:
    if isinstance(node, dict):
        node[rng.choice(["kwargs", "lr", "momentum", "x", 3, "name", "enabled"])] = rng.choice(
            VALUES
        )
    else:
        node.append(copy.deepcopy(node[key]))


MUTATIONS: list[Callable[[random.Random, Any, Any], None]]
MUTATIONS = [replace, replace, replace, delete, nest, flatten, misspell, add]


def mutated(seed: int, data: Path, out: Path) -> str:
    """The text of a config with one to three mutations, now and then of the text itself."""
    rng = random.Random(seed)
    cfg = base_config(rng.choice(METHODS), data, out)
    for _ in range(rng.choice([1, 1, 2, 3])):
        container, key = rng.choice(places(cfg))
        rng.choice(MUTATIONS)(rng, container, key)
    text = yaml.safe_dump(cfg, allow_unicode=True)
    if rng.random() < 0.1:
        at = rng.randrange(len(text))
        text = (
            text[:at]
            + rng.choice(["", "\t", ":", "- ", "{", "&a ", "*a", "!!python/name:os "])
            + (text[at + rng.randrange(8) :])
        )
    return text


def check(
    seed: int, data: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[bool, str]:
    """Runs the check on one mutated config; returns whether it was accepted, and its last line."""
    (folder / "run.yaml").write_text(mutated(seed, data, folder / "runs"))
    argv = ["pretrain", "--config-path", str(folder), "--config-name", "run.yaml", "--cfg-check"]
    argv += ["++hydra.run.dir=.", "++hydra.output_subdir=null", "hydra/job_logging=disabled"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = main(argv)
    out, errors = capsys.readouterr()
    context = f"seed {seed}: {errors}\n{(folder / 'run.yaml').read_text()}"
    assert code in (0, 2), context
    lines = (errors if code else out).splitlines()
    expected = "metamask-solo pretrain: error: " if code else "ok: "
    assert sum(line.startswith(expected) for line in lines) == 1, context
    assert "Traceback" not in errors and len(lines[-1]) < 2000, context
    assert sorted(os.listdir(folder)) == ["run.yaml"], context
    return code == 0, lines[-1]


def fuzz(
    seeds: range, data: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> dict[bool, int]:
    counts = {True: 0, False: 0}
    for seed in seeds:
        accepted, _ = check(seed, data, folder, capsys)
        counts[accepted] += 1
    return counts


def test_forty_mutated_configs(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    counts = fuzz(range(40), images, tmp_path, capsys)
    assert min(counts.values()) >= 3  # neither everything nor nothing passes


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_two_thousand_mutated_configs(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    counts = fuzz(range(1000, 3000), images, tmp_path, capsys)
    with capsys.disabled():
        print(f"\n2000 mutated configs: {counts[True]} accepted, {counts[False]} refused")
