"""Checkpoints of untrained runs, for the tests of what reads checkpoints."""

import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from runs import pretrain_config

from metamask_solo.hosts import build_method, complete_pretrain_config


def write_run(folder: Path, data: Path, method: str = "metamask", **changes: Any) -> Path:
    """A checkpoint of ``metamask`` with a random mask, or of ``simclr``, and its args.json."""
    torch.manual_seed(0)
    config = pretrain_config(data, folder, method, **changes)
    if method == "simclr":
        config.method_kwargs = {"proj_hidden_dim": 16, "proj_output_dim": 8, "temperature": 0.2}
    config = complete_pretrain_config(config)
    model = build_method(config)
    content = {"epoch": 0, "global_step": 2, "state_dict": model.state_dict()}
    if method == "metamask":
        with torch.no_grad():
            model.mask.logits.normal_(std=3.0)
        content["metamask"] = {"kind": "sigmoid"}
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(OmegaConf.to_container(config)))
    torch.save(content, folder / "run.ckpt")
    return folder / "run.ckpt"
