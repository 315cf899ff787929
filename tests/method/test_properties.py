"""Properties of the settings, the mask's statistics and folding, on drawn inputs.

Those of the hypergradient are in test_hypergradient.py.
"""

import copy
import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor, nn

from metamask_solo.checkpoints.folding import LARGEST, SMALLEST, fold_mask
from metamask_solo.errors import UserError
from metamask_solo.hosts import build_backbone
from metamask_solo.method import settings as settings_module
from metamask_solo.method.hypergradient import Method
from metamask_solo.method.mask import DimensionalMask, Kind, mask_statistics
from metamask_solo.method.settings import SETTINGS, MetaMaskSettings
from metamask_solo.validation import validated

SIZE = st.integers(1, 4096)
SWITCH = st.booleans()


def real(least: float, most: float = 1e6) -> st.SearchStrategy[float]:
    return st.floats(least, most, allow_nan=False)


# what each setting may be, in words of its own: the paper's ranges, and those of torch
VALID: dict[str, st.SearchStrategy[Any]] = {
    "proj_hidden_dim": SIZE,
    "proj_output_dim": SIZE,
    "contrastive_hidden_dim": SIZE,
    "contrastive_output_dim": SIZE,
    "lamb": real(0),
    "scale_loss": real(0),
    "temperature": real(0.02, 100),
    "alpha": real(0),
    "mask.kind": st.sampled_from(["sigmoid", "linear"]),
    "mask.initial_logit": st.none() | real(-10, -1e-3) | real(1e-3, 10),
    "mask.optimizer": st.sampled_from(["sgd", "adam"]),
    "mask.lr": real(0),
    "mask.momentum": real(0, 0.999),
    "mask.weight_decay": real(0),
    "mask.schedule": st.sampled_from(["fixed", "cosine"]),
    "mask.clip_grad": st.none() | real(1e-6),
    "meta.enabled": SWITCH,
    "meta.hypergradient": st.sampled_from(
        ["exact", "double_backward", "finite_difference", "first_order", "plain"]
    ),
    "meta.radius": real(1e-6),
    "meta.trial_lr": st.none() | real(0),
    "meta.every_n_steps": st.integers(1, 1000),
    "meta.trial_scope": st.sampled_from(["all", "heads"]),
    "meta.batch_fraction": real(1e-6, 1),
}


def resolve_settings(given: Any) -> dict[str, Any]:
    return validated(MetaMaskSettings, given, "method_kwargs.").plain()


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in flat.items():
        group, _, name = key.rpartition(".")
        (result.setdefault(group, {}) if group else result)[name] = value
    return result


