"""The HTML page of an analysis: one file, figures inline, nothing loaded from elsewhere."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #111; background: #fff; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: 0.85rem; margin: 1rem 0; }
th, td { border-bottom: 1px solid #bbb; padding: 0.25rem 0.6rem; text-align: left;
         vertical-align: bottom; font-variant-numeric: tabular-nums; }
td { white-space: nowrap; } td:first-child { white-space: normal; min-width: 9rem; }
.answer { font-size: 1.1rem; border-left: 4px solid #0072B2; padding-left: 0.8rem; }
li { overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
.none { border-left: 4px solid #D55E00; padding-left: 0.8rem; }
@media print { body { max-width: none; margin: 0; } figure, tr { break-inside: avoid; } }
"""
INFORMATION = {
    # what a dimension can tell: name, and the sign of the correlation if damped dimensions
    # are confounders (0: a control, where no sign is expected)
    "class": ("class", 1),
    "photograph": ("background photograph", -1),
    "colour": ("background's mean colour", -1),
    "deviation": ("standard deviation (control)", 0),
}
# a mask whose largest and smallest weights are closer than this hardly moved
LEAST_SPREAD = 0.05
Row = Sequence[str]


def report_html(analysis: Mapping[str, Any], figures: Mapping[str, bytes]) -> str:
    """Writes the page.

    Args:
        analysis: the content of analysis.json.
        figures: PNG files by name; a name that is missing has its section say why.

    Returns:
        A whole HTML document.
    """
    labelled = analysis["checkpoints"][0]["accuracy"] is not None
    parts = [_introduction(analysis), _redundancy(analysis, figures)]
    parts += [_subsets(analysis, figures)] if labelled else []
    parts += [_mask(analysis, figures)]
    parts += [_bracket(analysis, figures)] if labelled else []
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>metamask-solo analyze</title><style>{STYLE}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _introduction(analysis: Mapping[str, Any]) -> str:
    data, settings = analysis["data"], analysis["settings"]
    labelled = analysis["checkpoints"][0]["accuracy"] is not None
    rows = []
    for found in analysis["checkpoints"]:
        accuracy, redundancy = found["accuracy"], found["redundancy"]
        row = [found["name"], found["method"] or "unknown", str(found["dims"])]
        row.append(_pair(*_versions(redundancy, "rankme"), "{:.1f}"))
        if labelled:
            row += [
                _pair(accuracy["knn"]["plain"], accuracy["knn"]["masked"], "{:.1%}"),
                _pair(accuracy["linear"]["plain"], accuracy["linear"]["masked"], "{:.1%}"),
                _pair(*_versions(found["bracket"], "width"), "{:.3f}"),
            ]
        rows.append(row)
    header = ["checkpoint", "method", "dimensions", "RankMe"]
    if labelled:
        header += ["kNN accuracy", "linear accuracy", "bracket width (nats)"]
        for name, accuracy in (analysis["checkpoints"][0].get("references") or {}).items():
            row = [name, "none: for comparison", "", "", f"{accuracy['knn']:.1%}"]
            rows.append([*row, f"{accuracy['linear']:.1%}", ""])
    files = "".join(
        f"<li>{escape(found['name'])}: {escape(found['path'])}</li>"
        for found in analysis["checkpoints"]
    )
    return (
        "<h1>What the mask did</h1>"
        + f'<p class="answer">{" ".join(escape(line) for line in answers(analysis))}</p>'
        + _text(
            f"Features of {_images(data)} of {data['folder']}, seed {settings['seed']}. "
            "Where a cell has two numbers, the first is of the plain features h, the second of "
            "the masked features h ⊙ m."
        )
        + f"<ul>{files}</ul>"
        + _table(header, rows)
        + (_of_accuracies(data, settings) if labelled else "")
    )


def _images(data: Mapping[str, Any]) -> str:
    if data["classes"] is None:
        return f"{data['train_images']:,} training images without labels"
    return (
        f"{data['train_images']:,} training and {data['val_images']:,} validation images in "
        f"{data['classes']} classes"
    )


