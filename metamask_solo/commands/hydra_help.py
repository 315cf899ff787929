"""The help of the commands that have Hydra's command line: usage, files, and every setting."""

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metamask_solo.commands import COMMANDS

OPTIONS = """options:
  -m               a sweep: KEY=1,2,3 runs each (Hydra's multirun)
  --cfg job        print the composed config and stop
  --cfg-check      check and build, without training or writing anything
  --hydra-help     Hydra's own options
  --version        versions of what is installed"""
WIDTH = 100


def help_text(command: str) -> str:
    """What ``metamask-solo pretrain|linear|finetune --help`` prints."""
    from metamask_solo.method.settings import MetaMaskSettings
    from metamask_solo.training.config import Pretraining, Probe
    from metamask_solo.training.endings import config_path, scripts_folder

    kind = "pretrain" if command == "pretrain" else "linear"
    line = COMMANDS[command]
    example = f"--config-path {config_path(f'{kind}/digits')} --config-name metamask.yaml"
    if kind == "linear":
        example += " \\\n    pretrained_feature_extractor=trained_models/metamask/RUN"
    lines = [
        f"usage: metamask-solo {command} --config-path FOLDER --config-name FILE [KEY=VALUE ...]",
        "",
        f"{line[0].upper()}{line[1:]}. Example:",
        f"  metamask-solo {command} {example}",
        "",
        OPTIONS,
        "",
        f"folders of YAML files (--config-path), in {scripts_folder()}:",
        *_files(scripts_folder() / kind),
        "",
        "settings (KEY: default; allowed; meaning):",
        *_settings(Pretraining if command == "pretrain" else Probe),
        "  and every other argument of Lightning's Trainer, such as accelerator, strategy,",
        "  precision, max_time, limit_val_batches, profiler",
    ]
    if command == "pretrain":
        lines += ["", "settings of MetaMask (below method_kwargs.):", *_settings(MetaMaskSettings)]
    return "\n".join(lines)


def _files(kind: Path) -> Iterator[str]:
    for folder in sorted(path for path in kind.iterdir() if path.is_dir()):
        names = sorted(file.stem for file in folder.glob("*.yaml") if file.stem != "base")
        if names:
            head = f"  {kind.name}/{folder.name}: "
            yield textwrap.fill(head + ", ".join(names), WIDTH, subsequent_indent=" " * 6)


def _settings(model: Any) -> Iterator[str]:
    """A line for each setting of a model."""
    from metamask_solo.validation import allowed, fields, shown

    for key, field in fields(model):
        default = "required" if field.is_required() else shown(field.get_default())
        parts = [f"  {key}: {default}", allowed(field), field.description or ""]
        text = "; ".join(filter(None, parts))
        yield textwrap.fill(text, WIDTH, subsequent_indent=" " * 6, break_on_hyphens=False)


def versions() -> str:
    """One line of the versions that matter."""
    from metamask_solo.versions import version_of

    names = ("metamask-solo", "solo-learn", "torch", "lightning", "hydra-core")
    return ", ".join(f"{name} {version_of(name) or 'not installed'}" for name in names)
