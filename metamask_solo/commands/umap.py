"""``metamask-solo umap``: what solo-learn's main_umap.py draws, on both releases."""

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from metamask_solo.commands.options import (
    add_feature_options,
    add_loading_options,
    add_source_options,
    check_counts,
)

HELP = "draw a checkpoint's features in two dimensions"
FORMATS = (".png", ".pdf", ".svg")
NEIGHBOURS = 15  # umap-learn's default; with fewer images it would silently take another number
MOST_IN_LEGEND = 20
LONGEST_NAME = 30  # of a class, in letters


def main(argv: list[str]) -> int:
    """Writes a scatter plot of the features, coloured by class.

    Raises:
        UserError: umap-learn is missing, or a setting, the checkpoint or the data cannot be used.
    """
    arguments = _parse(argv)

    from metamask_solo.data.images import class_names, split_loader
    from metamask_solo.data.unlabelled import is_labelled
    from metamask_solo.errors import UserError
    from metamask_solo.evaluation.features import (
        extract_features,
        feature_extractor,
        pick_device,
    )
    from metamask_solo.training.resume import say_other_images

    if importlib.util.find_spec("umap") is None:
        raise UserError("umap-learn: not installed; install it with `pip install umap-learn`")
    names = ("batch_size", "num_workers", "samples", "seed")
    check_counts(**{name: getattr(arguments, name) for name in names})
    out = arguments.out
    if out.suffix not in FORMATS:
        raise UserError(f"--out={out}: must end in {', '.join(FORMATS)}")
    device = pick_device(arguments.device)
    module, checkpoint = feature_extractor(
        arguments.checkpoint, arguments.features, arguments.masked
    )
    assert checkpoint.config is not None  # feature_extractor needs it
    loader: Any = split_loader(
        arguments.split,
        checkpoint.config,
        arguments.data,
        arguments.batch_size,
        arguments.num_workers,
        arguments.samples,
        arguments.seed,
        labelled=False,
    )
    if arguments.data is None:
        say_other_images(checkpoint.config)
    images = len(loader.dataset)
    if images <= NEIGHBOURS:
        raise UserError(f"{images} images: UMAP needs more than {NEIGHBOURS}")
    features, labels = extract_features(module, loader, device, arguments.features)

    import umap

    points = umap.UMAP(
        n_components=2, n_neighbors=NEIGHBOURS, random_state=arguments.seed, n_jobs=1
    ).fit_transform(features.numpy())
    masked = checkpoint.mask is not None and arguments.masked is not False
    title = f"{checkpoint.path.name}\n{'masked' if masked else 'plain'} {arguments.features} "
    title += f"features of {images} {arguments.split} images"
    labelled = is_labelled(labels)
    _draw(points, labels.numpy(), class_names(loader) if labelled else [], title, out)
    print(f"{out}: {images} images, {len(labels.unique()) if labelled else 'no'} classes")
    return 0


def _draw(points: Any, labels: Any, names: list[str], title: str, out: Path) -> None:
    """The scatter plot; a legend where there are few classes, a colour bar where there are many.

    Without class names all points have one colour.
    """
    import matplotlib
    from matplotlib.figure import Figure

    from metamask_solo.analysis.drawing import wrapped
    from metamask_solo.atomic_files import atomic_write

    figure = Figure(figsize=(8, 7), layout="constrained")
    axes = figure.add_subplot()
    few = len(names) <= MOST_IN_LEGEND
    colours = matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20" if few else "turbo"]
    size = max(2.0, min(30.0, 20_000 / len(points)))
    texts = [axes.title]
    if not names:
        axes.scatter(points[:, 0], points[:, 1], s=size, color=colours(0), alpha=0.7)
    elif few:
        for label in range(len(names)):
            own = points[labels == label]
            axes.scatter(own[:, 0], own[:, 1], s=size, color=colours(label), alpha=0.7)
        # numbers first: a label that begins with an underscore would be left out
        numbers = [str(label) for label in range(len(names))]
        legend = axes.legend(
            axes.collections, numbers, title="class", loc="center left", bbox_to_anchor=(1, 0.5)
        )
        for text, name in zip(legend.get_texts(), names, strict=True):
            text.set_text(name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…")
            texts.append(text)
    else:
        drawn = axes.scatter(points[:, 0], points[:, 1], s=size, c=labels, cmap=colours, alpha=0.7)
        figure.colorbar(drawn, label="class (in alphabetical order)")
    axes.set(xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2")
    axes.set_title("\n".join(wrapped(line, 60) for line in title.splitlines()), fontsize=10)
    for text in texts:  # names, in which a dollar sign is no mathematics
        text.set_parse_math(False)
    with atomic_write(out) as temporary:
        figure.savefig(temporary, format=out.suffix[1:], dpi=150)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="metamask-solo umap",
        description=HELP[0].upper()
        + HELP[1:]
        + " with UMAP, coloured by class where there are classes. Distances between "
        "far clusters in such a drawing mean little.",
    )
    data = "holds train/ and val/, or images; classes are coloured (default: the run's)"
    add_source_options(parser, data)
    add_feature_options(parser)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("umap.png"),
        metavar="FILE",
        help="a .png, .pdf or .svg file (default: umap.png)",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=5_000,
        metavar="N",
        help="images at most, drawn by the seed (default: 5000)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the images and of UMAP (default: 0)"
    )
    add_loading_options(parser)
    return parser.parse_args(argv)
