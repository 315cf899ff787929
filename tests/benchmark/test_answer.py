"""Which sentence appears when, from made-up runs."""

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
    """The runs, with a mask that heads has learned."""
    table[["logged/mask_min", "logged/mask_max"]] = low, high
    table.loc[table.method == "heads", "logged/hypergradient_norm"] = 0.1
    return table


def said(table: pd.DataFrame, measures: list[str] | None = None, **more: Any) -> str:
    return "\n".join(answer(table, PAIRS, measures or ["knn"], **more))


def test_learning() -> None:
    assert "kNN, every method's mean is above the untrained backbone and the pixels." in said(
        runs(random=30, pixels=40)
    )
    beaten = said(runs(random=30, pixels=60))
    assert "In kNN, no method's mean is above the pixels (60." in beaten
    assert "untrained" not in beaten and "train longer" in beaten
    some = said(runs(pixels=45, heads=40))
    assert (
        "In kNN, heads is in the mean not above the pixels (44." in some
        and "train longer" not in some
    )
    two = said(runs(random=42, pixels=45, heads=40, joint=44))
    assert "In kNN, joint and heads are in the mean not above the pixels (45." in two
    assert "above the" not in said(runs())


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (
            0.498,
            0.502,
            "The mask's weights are all alike in heads (0.498 to 0.502), so it hardly changed ",
        ),
        (0.38, 0.65, "The mask moved. Its weights at the end: heads (0.380 to 0.650)."),
    ],
)
def test_mask(low: float, high: float, expected: str) -> None:
    table = runs()
    of_heads = table.method == "heads"
    table["logged/mask_min"], table["logged/mask_max"] = 0.5, 0.5
    table.loc[of_heads, ["logged/mask_min", "logged/mask_max"]] = [low, high]
    assert "mask" not in said(table)  # nowhere updated
    table.loc[of_heads, "logged/hypergradient_norm"] = 0.1
    assert expected in said(table) and "joint (" not in said(table)


def test_effects() -> None:
    open_ = said(runs())
    assert "heads does not clearly differ from joint: " in open_
    assert ". Gains above" in open_ and " and losses above " in open_
    assert "heads is clearly better than joint: +5." in said(runs(heads=55))
    assert "heads is clearly worse than joint: -4." in said(runs(heads=45))


@pytest.mark.parametrize(
    ("seeds", "mean", "expected"),
    [
        (5, 55.0, "Does MetaMask help? Yes. heads is clearly better than joint: +5."),
        (5, 45.0, "Does MetaMask help? No, it is worse. heads is clearly worse than joint: -4."),
        (5, 50.0, "Does MetaMask help? No clear effect. heads does not clearly differ"),
        (2, 55.0, "Does MetaMask help? Too few seeds to tell. heads minus joint is +5."),
        (1, 55.0, "Does MetaMask help? Too few seeds to tell. heads minus joint is +"),
    ],
)
def test_the_first_sentence_is_about_metamask(seeds: int, mean: float, expected: str) -> None:
    table = with_mask(runs(seeds=seeds, heads=mean))
    text = said(table)
    assert text.startswith(expected) and text.count("differ from joint") <= 2
    table["val_images"] = 25
    assert (
        "only 25 images to measure on. On others, an accuracy differs with a standard error of up "
        "to 10.0 points, and the difference of two with up to 14.1."
    ) in said(table)


@pytest.mark.parametrize(
    ("images", "high", "expected"),
    [
        (10_000, 0.7, "Does MetaMask help? Yes. heads is clearly better than joint: +5."),
        (600, 0.7, "Does MetaMask help? Perhaps. heads is clearly better than joint: +5."),
        (
            10_000,
            0.51,
            "Does MetaMask help? Not known: its mask's weights are all alike (0.500 to 0.510).",
        ),
    ],
)
def test_a_difference_of_chance_is_no_help(images: int, high: float, expected: str) -> None:
    """Of few images, or without a mask that does anything."""
    table = with_mask(runs(heads=55).assign(val_images=images), 0.5, high)
    text = said(table)
    assert text.startswith(expected)
    assert ("A difference below 5.7 may be one of these images alone." in text) == (images == 600)
    assert ("clearly better" in text) == (high == 0.7)