def _of_accuracies(data: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    error = 50 / data["val_images"] ** 0.5
    return _text(
        f"kNN: cosine, k = {settings['knn_k']}, temperature {settings['knn_temperature']:g}, as "
        "`metamask-solo knn` does it. Linear: ridge regression on one-hot labels, penalty "
        f"{settings['ridge']:g} × N × mean variance of a dimension. Both are fitted on the "
        "training images and scored once on the validation images; nothing was tuned. With "
        f"{data['val_images']:,} validation images the standard error of an accuracy is at "
        f"most {error:.1f} percentage points, so smaller differences may be chance."
    )


def answers(analysis: Mapping[str, Any]) -> list[str]:
    """Three sentences: did the mask move, are there confounders, accuracy with and without it."""
    found = analysis["checkpoints"]
    return [_did_it_move(found), _are_there_confounders(found), _does_it_help(found)]


def _did_it_move(found: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for one in found:
        if one["mask"] is None:
            continue
        values = one["mask"]["statistics"]
        moved = values["max"] - values["min"] >= LEAST_SPREAD
        verdict = "spread out" if moved else "hardly moved"
        parts.append(f"{one['name']} {verdict}, to {values['min']:.4f} to {values['max']:.4f}")
    return (
        f"The mask of {'; of '.join(parts)}." if parts else "No checkpoint has a mask of its own."
    )


def _are_there_confounders(found: Sequence[Mapping[str, Any]]) -> str:
    if found[0]["subsets"] is None:
        return "Whether dimensions confound cannot be said without labels."
    clear = [
        f"{one['name']} ({title})"
        for one in found
        for probe, title in (("knn", "kNN"), ("linear", "linear"))
        if one["subsets"][probe]["held_out_gain"] > 2 * one["subsets"][probe]["held_out_gain_error"]
    ]
    if not clear:
        return (
            "There is no evidence of confounders: no subset of dimensions, chosen on one half of "
            "the validation images, is clearly better than all of them on the other half."
        )
    return f"There is evidence that some dimensions are better left out, in {', '.join(clear)}."


def _does_it_help(found: Sequence[Mapping[str, Any]]) -> str:
    if found[0]["accuracy"] is None:
        return "Accuracies need labels; RankMe and redundancy below are no accuracy."
    parts = []
    for one in found:
        for probe, title in (("knn", "kNN"), ("linear", "linear")):
            accuracy = one["accuracy"][probe]
            gain = accuracy["difference"]
            if gain is None:
                continue
            low, high = (_signed(100 * gain[key]) for key in ("low", "high"))
            parts.append(
                f"{one['name']} {title} {accuracy['masked']:.1%} and {accuracy['plain']:.1%} "
                f"(difference {_signed(100 * gain['mean'])} points, {low} to {high})"
            )
    if not parts:
        return "There are no masked features whose accuracy could be compared."
    return f"Accuracy with the mask and without it: {'; '.join(parts)}."


def _redundancy(analysis: Mapping[str, Any], figures: Mapping[str, bytes]) -> str:
    rows = []
    for found in analysis["checkpoints"]:
        redundancy = found["redundancy"]
        rows.append(
            [
                found["name"],
                _pair(*_versions(redundancy, "off_diagonal_energy"), "{:.5f}"),
                _pair(*_versions(redundancy, "off_diagonal_share"), "{:.4f}"),
                _pair(*_versions(redundancy, "rankme"), "{:.1f}"),
                _pair(*_versions(redundancy, "constant_dims"), "{:d}"),
            ]
        )
    header = [
        "checkpoint",
        "off-diagonal energy of the correlation",
        "off-diagonal share of the covariance",
        "RankMe",
        "constant dimensions",
    ]
    return (
        "<h2>1. Redundancy: do several dimensions say the same?</h2>"
        + _figure(figures, "correlation", "Correlation matrices of the feature dimensions")
        + _text(
            "How to read: each point is a pair of dimensions; yellow pairs vary together, so one "
            "of them adds little. Dimensions are ordered so that correlated ones are neighbours: "
            "a bright block is a group that holds one piece of information. Off-diagonal energy "
            "is the mean squared correlation of two different dimensions (0: none are "
            "correlated, 1: all say the same). Scaling a dimension does not change a "
            "correlation, so a mask without zeros leaves this figure as it is."
        )
        + _figure(figures, "spectrum", "Share of correlated pairs, and singular values")
        + _text(
            "How to read: on the left, a line further down and to the left means fewer redundant "
            "pairs. On the right, a line that falls early means that few directions carry the "
            "features. RankMe (Garrido et al., 2023) turns the spectrum into a number of "
            "directions in use, from 1 to the number of dimensions. The mask does change these, "
            "and the share of the covariance that lies off its diagonal."
        )
        + _table(header, rows)
    )


def _subsets(analysis: Mapping[str, Any], figures: Mapping[str, bytes]) -> str:
    rows = []
    for found in analysis["checkpoints"]:
        for probe, title in (("knn", "kNN"), ("linear", "linear")):
            curve = found["subsets"][probe]
            beating = curve["share_beating_full"]
            most = max(range(len(beating)), key=beating.__getitem__)
            best = max(range(len(beating)), key=curve["best"].__getitem__)
            rates = found["subsets"]["rates"]
            rows.append(
                [
                    found["name"],
                    title,
                    f"{curve['full']:.1%}",
                    f"{curve['best'][best]:.1%} (at {rates[best]:.0%})",
                    f"{beating[most]:.0%} (at {rates[most]:.0%})" if beating[most] else "none",
                    f"{_signed(100 * curve['held_out_gain'])} ± "
                    f"{100 * curve['held_out_gain_error']:.2f} points",
                    _halves(curve["top_by_mask"], rates),
                    _halves(curve["bottom_by_mask"], rates),
                ]
            )
    header = [
        "checkpoint",
        "probe",
        "all dimensions",
        "best random draw",
        "most draws better than all",
        "held-out gain of the best",
        "upper half of mask",
        "lower half of mask",
    ]
    first = analysis["checkpoints"][0]["subsets"]
    unranked = [
        found["name"]
        for found in analysis["checkpoints"]
        if found["subsets"]["knn"]["top_by_mask"] is None
    ]
    return (
        "<h2>2. Confounders: are some dimensions better left out?</h2>"
        + _figure(figures, "subsets", "Accuracy against the share of dimensions kept")
        + _text(
            "How to read: this repeats the experiment that motivates MetaMask. Random "
            f"dimensions are kept, {analysis['settings']['draws']} draws for each share, on the "
            f"plain features of {first['train_images']:,} training and {first['val_images']:,} "
            "validation images. A cross above the dashed line is a draw that does better than "
            "all dimensions together; the numbers above the panels count them. Crosses just above "
            "the line are to be expected by chance, most of all where nearly every dimension is "
            "kept. The held-out gain corrects for that: the best draw is chosen on one half of the "
            "validation images and compared with all dimensions on the other half, both ways, ± "
            "one standard error. More than two standard errors above 0 is evidence for "
            "confounders. If the learned mask finds them, the triangles pointing up (largest "
            "weights kept) lie above the random mean, and those pointing down below it."
        )
        + _table(header, rows)
        + _figure(figures, "differences", "What the mask adds to each accuracy")
        + _missing(
            unranked, "no mask of its own, or one that is the same for all dimensions: no ranking"
        )
    )


def _mask(analysis: Mapping[str, Any], figures: Mapping[str, bytes]) -> str:
    title = "<h2>3. What the mask did: are the damped dimensions confounders?</h2>"
    masked = [found for found in analysis["checkpoints"] if found["mask"] is not None]
    missing = _missing(
        [found["name"] for found in analysis["checkpoints"] if found["mask"] is None],
        "no mask of its own (none was learned, or it was folded into the backbone)",
    )
    if not masked:
        return title + missing
    rows, statistics = [], []
    for found in masked:
        values = found["mask"]["statistics"]
        statistics.append(
            [found["name"]]
            + [f"{values[key]:.4f}" for key in ("mean", "std", "min", "max")]
            + [f"{values['effective_dims']:.1f} of {found['dims']}"]
        )
        for kind, told in found["mask"]["information"].items():
            rows.append([found["name"], *_information_row(kind, told)])
    background = (
        ""
        if analysis["data"]["background"]
        else _text(
            "The data folder has no metadata.csv, so nothing is known of the backgrounds and "
            "only the class could be measured."
        )
    )
    return (
        title
        + _figure(figures, "mask", "Histogram of the mask, and its way over training")
        + _text(
            "How to read: a mask that has learned something is spread out and keeps moving; one "
            "that stays in a narrow peak at its starting value has damped nothing, whatever the "
            "accuracies say. Mind the scale of the axes."
        )
        + _table(
            ["checkpoint", "mean", "standard deviation", "min", "max", "effective dimensions"],
            statistics,
        )
        + _figure(figures, "information", "Mask weight of each dimension against what it tells")
        + _text(
            "How to read: each point is a dimension. The share of its variance that the class "
            "explains (η² of a one-way ANOVA) says how much it tells of the task; the share that "
            "the background explains says how much of it is beside the point. If the mask damps "
            "confounders, the first panel rises (ρ above 0) and the background panels fall "
            "(ρ below 0). The standard deviation is a control: if only that one is correlated, "
            "the mask followed the size of the features and not what they mean."
        )
        + background
        + _table(
            [
                "checkpoint",
                "told of",
                "mean, lowest tenth",
                "mean, highest tenth",
                "ρ",
                "95 % interval",
                "p",
                "fits damped confounders?",
            ],
            rows,
        )
        + _text(
            "ρ is Spearman's rank correlation with |m| over the dimensions, its interval from "
            "2,000 bootstrap resamples, p from 9,999 random permutations, two-sided, for each "
            "row by itself; the tenths are those of |m|. The last column says yes or the "
            "opposite only where p < 0.05. "
            "Redundant dimensions are not independent, which makes interval and p too "
            "optimistic."
        )
        + missing
    )


def _information_row(kind: str, told: Mapping[str, Any]) -> Row:
    name, expected = INFORMATION[kind]
    row = [name, f"{told['lowest_tenth']:.3f}", f"{told['highest_tenth']:.3f}"]
    rank = told["rank_correlation"]
    if rank is None:
        return [*row, "not defined", "", "", "constant values" if expected else ""]
    if expected == 0:
        verdict = ""
    elif rank["p_value"] >= 0.05:
        verdict = "not shown"
    else:
        verdict = "yes" if rank["rho"] * expected > 0 else "the opposite"
    interval = f"{_signed(rank['low'])} to {_signed(rank['high'])}"
    return [*row, _signed(rank["rho"]), interval, f"{rank['p_value']:.4f}", verdict]


def _bracket(analysis: Mapping[str, Any], figures: Mapping[str, bytes]) -> str:
    rows = []
    for found in analysis["checkpoints"]:
        for version in ("plain", "masked"):
            terms = found["bracket"][version]
            if terms is None:
                continue
            rows.append(
                [
                    f"{found['name']}, {version}",
                    f"{terms['contrastive_loss']:.4f}",
                    f"{terms['intra_class_variance']:.4f}",
                    str(terms["negatives"]),
                    f"{terms['lower']:.4f}",
                    f"{terms['cross_entropy']:.4f}",
                    f"{terms['upper']:.4f}",
                    f"{terms['width']:.4f}",
                    "yes" if terms["inside"] else "no",
                ]
            )
    header = [
        "features",
        "L_con (nats)",
        "V",
        "K",
        "lower side (nats)",
        "L_CE (nats)",
        "upper side (nats)",
        "width (nats)",
        "inside?",
    ]
    bracket = analysis["checkpoints"][0]["bracket"]
    positives = {
        "two views": "the other augmented view of the same image, by the run's own augmentations",
        "same class": "any validation image of the same class (the mean over all of them)",
    }[bracket["positives"]]
    return (
        "<h2>4. Bounds: how closely does the contrastive loss bound the task?</h2>"
        + _figure(figures, "bracket", "The bracket around the cross-entropy")
        + _text(
            "How to read: theorem 4.2 of Wang et al. (ICLR 2022), on which MetaMask's theorems "
            "5.1 and 5.2 build, says that the cross-entropy L_CE of the classifier made of the "
            "class means lies between L_con − √V − V/2 − log(K/C) and L_con + √V − log(K/C). "
            "A bar is that bracket, its width 2√V + V/2 depends on the intra-class variance V "
            "alone. MetaMask claims that masking narrows it: compare the masked bar with the "
            "plain one. A narrow bracket alone is no merit: features that all collapse to one "
            "point have width 0."
        )
        + _text(
            f"What was computed: {bracket['images']:,} validation images, classes of equal size, "
            f"features of length 1, temperature 1, positives: {positives}, which share their "
            "label as the theorem assumes; negatives: all K embeddings, so the theorem's term "
            "of order K^(−1/2) is absent. The cross-entropy should then lie inside (below "
            "the upper side it must); that it does checks the computation, not the method. At "
            "temperature 1 even good features of length 1 stay near log C."
        )
        + _table(header, rows)
        + _missing(
            [f["name"] for f in analysis["checkpoints"] if f["bracket"]["masked"] is None],
            "no mask of its own: only the plain bracket",
        )
    )


def _versions(numbers: Mapping[str, Any], key: str) -> tuple[Any, Any]:
    masked = numbers["masked"]
    return numbers["plain"][key], None if masked is None else masked[key]


def _pair(plain: float, masked: float | None, form: str) -> str:
    return form.format(plain) if masked is None else f"{form} / {form}".format(plain, masked)


def _halves(curve: Sequence[float] | None, rates: Sequence[float]) -> str:
    return "no ranking" if curve is None else f"{curve[list(rates).index(0.5)]:.1%}"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")


def _text(text: str) -> str:
    return f"<p>{escape(text)}</p>\n"


def _missing(names: Sequence[str], reason: str) -> str:
    if not names:
        return ""
    return f'<p class="none">{escape(", ".join(names))}: {escape(reason)}.</p>\n'


def _figure(figures: Mapping[str, bytes], name: str, title: str) -> str:
    if name not in figures:
        return ""
    content = base64.b64encode(figures[name]).decode()
    return f'<figure><img alt="{escape(title)}" src="data:image/png;base64,{content}"></figure>\n'


def _table(header: Row, rows: Sequence[Row]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>\n{body}</table></div>\n'
