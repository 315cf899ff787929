"""Which sentence appears when, from made-up runs of three methods.

The sentences about real runs stand in docs/results.md, which tests/docs checks.
"""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from metamask_solo.benchmark.answer import answer
from metamask_solo.benchmark.statistics import compare, detectable_with, fit

PAIRS = [("heads", "joint"), ("simclr", "joint")]
METHODS = ("joint", "heads", "simclr")


def runs(seeds: int = 5, noise: float = 0.3, **knn: float) -> pd.DataFrame:
    """Runs of three methods around 50 %, and of what else has a mean in ``knn``."""
    draw = np.random.default_rng(0)
    means = dict.fromkeys(METHODS, 50.0) | knn
    lines = [
        {"method": method, "seed": seed, "knn": mean + noise * draw.normal()}
        for method, mean in means.items()
        for seed in range(1 if method == "pixels" else seeds)
    ]
    return pd.DataFrame(lines)


def with_mask(table: pd.DataFrame, low: float = 0.3, high: float = 0.7) -> pd.DataFrame:
    """The runs, with a mask that heads has learned; all have one at the end."""
    table[["logged/mask_min", "logged/mask_max"]] = low, high
    table.loc[table.method == "heads", "logged/hypergradient_norm"] = 0.1
    return table


def said(table: pd.DataFrame, *measures: str, **more: Any) -> str:
    return "\n".join(answer(table, PAIRS, measures or ["knn"], **more))


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (with_mask(runs(heads=55)), "Yes. heads is clearly better than joint: +5."),
        (with_mask(runs(heads=45)), "No, it is worse. heads is clearly worse than joint: -4."),
        (with_mask(runs()), "No clear effect. heads does not clearly differ from joint: "),
        (with_mask(runs(2, heads=55)), "Too few seeds to tell. heads minus joint is +5."),
        (with_mask(runs(noise=0, heads=55)), "Not known: the runs do not vary, so nothing tells"),
        # a clear difference may come of the few images that it was measured on
        (
            with_mask(runs(heads=55).assign(val_images=600)),
            "Perhaps. heads is clearly better than joint: +5.",
        ),
        # nor can a mask help that weighs all dimensions alike
        (with_mask(runs(heads=55), 0.5, 0.51), "Not known: its mask's weights are all alike (0.50"),
        (
            runs(heads=55).assign(mask=["learned" * (n // 5 == 1) for n in range(15)]),
            "Not known: its mask's weights are all alike (never updated).",
        ),
    ],
)
def test_the_first_sentence_says_whether_metamask_helps(table: pd.DataFrame, expected: str) -> None:
    text = said(table)
    assert text.startswith(f"Does MetaMask help? {expected}")
    assert text.count("clearly better than joint") == ("is clearly better" in expected)


def test_measures_that_disagree_are_all_named() -> None:
    table = with_mask(runs(heads=55))
    table["linear"] = table.knn - 10 * (table.method == "heads")
    text = said(table, "knn", "linear")
    assert text.startswith("Does MetaMask help? In part. heads is clearly better than joint: +5.")
    assert "heads is clearly worse than joint: -4." in text
    assert "heads is best in kNN (55.0 %), clearly above every other method." in text
    # RankMe counts directions: it decides neither what helps nor what is best
    table["rankme"] = table.knn + 30 * (table.method == "simclr")
    text = said(table[table.method != "joint"], "rankme")
    assert text.startswith("Does MetaMask help? Not known without an accuracy. RankMe counts")
    assert "best" not in text and "points" not in text
    table["rankme"], table["knn"] = table.knn, runs().knn
    text = said(table, "knn", "rankme")
    assert text.startswith("Does MetaMask help? No clear effect.") and "It is no accuracy" in text


def test_the_question_names_what_metamask_is_compared_with() -> None:
    table = with_mask(runs(heads=55))
    pairs = [("heads", "simclr"), ("joint", "heads")]
    text = "\n".join(answer(table, pairs, ["knn"]))
    assert text.startswith("Is MetaMask better than simclr? Yes. heads is clearly better than sim")
    assert "\nDoes MetaMask help? Yes. heads is clearly better than joint: +5." in text
    # joint with settings of its own is no MetaMask without a mask
    table["unmasked_digest"] = table.method.map({"heads": "a", "joint": "b", "simclr": "c"})
    assert "Is MetaMask better than joint? Yes." in "\n".join(answer(table, pairs, ["knn"]))


def test_runs_that_do_not_vary_exclude_and_show_nothing() -> None:
    text = said(runs(noise=0, simclr=55))
    assert not any(word in text for word in ("excluded", "detectable", "clearly above every"))


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        (
            {"random": 30, "pixels": 40},
            "kNN, every method's mean is above the untrained backbone and the pixels.",
        ),
        ({"random": 30, "pixels": 60}, "In kNN, no method's mean is above the pixels (60."),
        (
            {"random": 42, "pixels": 45, "heads": 40, "joint": 44},
            "In kNN, joint and heads are in the mean not above the pixels (45.",
        ),
    ],
)
def test_what_is_not_above_an_untrained_backbone_or_the_pixels(
    means: dict[str, float], expected: str
) -> None:
    text = said(runs(**means))
    assert expected in text and ("train longer" in text) == ("no method" in expected)