def test_power() -> None:
    text = said(runs(seeds=1))
    assert "One seed shows no difference: take at least three" in text and "clearly" not in text
    text = said(runs(seeds=2))
    assert "2 seeds are too few to compare these methods; 5 seeds would show differences" in text
    assert "differ from" not in text and "is best in kNN" in text
    text = said(runs(seeds=3))
    assert "With 3 seeds, the minimum detectable effect is " in text and "; with 5 seeds, " in text
    pair = runs(seeds=3)[lambda table: table.method != "simclr"]
    assert "3 seeds are too few to compare these methods" in said(pair)
    apart = runs(seeds=6)
    early = apart.method == "heads"
    apart = apart[(early & (apart.seed < 3)) | (~early & (apart.seed >= 3))]
    assert "heads and joint have too few seeds in common to be compared." in said(apart)
    same = runs()[lambda table: table.method != "simclr"]
    assert "seed" not in "".join(answer(same, [], ["knn"]))  # without a comparison, no power


def test_the_sentences_are_corrected_for_the_comparisons_of_the_table() -> None:
    table = runs()
    few = table[(table.method != "heads") | (table.seed < 2)]
    model = fit(few, "knn")
    assert model is not None and len(compare(few, PAIRS, ["knn"])) == 1
    text, compared = said(few), PAIRS[1:]
    assert f"effect is {detectable_with(model, compared, 1, 5):.1f} points" in text
    assert "heads has too few finished runs to be compared: 3 seeds are needed." in text


def test_best_and_noise() -> None:
    assert "simclr is best in kNN (59.7 %), clearly above every other method." in said(
        runs(simclr=60)
    )
    assert " is best in kNN (50.0 %), but not clearly above " in said(runs())
    # two that are one need not be told apart
    both = runs(joint=60, heads=60)
    assert "clearly above every" not in said(both)
    text = said(both, same=("joint", "heads"))
    assert "clearly above every other method." in text
    difference = both[both.method == "joint"].knn.to_numpy() - both[both.method == "heads"].knn
    floor = np.sqrt((difference**2).mean())
    assert (
        f"Noise floor: runs of joint and heads, which are the same method, differ by {floor:.2f}"
        in text
    )


def test_several_measures_share_a_sentence() -> None:
    table = runs(heads=55, pixels=20)
    table["linear"] = table.knn + 5
    text = said(table, ["knn", "linear"])
    assert text.count("heads is clearly better") == 1 and " in kNN and +" in text
    assert "heads is best in kNN (55.0 %) and linear (60.0 %), clearly" in text
    assert "In kNN and linear, every method's mean is above the pixels." in text


def test_without_labels_nothing_is_best() -> None:
    table = runs(heads=80).rename(columns={"knn": "rankme"})
    text = said(table, ["rankme"])
    assert "It is no accuracy" in text and "best" not in text and "points" not in text
    text = said(with_mask(table), ["rankme"])
    assert text.startswith("Does MetaMask help? Not known without an accuracy. RankMe counts")


def test_rankme_decides_nothing() -> None:
    table = with_mask(runs())
    table["rankme"] = table.knn + 30 * (table.method == "heads")
    text = said(table, ["knn", "rankme"])
    assert text.startswith("Does MetaMask help? No clear effect.")
    assert "heads is clearly better than joint: +30." in text


def test_the_question_names_what_metamask_is_compared_with() -> None:
    table = with_mask(runs(heads=55))
    pairs = [("heads", "simclr"), ("joint", "heads")]
    text = "\n".join(answer(table, pairs, ["knn"]))
    assert text.startswith("Is MetaMask better than simclr? Yes. heads is clearly better than sim")
    assert "\nDoes MetaMask help? Yes. heads is clearly better than joint: +5." in text
    # joint with settings of its own is no MetaMask without a mask
    table["unmasked_digest"] = table.method.map({"heads": "a", "joint": "b", "simclr": "c"})
    assert "Is MetaMask better than joint? Yes." in "\n".join(answer(table, pairs, ["knn"]))


def test_means_are_over_common_seeds() -> None:
    table = with_mask(runs(noise=0, heads=52))
    table["knn"] += 10 * (table.seed == 0) + 0.1 * np.random.default_rng(1).normal(size=len(table))
    table = table[(table.method != "heads") | (table.seed > 2)]
    text = said(table)
    assert "heads minus joint is +2." in text and "heads is best in kNN (54." in text
    alone = said(table[(table.method != "heads") | (table.seed == 3)])
    assert "but not clearly above heads" in alone and "heads minus joint is +2." in alone


def test_runs_that_do_not_vary_are_not_judged() -> None:
    table = with_mask(runs(noise=0, heads=55))
    text = said(table)
    assert text.startswith("Does MetaMask help? Not known: the runs do not vary, so nothing tells")
    assert "excluded" not in text and "detectable" not in text and "clearly above every" not in text


def test_a_mask_that_was_never_updated_does_not_help() -> None:
    table = runs(heads=55)
    table["mask"] = np.where(table.method == "heads", "learned", "")
    text = said(table)
    assert text.startswith("Does MetaMask help? Not known: its mask's weights are all alike (never")
