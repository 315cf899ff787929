"""``metamask-solo umap``: what solo-learn's main_umap.py draws, on both releases."""

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from metamask_solo.commands.options import (
    add_feature_options,
    check_counts,
    command_parser,
    feature_reader,
)
from metamask_solo.paths import user_path

FORMATS = (".png", ".pdf", ".svg")
NEIGHBOURS = 15  # umap-learn's default; with fewer images it would silently take another number
MOST_IN_LEGEND = 20
LONGEST_NAME = 30  # of a class, in letters


def main(argv: list[str]) -> int:
    """Writes a scatter plot of the features, coloured by class.

    Raises:
        UserError: umap-learn is missing, a setting, the checkpoint or the data cannot be used, or
            the features are (nearly) the same for all images.
    """
    arguments = _parse(argv)

    from metamask_solo.errors import UserError
    from metamask_solo.evaluation.features import is_collapsed

    if importlib.util.find_spec("umap") is None:
        raise UserError("umap-learn: not installed; `pip install 'metamask-solo[umap]'` does it")
    check_counts(samples=arguments.samples, seed=arguments.seed)
    out = arguments.out
    if out.suffix not in FORMATS:
        raise UserError(f"--out={out}: must end in {', '.join(FORMATS)}")
    reader = feature_reader(arguments, arguments.features)
    loader: Any = reader.loader(arguments.split, None, arguments.samples, arguments.seed)
    images = len(loader.dataset)
    if images <= NEIGHBOURS:
        raise UserError(f"{images} images: UMAP needs more than {NEIGHBOURS}")
    read = reader.extract(loader)
    if is_collapsed(read.features):
        raise UserError(
            f"{reader.checkpoint.path}: all features are (nearly) the same; a drawing would show "
            "rounding errors"
        )

    import umap

    points = umap.UMAP(
        n_components=2, n_neighbors=NEIGHBOURS, random_state=arguments.seed, n_jobs=1
    ).fit_transform(read.features.numpy())
    kind = f"{read.split} images".strip()
    title = f"{reader.checkpoint.path.name}\n{reader.kind} of {images} {kind}"
    _draw(points, read.labels.numpy(), read.classes, title, out)
    print(f"{out}: {images} {kind}, {len(read.labels.unique()) if read.classes else 'no'} classes")
    return 0


def _draw(points: Any, labels: Any, names: list[str], title: str, out: Path) -> None:
    """The scatter plot; a legend where there are few classes, a colour bar where there are many.

    A class has the same colour whichever others are drawn. Without class names all points have
    one colour.
    """
    import matplotlib
    from matplotlib.figure import Figure

    from metamask_solo.analysis.figures import wrapped
    from metamask_solo.atomic_files import atomic_write

    figure = Figure(figsize=(8, 7), layout="constrained")
    axes = figure.add_subplot()
    few = len(names) <= MOST_IN_LEGEND
    colours = matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20" if few else "turbo"]
    look: Any = {"s": max(2.0, min(30.0, 20_000 / len(points))), "alpha": 0.7}
    texts = [axes.title]
    if not names:
        axes.scatter(points[:, 0], points[:, 1], color=colours(0), **look)
    elif few:
        for label in range(len(names)):
            axes.scatter(*points[labels == label].T, color=colours(label), **look)
        # numbers first: a label that begins with an underscore would be left out
        numbers = [str(label) for label in range(len(names))]
        legend = axes.legend(
            axes.collections, numbers, title="class", loc="center left", bbox_to_anchor=(1, 0.5)
        )
        for text, name in zip(legend.get_texts(), names, strict=True):
            text.set_text(name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…")
            texts.append(text)
    else:
        span: Any = {"cmap": colours, "vmin": 0, "vmax": len(names) - 1}
        drawn = axes.scatter(points[:, 0], points[:, 1], c=labels, **span, **look)
        figure.colorbar(drawn, label="class (in alphabetical order)")
    axes.set(xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2")
    axes.set_title("\n".join(wrapped(line, 60) for line in title.splitlines()), fontsize=10)
    for text in texts:  # names, in which a dollar sign is no mathematics
        text.set_parse_math(False)
    with atomic_write(out) as temporary:
        figure.savefig(temporary, format=out.suffix[1:], dpi=150)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = command_parser(
        "umap",
        " with UMAP, coloured by class where there are classes. Distances between far clusters in "
        "such a drawing mean little.",
    )
    add_feature_options(parser, "train/ and val/, class folders, or images at any depth")
    add = parser.add_argument
    add("--out", type=user_path, default=Path("umap.png"), metavar="FILE", help=", ".join(FORMATS))
    add("--samples", type=int, default=5_000, metavar="N", help="images at most, drawn by the seed")
    add("--seed", type=int, default=0, help="of the images and of UMAP")
    return parser.parse_args(argv)