def flattened(resolved: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in resolved.items():
        flat |= (
            {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
        )
    return flat


def test_every_setting_is_drawn() -> None:
    assert VALID.keys() == SETTINGS.keys()
    assert (settings_module.Kind, settings_module.Method) == (Kind, Method)


@given(st.fixed_dictionaries({}, optional=VALID))
@settings(deadline=None)
def test_valid_settings_are_kept_and_completed(flat: dict[str, Any]) -> None:
    resolved = resolve_settings(nested(flat))
    assert flattened(resolved) == {k: s.default for k, s in SETTINGS.items()} | flat
    assert resolve_settings(resolved) == resolved
    # as YAML gives them, read back by Hydra's OmegaConf
    text = OmegaConf.to_yaml(OmegaConf.create(nested(flat)))
    again: Any = OmegaConf.to_container(OmegaConf.create(text))
    assert resolve_settings(again) == resolved


ENTRIES = st.floats(-1e6, 1e6, allow_nan=False, width=32)


@given(st.lists(ENTRIES, min_size=1, max_size=40))
@settings(deadline=None)
def test_mask_statistics_are_numpys(entries: list[float]) -> None:
    statistics = {k: float(v) for k, v in mask_statistics(torch.tensor(entries)).items()}
    values = np.array(entries)
    scale = max(1e-30, float(np.abs(values).max()))
    assert statistics["min"] == values.min() and statistics["max"] == values.max()
    assert statistics["mean"] == pytest.approx(values.mean(), abs=1e-6 * scale)
    assert statistics["std"] == pytest.approx(values.std(), abs=1e-6 * scale)
    left = np.count_nonzero(values)
    assert (statistics["effective_dims"] == 0) == (left == 0)
    assert statistics["effective_dims"] <= left + 1e-9
    assert left == 0 or statistics["effective_dims"] >= 1 - 1e-9


@given(
    st.integers(1, 30),
    st.integers(0, 30),
    st.floats(1e-30, 1e30, allow_nan=False),
    st.randoms(use_true_random=False),
)
@settings(deadline=None)
def test_equal_entries_count_one_each(k: int, zeros: int, size: float, rng: Any) -> None:
    entries = [size * rng.choice([-1, 1]) for _ in range(k)] + [0.0] * zeros
    rng.shuffle(entries)
    effective = mask_statistics(torch.tensor(entries, dtype=torch.float64))["effective_dims"]
    assert float(effective) == pytest.approx(k)


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20))
@settings(deadline=None)
def test_a_sigmoid_mask_lies_within_0_and_1(logits: list[float]) -> None:
    module = DimensionalMask(len(logits), "sigmoid")
    module.logits.data.copy_(torch.tensor(logits))
    mask = module.mask()
    assert ((mask >= 0) & (mask <= 1)).all() and mask.isfinite().all()
    # monotone: a larger logit never gives a smaller entry
    order = torch.tensor(logits).argsort()
    assert (mask[order].diff() >= 0).all()


@cache
def backbone_and_features(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A backbone in double precision with random norms, images, and their features."""
    cfg = OmegaConf.create(
        {
            "backbone": {"name": name, "kwargs": {}},
            "method": "metamask",
            "data": {"dataset": "custom", "num_classes": 2},
            "augmentations": [{"crop_size": 32}],
        }
    )
    torch.manual_seed(0)
    backbone = build_backbone(cfg)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    backbone = backbone.double().eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        return backbone, images, backbone(images)


# entries of any size that can be folded, with zeros and entries too small among them
SIZES = st.floats(-58.0, 58.0).map(lambda exponent: 2.0**exponent)
PATTERN = st.lists(SIZES | st.sampled_from([0.0, 1.0, SMALLEST / 4]), min_size=1, max_size=16)


@pytest.mark.slow
@given(PATTERN)
@settings(deadline=None, max_examples=25)
def test_a_folded_resnet_computes_the_masked_features(pattern: list[float]) -> None:
    backbone, images, features = backbone_and_features("resnet18")
    mask = torch.tensor(pattern, dtype=torch.float64).repeat(512)[:512]
    folded = copy.deepcopy(backbone)
    floored = fold_mask(folded, mask, "resnet18")
    assert floored == int((mask < SMALLEST).sum())
    with torch.no_grad():
        result = folded(images)
    expected = features * torch.where(mask < SMALLEST, 0.0, mask)
    # per dimension: sizes differ by dozens of orders
    error = (result - expected).abs().amax(0)
    assert (error <= 1e-9 * (mask * features.abs().amax(0)) + 1e-300).all()


@given(
    PATTERN, st.integers(0, 511), st.sampled_from([-1.0, -1e-3, math.nan, math.inf, LARGEST * 2])
)
@settings(deadline=None, max_examples=15)
def test_a_mask_that_cannot_be_folded_changes_nothing(
    pattern: list[float], place: int, wrong: float
) -> None:
    backbone, _, _ = backbone_and_features("resnet18")
    mask = torch.tensor(pattern, dtype=torch.float64).repeat(512)[:512]
    mask[place] = wrong
    before = copy.deepcopy(backbone.state_dict())
    with pytest.raises(UserError):
        fold_mask(backbone, mask, "resnet18")
    after = backbone.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
