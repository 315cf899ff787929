"""``metamask-solo demo``: from nothing to a table and a figure, on the digits."""

import argparse
from pathlib import Path
from typing import Any

HELP = "from nothing to a table: data, three methods, two evaluations, one figure"
METHODS = ("metamask", "simclr", "barlow")
# the files that the presets take for MetaMask
PRESETS = {"fast": "metamask_fast", "paper": "metamask"}


def main(argv: list[str]) -> None:
    """Makes the data, pretrains, evaluates; a second call continues where the first stopped."""
    parser = argparse.ArgumentParser(
        "metamask-solo demo",
        description="Makes a data set, pretrains MetaMask, SimCLR and Barlow Twins with "
        "solo-learn's ResNet-18, evaluates each by nearest neighbours and a linear probe, and "
        "ends with a table and a figure.",
    )
    parser.add_argument("--dataset", choices=("digits", "textured-digits"), default="digits")
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        default="fast",
        help="MetaMask with the cheap mask update, or with the paper's at each step",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), help="folder for all that it writes"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides of all runs"
    )
    args = parser.parse_args(argv)

    from metamask_solo.atomic_files import atomic_write
    from metamask_solo.data import digits

    root = args.out / "datasets"
    digits.write_dataset(args.dataset, root)
    data = root / args.dataset
    rows, runs = [*_baselines(args.dataset, data)], {}
    for method in METHODS:
        checkpoint, row = _run(args.dataset, method, data, args)
        rows.append(row)
        runs[method] = checkpoint
    table = _table(rows)
    with atomic_write(args.out / f"{args.dataset}.txt") as path:
        path.write_text(table + "\n")
    figure = args.out / f"{args.dataset}.png"
    _draw(runs, figure)
    print(f"\n{args.dataset}, {args.epochs} epochs; accuracy in % on the val images\n")
    print(table)
    print(f"\nfigure: {figure}   checkpoints: {args.out / 'runs'}")


def _baselines(dataset: str, data: Path) -> list[dict[str, Any]]:
    from metamask_solo.data.images import image_loader
    from metamask_solo.evaluation.features import extract_features
    from metamask_solo.evaluation.linear import evaluate_features
    from metamask_solo.hosts import build_backbone, pl
    from metamask_solo.training.hydra_app import compose_config

    cfg = compose_config(dataset, "simclr", [])
    pl.seed_everything(cfg.seed)
    import torch

    rows = []
    for name, backbone in (
        ("random backbone", build_backbone(cfg)),
        ("raw pixels", torch.nn.Flatten()),
    ):
        features = [
            extract_features(backbone, image_loader(data / split, cfg), label=name)
            for split in ("train", "val")
        ]
        rows.append({"method": name, "seconds": None, **evaluate_features(*features)})
    return rows


def _run(dataset: str, method: str, data: Path, args: Any) -> tuple[Path, dict[str, Any]]:
    from metamask_solo.checkpoints.reading import load_backbone
    from metamask_solo.data.images import image_loader
    from metamask_solo.evaluation.features import extract_features
    from metamask_solo.evaluation.linear import evaluate_features
    from metamask_solo.training.hydra_app import compose_config
    from metamask_solo.training.pretraining import pretrain_run

    overrides = [
        f"data.train_path={data / 'train'}",
        f"data.val_path={data / 'val'}",
        f"checkpoint.dir={args.out / 'runs'}",
        f"max_epochs={args.epochs}",
        *args.overrides,
    ]
    name = PRESETS[args.preset] if method == "metamask" else method
    result = pretrain_run(compose_config(dataset, name, overrides), reuse_finished=True)
    assert result.checkpoint is not None  # the demo's files have checkpoints on
    backbone, checkpoint = load_backbone(result.checkpoint)
    features = [
        extract_features(backbone, image_loader(data / split, checkpoint.config), label=method)
        for split in ("train", "val")
    ]
    row = {"method": method, "seconds": result.seconds_per_epoch, **evaluate_features(*features)}
    return result.folder, row


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'method':<16} {'kNN %':>6} {'linear %':>9} {'s / epoch':>10}"]
    for row in rows:
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.1f}"
        lines.append(f"{row['method']:<16} {row['knn']:>6.1f} {row['linear']:>9.1f} {seconds:>10}")
    return "\n".join(lines)


def _draw(runs: dict[str, Path], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot as plt

    from metamask_solo.atomic_files import atomic_write
    from metamask_solo.checkpoints.reading import read_checkpoint
    from metamask_solo.training.runs import read_metrics

    colours = dict(zip(runs, ("#0072B2", "#D55E00", "#009E73"), strict=True))
    styles = dict(zip(runs, ("-", "--", ":"), strict=True))
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    checkpoints = {method: read_checkpoint(folder) for method, folder in runs.items()}
    for axis, column, title, unit in (
        (axes[0], "train_nce_loss_epoch", "contrastive loss (NT-Xent)", None),
        # the methods weigh it differently: without the weight, the curves can be compared
        (axes[1], "train_barlow_loss_epoch", "redundancy loss (Barlow Twins)", "scale_loss"),
    ):
        for method, folder in runs.items():
            rows = [r for r in read_metrics(folder) if r.get(column)]
            if rows:
                config = checkpoints[method].config
                assert config is not None  # a run's folder holds its config
                scale = config.method_kwargs[unit] if unit else 1
                axis.plot(
                    [int(r["epoch"]) + 1 for r in rows],
                    [float(r[column]) / scale for r in rows],
                    styles[method],
                    color=colours[method],
                    marker="o",
                    markersize=3,
                    label=method,
                )
        axis.set(xlabel="epoch", ylabel=f"{title} / {unit}" if unit else title, title=title)
        axis.legend()
    history = checkpoints["metamask"].raw["metamask"]["history"]["mask"].numpy()
    epochs = np.arange(len(history))
    low, quarter, middle, upper, high = np.quantile(history, (0, 0.25, 0.5, 0.75, 1), axis=1)
    axes[2].fill_between(epochs, low, high, color="#0072B2", alpha=0.2, label="all dimensions")
    axes[2].fill_between(epochs, quarter, upper, color="#0072B2", alpha=0.4, label="middle half")
    axes[2].plot(epochs, middle, color="#0072B2", label="median")
    axes[2].set(xlabel="epoch", ylabel="mask weight m", title="the mask of MetaMask over time")
    axes[2].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    with atomic_write(out) as path:
        figure.savefig(path, format="png", dpi=150)
    plt.close(figure)