def test_few_images_are_said_with_their_errors() -> None:
    assert (
        "only 25 images to measure on. On others, an accuracy differs with a standard error of up "
        "to 10.0 points, and the difference of two with up to 14.1."
    ) in said(runs().assign(val_images=25))


def test_the_mask_of_a_method_that_updates_it() -> None:
    moved = "The mask moved. Its weights at the end: heads (0.380 to 0.650)."
    assert moved in said(with_mask(runs(), 0.38, 0.65))
    still = "weights are all alike in heads (0.498 to 0.502), so it hardly changed"
    assert still in said(with_mask(runs(), 0.498, 0.502))
    never = with_mask(runs()).drop(columns="logged/hypergradient_norm")
    assert "mask" not in said(never)


def test_what_so_many_seeds_show() -> None:
    text = said(runs(1))
    assert "One seed shows no difference: take at least three" in text and "clearly" not in text
    text = said(runs(2))
    assert "2 seeds are too few to compare these methods; 5 seeds would show differences" in text
    assert "differ from" not in text and "is best in kNN" in text
    pair = runs(3)[lambda table: table.method != "simclr"]
    assert "3 seeds are too few to compare these methods" in said(pair)
    apart = runs(6)
    early = apart.method == "heads"
    apart = apart[(early & (apart.seed < 3)) | (~early & (apart.seed >= 3))]
    assert "heads and joint have too few seeds in common to be compared." in said(apart)
    # the numbers are corrected for the comparisons that the page has
    table = runs()
    few = table[(table.method != "heads") | (table.seed < 2)]
    model = fit(few, "knn")
    assert model is not None and len(compare(few, PAIRS, ["knn"])) == 1
    now, more = (detectable_with(model, PAIRS[1:], 1, seeds) for seeds in (5, 10))
    text = said(few)
    assert f"With 5 seeds, the minimum detectable effect is {now:.1f} points in kNN" in text
    assert f"with 10 seeds, it would be {more:.1f} points in kNN" in text
    assert "heads has too few finished runs to be compared: 3 seeds are needed." in text


def test_the_best_method_need_not_beat_itself() -> None:
    assert " is best in kNN (50.0 %), but not clearly above " in said(runs())
    both = runs(joint=60, heads=60)
    assert "clearly above every" not in said(both)
    text = said(both, same=("joint", "heads"))
    assert "clearly above every other method." in text
    # what they differ by is noise
    difference = both[both.method == "joint"].knn.to_numpy() - both[both.method == "heads"].knn
    floor = np.sqrt((difference**2).mean())
    assert f"runs of joint and heads, which are the same method, differ by {floor:.2f}" in text


def test_means_are_over_common_seeds() -> None:
    table = with_mask(runs(noise=0, heads=52))
    table["knn"] += 10 * (table.seed == 0) + 0.1 * np.random.default_rng(1).normal(size=len(table))
    table = table[(table.method != "heads") | (table.seed > 2)]
    text = said(table)
    assert "heads minus joint is +2." in text and "heads is best in kNN (54." in text
    alone = said(table[(table.method != "heads") | (table.seed == 3)])
    assert "but not clearly above heads" in alone and "heads minus joint is +2." in alone
