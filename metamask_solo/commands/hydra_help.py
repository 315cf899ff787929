"""The help of the commands that have Hydra's command line: usage, files, and every setting."""

import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Row = tuple[str, str, str, str]

USAGE = {
    "pretrain": "pretrain any method of solo-learn",
    "linear": "train a linear probe on a checkpoint's frozen features",
    "finetune": "train backbone and classifier, starting from a checkpoint",
}
WIDTH = 100


def rows_of(command: str) -> list[Row]:
    """The settings of a command in the order of the help, without the method's own."""
    from metamask_solo.training.run_config import Pretraining, Probe, TrainerArguments

    model = Pretraining if command == "pretrain" else Probe
    return [row for row in rows_of_model(model) if row[0] not in TrainerArguments.model_fields]


def rows_of_model(model: Any) -> Iterator[Row]:
    """Key, default, what is allowed, and meaning of each setting of a model."""
    from metamask_solo.validation import allowed, fields, shown

    for key, field in fields(model, numbered="N"):
        default = "none: required" if field.is_required() else shown(field.default)
        yield key, default, allowed(field), field.description or ""


def help_text(command: str) -> str:
    """What ``metamask-solo pretrain|linear|finetune --help`` prints."""
    from metamask_solo.method.settings import MetaMaskSettings
    from metamask_solo.training.endings import config_path, scripts_folder

    kind = "pretrain" if command == "pretrain" else "linear"
    example = f"--config-path {config_path(f'{kind}/digits')} --config-name metamask.yaml"
    run = ""
    if kind == "linear":
        run = " \\\n    pretrained_feature_extractor=trained_models/metamask/RUN"
    lines = [
        f"usage: metamask-solo {command} --config-path FOLDER --config-name FILE [KEY=VALUE ...]",
        "",
        f"{USAGE[command][0].upper()}{USAGE[command][1:]}, as a YAML file says. Example:",
        f"  metamask-solo {command} {example}{run}",
        "",
        "options:",
        "  -m               a sweep: KEY=1,2,3 runs each (Hydra's multirun)",
        "  --cfg job        print the composed config and stop",
    ]
    lines += [
        "  --cfg-check      check and build, without training or writing anything",
        "  --hydra-help     Hydra's own options",
        "  --version        versions of what is installed",
        "",
        f"folders of YAML files (--config-path), in {scripts_folder()}:",
        *_files(scripts_folder() / kind),
        "",
        "settings (KEY: default; allowed; meaning):",
        *_table(rows_of(command)),
        "  and every argument of Lightning's Trainer, such as max_epochs, devices, accelerator,",
        "  strategy, precision, accumulate_grad_batches, gradient_clip_val",
    ]
    if command == "pretrain":
        title = "settings of MetaMask (below method_kwargs.):"
        lines += ["", title, *_table(rows_of_model(MetaMaskSettings))]
    return "\n".join(lines)


def _files(kind: Path) -> Iterator[str]:
    for folder in sorted(path for path in kind.iterdir() if path.is_dir()):
        names = sorted(file.stem for file in folder.glob("*.yaml") if file.stem != "base")
        if names:
            head = f"  {kind.name}/{folder.name}: "
            yield textwrap.fill(head + ", ".join(names), WIDTH, subsequent_indent=" " * 6)


def _table(rows: Iterable[Row]) -> Iterator[str]:
    for key, default, allowed, meaning in rows:
        text = f"  {key}: {default}; {allowed}" + (f"; {meaning}" if meaning else "")
        yield textwrap.fill(text, WIDTH, subsequent_indent=" " * 6, break_on_hyphens=False)


def versions() -> str:
    """One line of the versions that matter."""
    from importlib.metadata import PackageNotFoundError, version

    def found(name: str) -> str:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            return f"{name} not installed"

    import metamask_solo

    names = ("solo-learn", "torch", "lightning", "hydra-core")
    return "metamask-solo " + ", ".join([metamask_solo.__version__, *map(found, names)])
