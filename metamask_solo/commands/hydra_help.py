"""The help of the commands that have Hydra's command line: usage, files, and every setting."""

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

Row = tuple[str, str, str, str]

USAGE = {
    "pretrain": "pretrain any method of solo-learn",
    "linear": "train a linear probe on a checkpoint's frozen features",
    "finetune": "train backbone and classifier, starting from a checkpoint",
}
WIDTH = 100
SCALED = "scaled by images a step / 256"
# key, default, what is allowed, meaning
BOTH: tuple[Row, ...] = (
    ("name", "none: required", "text", "of the run; a stopped run is found again by it"),
    ("seed", "5", "0 to 2^32 - 1", "of weights, order and augmentations"),
    ("resume_from_checkpoint", "null", "a .ckpt file", "to go on from, in a run of its own"),
    (
        "started_from",
        "null",
        "set by the command",
        "identity of the checkpoint that a run began at",
    ),
    ("backbone.name", "none: required", "a name of solo-learn's", "such as resnet18 or vit_tiny"),
    ("backbone.stem", "null", "3x3, standard", "of a ResNet; null: 3x3 for CIFAR, else standard"),
    ("backbone.kwargs", "{}", "what the backbone takes", "such as img_size of a ViT"),
    (
        "data.dataset",
        "none: required",
        "cifar10, cifar100, stl10, imagenet, imagenet100, custom",
        "",
    ),
    ("data.train_path", "none: required", "a folder", "class folders, or torchvision's files"),
    ("data.val_path", "null", "a folder", "the same for validation; a probe needs it"),
    ("data.format", "image_folder", "image_folder", ""),
    ("data.num_workers", "4", "0 or more", "processes that read images"),
    ("data.persistent_workers", "true", "true, false", "keep them from epoch to epoch"),
    ("data.fraction", "-1", "-1, or above 0 and below 1", "part of the training images"),
    ("data.no_labels", "false", "true, false", "pretrain on all images below train_path"),
    ("data.background", "0", "0 to 255, or three of them", "what is behind transparent pixels"),
    ("data.exif_orientation", "false", "true, false", "turn images as their camera says"),
    ("optimizer.name", "none: required", "sgd, lars, adam, adamw", ""),
    ("optimizer.batch_size", "none: required", "2 or more", "of one process"),
    ("optimizer.lr", "none: required", "0 or more", f"learning rate, {SCALED}"),
    ("optimizer.weight_decay", "none: required", "0 or more", ""),
    ("optimizer.exclude_bias_n_norm_wd", "false", "true, false", "no decay of biases and norms"),
    ("optimizer.kwargs", "{}", "what the optimiser takes", "momentum, eta, betas, …"),
    (
        "scheduler.name",
        "none: required",
        "none, warmup_cosine, cosine, step",
        "a probe: reduce too",
    ),
    ("scheduler.warmup_epochs", "10", "0 or more", ""),
    ("scheduler.warmup_start_lr", "3e-5", "0 or more", ""),
    ("scheduler.min_lr", "0", "0 or more", "at the end of the cosine"),
    ("scheduler.lr_decay_steps", "null", "a list of epochs", "with step: times 0.1 at each"),
    ("scheduler.interval", "step", "step, epoch", "how often the rate changes"),
    ("scheduler.gamma", "0.1", "a number", "factor of step"),
    ("checkpoint.enabled", "false", "true, false", "the files have it on"),
    ("checkpoint.dir", "trained_models", "a folder", "gets METHOD/RUN, or linear/RUN"),
    ("checkpoint.frequency", "1", "1 or more", "epochs from one to the next"),
    ("checkpoint.keep_prev", "false", "true, false", "keep the earlier ones"),
    ("auto_resume.enabled", "false", "true, false", "continue a stopped run of the same config"),
    ("auto_resume.max_hours", "36", "1 or more", "its age at most"),
    ("wandb.enabled", "false", "true, false", "log to Weights & Biases"),
    ("wandb.entity", "null", "text", ""),
    ("wandb.project", "solo-learn", "text", ""),
    ("wandb.offline", "false", "true, false", ""),
    ("performance.disable_channel_last", "false", "true, false", "GitHub main only"),
    ("performance.compile", "false", "true, false", "torch.compile of the backbone"),
)
OF_PRETRAIN: tuple[Row, ...] = (
    ("method", "none: required", "a method of solo-learn's, or metamask", ""),
    ("method_kwargs", "{}", "the method's own settings", "MetaMask's stand below"),
    ("fold_at_end", "true", "true, false", "write MetaMask's folded checkpoint too"),
    ("optimizer.classifier_lr", "optimizer.lr", "0 or more", f"of the online classifier, {SCALED}"),
    ("momentum.base_tau", "0.99", "0 to 1", "BYOL and its like: of the teacher, at the start"),
    ("momentum.final_tau", "1", "0 to 1", "and at the end"),
    ("momentum.classifier", "false", "true, false", "a classifier on the teacher too"),
    ("knn_eval.enabled", "false", "true, false", "online kNN at each validation"),
    ("knn_eval.k", "20", "1 or more", "its neighbours"),
    ("knn_eval.distance_func", "euclidean", "cosine, euclidean", "the files have cosine"),
    (
        "augmentations",
        "none: required",
        "a list of pipelines",
        "or a file's name: augmentations=small",
    ),
    ("augmentations.N.rrc.enabled", "true", "true, false", "random resized crop"),
    ("augmentations.N.rrc.crop_min_scale", "0.08", "0 to 1", "least part of the area"),
    ("augmentations.N.rrc.crop_max_scale", "1", "0 to 1", ""),
    ("augmentations.N.color_jitter.prob", "none: required", "0 to 1", ""),
    ("augmentations.N.color_jitter.brightness", "0", "0 or more", ""),
    ("augmentations.N.color_jitter.contrast", "0", "0 or more", ""),
    ("augmentations.N.color_jitter.saturation", "0", "0 or more", ""),
    ("augmentations.N.color_jitter.hue", "0", "0 to 0.5", ""),
    ("augmentations.N.grayscale.prob", "none: required", "0 to 1", ""),
    ("augmentations.N.gaussian_blur.prob", "none: required", "0 to 1", ""),
    ("augmentations.N.solarization.prob", "none: required", "0 to 1", ""),
    ("augmentations.N.equalization.prob", "none: required", "0 to 1", ""),
    ("augmentations.N.horizontal_flip.prob", "none: required", "0 to 1", ""),
    ("augmentations.N.crop_size", "none: required", "1 to 10000", "pixels"),
    ("augmentations.N.num_crops", "none: required", "1 to 10000", "MetaMask: 2 in all"),
    ("augmentations.N.mean", "ImageNet's", "three numbers", "custom data only"),
    ("augmentations.N.std", "ImageNet's", "three numbers above 0", "custom data only"),
)
OF_LINEAR: tuple[Row, ...] = (
    ("pretrained_feature_extractor", "none: required", "a run's folder, or .ckpt file", ""),
    ("pretrain_method", "null", "a method's name", "for the record"),
    ("masked", "null", "true, false", "features of MetaMask; null: masked where there is a mask"),
    ("finetune", "false", "true, false", "train the backbone too"),
    ("auto_augment", "false", "true, false", "timm's RandAugment"),
    ("label_smoothing", "0", "0 to 1", "GitHub main only, as the next two"),
    ("mixup", "0", "0 or more", ""),
    ("cutmix", "0", "0 or more", ""),
    ("optimizer.layer_decay", "0", "0 to 1", "fine-tuning a ViT"),
    ("data.augmentations.crop_size", "the run's", "1 or more", "pixels"),
    ("data.augmentations.mean", "the run's", "three numbers", ""),
    ("data.augmentations.std", "the run's", "three numbers above 0", ""),
    ("data.augmentations.crop_min_scale", "the run's", "0 to 1", "least part of a random crop"),
    ("data.augmentations.horizontal_flip", "the run's", "0 to 1", "probability"),
)


