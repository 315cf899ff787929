"""Mutated configs: ``pretrain --cfg-check`` accepts or refuses each in one line."""

import copy
import os
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf
from runs import pretrain_config

from metamask_solo.__main__ import main

pytestmark = pytest.mark.usefixtures("small_backbone")
METHODS = ("metamask", "simclr", "barlow_twins")
# what takes the place of a value: of the wrong type, out of range, strange in some other way, or
# valid for another setting
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 7, 10**12, -(10**12), 0.0, 0.5, -0.5, 1e-3, 1e308),
    *(float("nan"), float("inf"), -float("inf"), "", " ", "0", "1e-3", "no", "null", "../.."),
    *("a\tb", "ä\n$", "x" * 300, "${name}", "${nowhere}", "${", "${oc.env:HOME}", "???"),
    *([], [1, 2], [[]], ["a"], [None], {}, {"a": 1}, {"name": "x"}, {1: 2}),
    *("adam", "lars", "adamw", "step", "warmup_cosine", "cosine", "linear", "heads", "plain"),
    *("simclr", "byol", "cifar10", "image_folder", "resnet50", "ddp", "gpu", "16-mixed"),
]


def base_config(method: str, data: Path, out: Path) -> dict[str, Any]:
    cfg: Any = OmegaConf.to_container(pretrain_config(data, out, method))
    cfg["scheduler"] = {"name": "warmup_cosine", "warmup_epochs": 1}
    cfg["knn_eval"] = {"enabled": True, "k": 3, "distance_func": "cosine"}
    if method == "metamask":
        cfg["method_kwargs"] |= {"alpha": 1.0, "temperature": 0.2}
        cfg["method_kwargs"]["mask"] = {"kind": "sigmoid", "optimizer": "adam", "lr": 0.1}
        cfg["method_kwargs"]["meta"] = {"hypergradient": "exact", "trial_lr": 0.1}
    else:
        cfg["method_kwargs"] = {"proj_hidden_dim": 16, "proj_output_dim": 8}
        cfg["method_kwargs"] |= {"temperature": 0.2} if method == "simclr" else {"lamb": 0.1}
    return cfg


def leaves_and_branches(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a nested config."""
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], dict | list):
            yield from leaves_and_branches(node[key])


def mutate(rng: random.Random, node: Any, key: Any) -> None:
    """Replaces, deletes, nests, flattens, misspells or adds."""
    how = rng.choice(["replace"] * 3 + ["delete", "nest", "flatten", "misspell", "add"])
    if how == "replace":
        node[key] = copy.deepcopy(rng.choice(VALUES))
    elif how == "delete":
        del node[key]
    elif how == "nest":
        node[key] = {str(key): node[key]} if rng.random() < 0.5 else [node[key]]
    elif how == "flatten" and isinstance(node[key], dict) and node[key]:
        node[key] = rng.choice(list(node[key].values()))
    elif how == "misspell" and isinstance(key, str):
        at = rng.randrange(len(key) + 1)
        misspelt = key[:at] + rng.choice(["", "x", "_", "."]) + key[at + rng.randrange(2) :]
        node[misspelt] = node.pop(key)
    elif how == "add" and isinstance(node, dict):
        node[rng.choice(["kwargs", "lr", "x", 3, "name", "enabled"])] = rng.choice(VALUES)
    elif how == "add":
        node.append(copy.deepcopy(node[key]))


def mutated(seed: int, data: Path, out: Path) -> str:
    """The text of a config with one to three mutations, now and then of the text itself."""
    rng = random.Random(seed)
    cfg = base_config(rng.choice(METHODS), data, out)
    for _ in range(rng.choice([1, 1, 2, 3])):
        mutate(rng, *rng.choice(list(leaves_and_branches(cfg))))
    text = yaml.safe_dump(cfg, allow_unicode=True)
    if rng.random() < 0.1:
        at = rng.randrange(len(text))
        inserted = rng.choice(["", "\t", ":", "- ", "{", "&a ", "*a", "!!python/name:os "])
        text = text[:at] + inserted + text[at + rng.randrange(8) :]
    return text


@pytest.mark.parametrize(
    "seeds",
    [
        range(25),
        pytest.param(range(1000, 3000), marks=[pytest.mark.soak, pytest.mark.timeout(3600)]),
    ],
)
def test_mutated_configs(
    seeds: range,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["pretrain", "--config-path", str(tmp_path), "--config-name", "run.yaml", "--cfg-check"]
    argv += ["++hydra.run.dir=.", "++hydra.output_subdir=null", "hydra/job_logging=disabled"]
    codes = []
    for seed in seeds:
        (tmp_path / "run.yaml").write_text(mutated(seed, images, tmp_path / "runs"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = main(argv)
        out, errors = capsys.readouterr()
        context = f"seed {seed}: {errors}\n{(tmp_path / 'run.yaml').read_text()}"
        assert code in (0, 2), context
        lines = (errors if code else out).splitlines()
        expected = "metamask-solo pretrain: error: " if code else "ok: "
        assert sum(line.startswith(expected) for line in lines) == 1, context
        assert "Traceback" not in errors and len(lines[-1]) < 2000, context
        assert os.listdir(tmp_path) == ["run.yaml"], context
        codes.append(code)
    assert min(codes.count(0), codes.count(2)) >= 3  # neither everything nor nothing passes
