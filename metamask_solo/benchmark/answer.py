"""What follows from the results, in sentences: a pure function of the runs.

| sentence about | appears | says |
|---|---|---|
| MetaMask | for each comparison of a mask that is updated with none | whether it helps, if known |
| images | with fewer than 500 images to measure on | standard errors that come of them alone |
| learning | beside an untrained backbone or the pixels | which methods are not above which |
| best | with two methods or more | the best method in each measure, clearly or not |
| effect | for each comparison | clearly better or worse, or what is excluded |
| mask | for a method whose mask is updated | the weights that it moved to, or that it stayed |
| power | always | which difference so many seeds show, and what more seeds would |
| noise | where two methods are the same | by how much two runs of one method differ |
"""

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
import pandas as pd

from metamask_solo.benchmark.results import learned_masks, same_but_for_the_mask
from metamask_solo.benchmark.schema import LABEL_FREE, NAMES, UNTRAINED_NAMES
from metamask_solo.benchmark.statistics import (
    LEAST_FREEDOM,
    LEAST_SEEDS,
    Model,
    Pair,
    best_method,
    compare,
    detectable_with,
    differences,
    fit,
    noise_floor,
)
from metamask_solo.data.datasets import counted
from metamask_solo.method.mask import nearly_alike

FEW = 500  # images to measure on
Z = 1.96  # standard errors within which 95 % lie
MORE_SEEDS = (5, 10, 20)
# by whether MetaMask is clearly better in a measure, and clearly worse in one
VERDICTS = {
    (True, False): "Yes.",
    (False, True): "No, it is worse.",
    (True, True): "In part.",
    (False, False): "No clear effect.",
}
# where a clear difference may be one of these images alone
DOUBTS = {"Yes.": "Perhaps.", "No, it is worse.": "Perhaps it is worse.", "In part.": "Not known."}


def answer(
    runs: pd.DataFrame, pairs: Sequence[Pair], measures: Sequence[str], same: Sequence[str] = ()
) -> list[str]:
    """The sentences, in the order of the table above.

    Args:
        runs: finished runs; methods, and beside them ``random`` and ``pixels``.
        pairs: the comparisons.
        measures: columns of ``runs``; sentences on accuracies need one that is no RankMe.
        same: two methods that are one and the same.
    """
    untrained = runs[runs.method.isin(UNTRAINED_NAMES)]
    trained = runs[~runs.method.isin(UNTRAINED_NAMES)]
    accuracies = [measure for measure in measures if measure not in LABEL_FREE]
    learned = learned_masks(trained)
    # a learned mask stands first
    pairs = [pair[::-1] if {*pair} & learned == {pair[1]} else pair for pair in pairs]
    asked = [pair for pair in pairs if accuracies and {*pair} & learned == {pair[0]}]
    effects = compare(trained, pairs, measures)
    family = len(effects) or len(pairs) * len(measures)
    models = {measure: fit(trained, measure) for measure in measures}
    sentences = [
        *_verdicts(trained, asked, effects, models, accuracies),
        *_images(trained),
        *_learning(trained, untrained, accuracies),
    ]
    if trained.method.nunique() > 1 and trained.seed.nunique() > 1:
        sentences += _best(trained, models, accuracies, family, same)
        answered = [
            (method, baseline) in asked and measure in accuracies
            for method, baseline, measure in effects[["method", "baseline", "measure"]].to_numpy()
        ]
        sentences += _effects(effects[~np.array(answered, dtype=bool)])
    sentences += _masks(trained)
    sentences += _power(trained, models, pairs, family)
    if len(same) == 2:
        sentences += _noise(trained, (same[0], same[1]), measures)
    if len(accuracies) < len(measures):
        text = (
            "RankMe counts the directions that the features use, at most one for each image. It is "
            "no accuracy, and a higher one is not always better."
        )
        if accuracies or not learned:
            sentences.append(text)
        else:
            sentences.insert(0, f"Does MetaMask help? Not known without an accuracy. {text}")
    return sentences


