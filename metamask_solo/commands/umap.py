"""``metamask-solo umap``: what solo-learn's main_umap.py draws, on both releases."""

import importlib.util
from typing import Any

from metamask_solo.commands.options import (
    add_feature_options,
    command_parser,
    count,
    feature_reader,
    file,
)

FORMATS = (".png", ".pdf", ".svg")
NEIGHBOURS = 15  # umap-learn's default; with fewer images it would silently take another number


def main(argv: list[str]) -> int:
    """Writes a scatter plot of the features, coloured by class.

    Raises:
        UserError: umap-learn is missing, a setting, the checkpoint or the data cannot be used, or
            the features are (nearly) the same for all images.
    """
    parser = command_parser(
        "umap",
        " with UMAP, coloured by class where there are classes. Distances between far clusters in "
        "such a drawing mean little.",
    )
    add_feature_options(parser, "train/ and val/, class folders, or images at any depth")
    add = parser.add_argument
    add("--split", choices=("train", "val"), default="val", help="which images")
    add("--out", type=file(*FORMATS), default="umap.png", metavar="FILE", help=", ".join(FORMATS))
    samples = "images at most, drawn by the seed"
    add("--samples", type=count(), default=5_000, metavar="N", help=samples)
    add("--seed", type=count(0), default=0, help="of the images and of UMAP")
    arguments = parser.parse_args(argv)

    from metamask_solo.analysis.figures import draw_scatter
    from metamask_solo.errors import UserError
    from metamask_solo.evaluation.features import is_collapsed

    if importlib.util.find_spec("umap") is None:
        raise UserError("umap-learn: not installed; `pip install 'metamask-solo[umap]'` does it")
    reader = feature_reader(arguments)
    loader = reader.loader(arguments.split, None, arguments.samples, arguments.seed)
    images: Any = loader.dataset
    if len(images) <= NEIGHBOURS:
        raise UserError(
            f"{len(images)} images: UMAP needs more than {NEIGHBOURS}; give more by --data"
        )
    features, labels = reader.extract(loader)
    if is_collapsed(features):
        raise UserError(
            f"{reader.checkpoint.path}: all features are (nearly) the same; a drawing would show "
            "rounding errors"
        )

    import umap

    points = umap.UMAP(
        n_components=2, n_neighbors=NEIGHBOURS, random_state=arguments.seed, n_jobs=1
    ).fit_transform(features.numpy())
    classes = images.classes if images.labelled else []
    title = f"{reader.checkpoint.path.name}\n{reader.kind} of {images}"
    draw_scatter(points, labels.numpy(), classes, title, arguments.out)
    print(f"{arguments.out}: {images}, {len(labels.unique()) if classes else 'no'} classes")
    return 0