def rows_of(command: str) -> tuple[Row, ...]:
    """The settings of a command in the order of the help, without the method's own."""
    return (*BOTH, *(OF_PRETRAIN if command == "pretrain" else OF_LINEAR))


def help_text(command: str) -> str:
    """What ``metamask-solo pretrain|linear|finetune --help`` prints."""
    from metamask_solo.training.endings import config_path

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
    if command == "pretrain":
        lines.append("  --cfg-check      check and build, without training or writing anything")
    lines += [
        "  --hydra-help     Hydra's own options",
        "  --version        versions of what is installed",
        "",
        f"folders of YAML files (--config-path), in {scripts()}:",
        *_files(kind),
        "",
        "settings (KEY: default; allowed; meaning):",
        *_table(rows_of(command)),
        "  and every argument of Lightning's Trainer, such as max_epochs, devices, accelerator,",
        "  strategy, precision, accumulate_grad_batches, gradient_clip_val",
    ]
    if command == "pretrain":
        lines += ["", "settings of MetaMask (below method_kwargs.):", *_table(_own())]
    return "\n".join(lines)


def scripts() -> Path:
    """Where the YAML files are: in the repository, or installed with the package."""
    package = Path(__file__).resolve().parents[1]
    beside = package.parent / "scripts"
    return beside if beside.is_dir() else package / "scripts"


def _files(kind: str) -> Iterator[str]:
    for folder in sorted(path for path in (scripts() / kind).iterdir() if path.is_dir()):
        names = sorted(file.stem for file in folder.glob("*.yaml") if file.stem != "base")
        if names:
            head = f"  {kind}/{folder.name}: "
            yield textwrap.fill(head + ", ".join(names), WIDTH, subsequent_indent=" " * 6)


def _table(rows: Sequence[Row]) -> Iterator[str]:
    for key, default, allowed, meaning in rows:
        text = f"  {key}: {default}; {allowed}" + (f"; {meaning}" if meaning else "")
        yield textwrap.fill(text, WIDTH, subsequent_indent=" " * 6, break_on_hyphens=False)


def _own() -> list[Row]:
    from metamask_solo.method.settings import SETTINGS
    from metamask_solo.validation import allowed, shown

    return [
        (key, shown(field.default), allowed(field), str(field.description))
        for key, field in SETTINGS.items()
    ]


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