def _verdicts(
    trained: pd.DataFrame,
    pairs: Sequence[Pair],
    effects: pd.DataFrame,
    models: dict[str, Model | None],
    measures: Sequence[str],
) -> Iterator[str]:
    ranges, largest = _mask_ranges(trained), Z * _error_of_images(trained, 2)
    questions: list[str] = []
    for method, baseline in pairs:
        if not {method, baseline} <= {*trained.method}:
            continue
        of_mask = same_but_for_the_mask(trained, (method, baseline))
        question = "Does MetaMask help?" if of_mask else f"Is MetaMask better than {baseline}?"
        lines = effects[(effects.method == method) & (effects.baseline == baseline)]
        lines = lines[lines.measure.isin(measures)]
        still = of_mask and nearly_alike(*ranges[method])
        if still or lines.empty:
            reason = "Too few seeds to tell."
            if still:
                reason = f"Not known: its mask's weights are all alike ({_range(*ranges[method])})."
            elif any(m is not None and m.enough((method, baseline)) for m in models.values()):
                reason = "Not known: the runs do not vary, so nothing tells an effect from chance."
            parts = [reason, _means(trained, (method, baseline), measures)]
        else:
            better, worse, _ = _by_clearness(lines)
            verdict, doubt = VERDICTS[len(better) > 0, len(worse) > 0], []
            if verdict in DOUBTS and lines[lines.clear].difference.abs().max() < largest:
                verdict = DOUBTS[verdict]
                doubt = [f"A difference below {largest:.1f} may be one of these images alone."]
            parts = [verdict, *_effects(lines), *doubt]
        yield " ".join([*([] if question in questions else [question]), *parts])
        questions.append(question)


def _means(trained: pd.DataFrame, pair: Pair, measures: Sequence[str]) -> str:
    """The mean differences of two methods, over the seeds that both have."""
    changes = {measure: differences(trained, pair, measure) for measure in measures}
    texts = [f"{c.mean():+.2f} in {NAMES[measure]}" for measure, c in changes.items() if len(c)]
    return f"{' minus '.join(pair)} is {_list(texts)}." if texts else "They have no seed in common."


def _images(trained: pd.DataFrame) -> Iterator[str]:
    one, two = (_error_of_images(trained, accuracies) for accuracies in (1, 2))
    if one > 50 / np.sqrt(FEW):
        yield (
            f"There are only {trained.val_images.min():.0f} images to measure on. On others, an "
            f"accuracy differs with a standard error of up to {one:.1f} points, and the difference "
            f"of two with up to {two:.1f}."
        )


def _error_of_images(trained: pd.DataFrame, accuracies: int) -> float:
    """At most the standard error, in points, of a sum of accuracies on other images; or NaN."""
    count = trained.val_images.min() if "val_images" in trained else np.nan
    return float(50 * np.sqrt(accuracies / count))


def _learning(
    trained: pd.DataFrame, untrained: pd.DataFrame, measures: Sequence[str]
) -> Iterator[str]:
    if trained.empty or untrained.empty:
        return
    learned, failed = [], False
    for measure in measures:
        means = trained.groupby("method", sort=False)[measure].mean()
        values = untrained.groupby("method", sort=False)[measure].mean()
        behind = means[means <= values.max()]
        ahead = values[values >= behind.max()]
        titles = [f"the {UNTRAINED_NAMES[name]} ({value:.1f} %)" for name, value in ahead.items()]
        if behind.empty:
            learned.append(NAMES[measure])
        elif len(behind) == len(means):
            failed = True
            yield f"In {NAMES[measure]}, no method's mean is above {_list(titles)}."
        else:
            verb = "is" if len(behind) == 1 else "are"
            yield (
                f"In {NAMES[measure]}, {_list(behind.index)} {verb} in the mean not above "
                f"{_list(titles)}."
            )
    if failed:
        yield "There, train longer, use more images, or change the augmentations."
    if learned:
        titles = [f"the {UNTRAINED_NAMES[name]}" for name in untrained.method.unique()]
        yield f"In {_list(learned)}, every method's mean is above {_list(titles)}."


def _best(
    trained: pd.DataFrame,
    models: dict[str, Model | None],
    measures: Sequence[str],
    family: int,
    same: Sequence[str],
) -> Iterator[str]:
    clear: dict[str, list[str]] = {}
    for measure in measures:
        if (model := models[measure]) is None:
            continue
        best, rivals = best_method(model, trained.method.unique(), family, same)
        text = f"{NAMES[measure]} ({model.means[best]:.1f} %)"
        if rivals:
            yield f"{best} is best in {text}, but not clearly above {_list(rivals)}."
        else:
            clear.setdefault(best, []).append(text)
    for best, texts in clear.items():
        yield f"{best} is best in {_list(texts)}, clearly above every other method."


def _by_clearness(lines: pd.DataFrame) -> list[pd.DataFrame]:
    """The comparisons in which a method is clearly better, clearly worse, and neither."""
    better, worse = lines.clear & (lines.difference > 0), lines.clear & (lines.difference < 0)
    return [lines[better], lines[worse], lines[~better & ~worse]]


