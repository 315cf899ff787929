"""What a reader of a benchmark's report must know of its runs."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from PIL import Image

from metamask_solo.benchmark.configs import Variant
from metamask_solo.benchmark.file import LABEL_FREE, BenchmarkFile, Folders, override_key
from metamask_solo.data.folders import find_images
from metamask_solo.errors import UserError
from metamask_solo.hosts import RELEASE

NOT_ACCURACY = (
    "RankMe counts the directions that the features of the training images use. It needs no "
    "labels, and is no accuracy: a higher one is not always better."
)
# of solo-learn's losses, what is another thing with several processes; vicreg's: 1.0.2 alone
SEVERAL_PROCESSES = {
    "barlow_twins": "with several processes, solo-learn's gradient of this loss is the true one "
    "divided by their number",
    **(
        {
            "vicreg": "with several processes, solo-learn 1.0.2 takes variance and covariance of "
            "each process's own images, not of the batch of all",
            "simclr": "with several processes, solo-learn 1.0.2 takes no negatives of the others",
        }
        if RELEASE == "1.0.2"
        else {}
    ),
}


def notes_on(variants: Sequence[Variant], given: BenchmarkFile) -> list[str]:
    """Notes on the runs that are wanted."""
    notes = [*_of_overrides(given), *_of_seeds(given)]
    notes += [
        f"{', '.join(labels)}: {SEVERAL_PROCESSES[method]}."
        for method, labels in _of_several_processes(variants).items()
    ]
    if isinstance(given.data, Folders):
        notes += _of_other_data(variants, given.data)
    return notes + ([NOT_ACCURACY] if {*given.measured} & {*LABEL_FREE} else [])


def _of_overrides(given: BenchmarkFile) -> Iterator[str]:
    """Overrides that are gone, or that change nothing."""
    for key, texts in given.replaced.items():
        yield f"{key}=… replaces {', '.join(texts)} of the file; {key}+=… would add to them."
    names: dict[str, list[str]] = {}
    for label in given.trained:
        own = [override_key(override) for override in given.methods[label].overrides]
        for override in given.overrides:
            if override_key(override) in own:
                names.setdefault(override, []).append(label)
    for override, labels in names.items():
        yield (
            f"overrides: {override} does not reach {', '.join(labels)}, whose own overrides say "
            "otherwise."
        )


def _of_seeds(given: BenchmarkFile) -> Iterator[str]:
    for label in given.trained:
        if not given.seeds_of(label):
            own = given.methods[label].seeds
            yield f"{label} has no run: none of its own seeds={own} is in seeds={given.seeds}."


def _of_several_processes(variants: Sequence[Variant]) -> dict[str, list[str]]:
    """Methods of solo-learn whose loss more than one process changes, and who uses them."""
    hit: dict[str, dict[str, None]] = {}
    for variant in variants:
        if variant.processes > 1 and variant.config["method"] in SEVERAL_PROCESSES:
            hit.setdefault(variant.config["method"], {})[variant.method] = None
    return {method: [*labels] for method, labels in hit.items()}


def _of_other_data(variants: Sequence[Variant], folders: Folders) -> list[str]:
    """Tells that augmentations chosen for other images are applied to replaced ones."""
    found: dict[str, list[str]] = {}
    for label, variant in {variant.method: variant for variant in variants}.items():
        if Path(variant.own_data).resolve() != Path(folders.train_path):
            first = variant.config["augmentations"][0]
            flip = first["horizontal_flip"]["prob"]
            what = [f"crop_size {first['crop_size']}", f"horizontal_flip {flip:g}"]
            what += [f"{key} {first[key]}" for key in ("mean", "std") if key in first]
            found.setdefault(f"{variant.own_data}: {', '.join(what)}", []).append(label)
    size = _size_of_one(folders.train_path)
    return [
        f"The data were replaced, and {', '.join(labels)} keep the augmentations that were chosen "
        f"for {what}{size}. Others: overrides+=[augmentations=FILE,augmentations.0.crop_size=N]."
        for what, labels in found.items()
    ]


def _size_of_one(folder: str) -> str:
    # torchvision's files hold no images that could be found
    with suppress(UserError, OSError, SyntaxError, ValueError):
        path, _ = find_images(folder, "data.train_path", labels=False).samples[0]
        with Image.open(path) as image:
            return f" (an image of these data has {image.width} × {image.height} pixels)"
    return ""