def _effects(family: pd.DataFrame) -> Iterator[str]:
    for (method, baseline), lines in family.groupby(["method", "baseline"], sort=False):
        better, worse, rest = _by_clearness(lines)
        for word, clear in (("better", better), ("worse", worse)):
            if len(clear):
                yield f"{method} is clearly {word} than {baseline}: {_values(clear)}."
        if len(rest):
            gains = _list([f"{max(high, 0):.1f}" for high in rest.high])
            losses = _list([f"{max(-low, 0):.1f}" for low in rest.low])
            yield (
                f"{method} does not clearly differ from {baseline}: {_values(rest)}. Gains above "
                f"{gains} and losses above {losses} are excluded."
            )


def _values(lines: pd.DataFrame) -> str:
    return _list(
        [f"{line.difference:+.2f} in {NAMES[line.measure]}" for line in lines.itertuples()]
    )


def _mask_ranges(trained: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """The smallest and the largest weight of masks that are updated; NaN without any update."""
    columns = ["logged/mask_min", "logged/mask_max"]
    groups = trained.reindex(columns=["method", *columns]).groupby("method", sort=False)
    low, high = groups[columns[0]].min(), groups[columns[1]].max()
    learned = learned_masks(trained)
    return {str(method): (low[method], high[method]) for method in low.index if method in learned}


def _range(low: float, high: float) -> str:
    return "never updated" if np.isnan(low) else f"{low:.3f} to {high:.3f}"


def _masks(trained: pd.DataFrame) -> Iterator[str]:
    moved: list[str] = []
    still: list[str] = []
    for method, limits in _mask_ranges(trained).items():
        (still if nearly_alike(*limits) else moved).append(f"{method} ({_range(*limits)})")
    if moved:
        yield f"The mask moved. Its weights at the end: {_list(moved)}."
    if still:
        yield (
            f"The mask's weights are all alike in {_list(still)}, so it hardly changed the "
            "features' proportions: train longer, or raise method_kwargs.mask.lr there."
        )


def _power(
    trained: pd.DataFrame, models: dict[str, Model | None], pairs: Sequence[Pair], family: int
) -> Iterator[str]:
    seeds = trained.groupby("method").seed.nunique()
    if len(seeds) < 2:
        return
    if seeds.max() < 2:
        yield "One seed shows no difference: take at least three, such as seeds=[0,1,2]."
        return
    if not (there := [pair for pair in pairs if {*pair} <= {*seeds.index}]):
        return
    lacking = [m for m in dict.fromkeys(chain(*there)) if seeds[m] < LEAST_SEEDS]
    compared = [pair for pair in there if {*pair}.isdisjoint(lacking)]
    if lacking and compared:
        yield (
            f"{_list(lacking)} {'has' if len(lacking) == 1 else 'have'} too few finished runs to "
            f"be compared: {LEAST_SEEDS} seeds are needed."
        )
    least = min(int(seeds[method]) for method in chain(*compared or there))
    more = next(count for count in (*MORE_SEEDS, 2 * least) if count > least)
    few, apart = not compared, dict[Pair, None]()
    now: list[str] = []
    would: list[str] = []
    for measure, model in models.items():
        known = [pair for pair in compared or there if model and {*pair} <= {*model.seeds}]
        apart |= dict.fromkeys(pair for pair in compared or there if pair not in known)
        if model is None or not known:
            continue
        few |= model.freedom < LEAST_FREEDOM
        known = [pair for pair in known if model.varies(pair)]
        if not known:
            yield f"In {NAMES[measure]}, the runs do not vary, so no difference can be judged."
            continue
        for texts, count in ((now, least), (would, more)):
            effect = detectable_with(model, known, family, count)
            counts = measure in LABEL_FREE
            size = "100 (none at all)" if effect > 100 and not counts else f"{effect:.1f}"
            unit = "in" if texts or counts else "points in"
            texts.append(f"{size} {unit} {NAMES[measure]}")
    if apart:
        names = _list([" and ".join(pair) for pair in apart])
        yield f"{names} have too few seeds in common to be compared."
    if not now:
        return
    if few:
        yield (
            f"{counted(least, 'seed')} {'is' if least == 1 else 'are'} too few to compare these "
            f"methods; {more} seeds would show differences above {_list(would)}."
        )
    else:
        yield (
            f"With {least} seeds, the minimum detectable effect is {_list(now)}; with {more} "
            f"seeds, it would be {_list(would)}."
        )


def _noise(trained: pd.DataFrame, same: Pair, measures: Sequence[str]) -> Iterator[str]:
    floors = {NAMES[measure]: noise_floor(trained, same, measure) for measure in measures}
    parts = [f"{size:.2f} in {name}" for name, (size, count) in floors.items() if count]
    if parts:
        yield (
            f"Noise floor: runs of {' and '.join(same)}, which are the same method, differ by "
            f"{_list(parts)} with one seed."
        )


def _list(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else str(last)
