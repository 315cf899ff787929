"""What an analysis found. The file analysis.json holds these records, field by field."""

from dataclasses import dataclass
from typing import Generic, TypeVar

from metamask_solo.analysis.bounds import Bracket
from metamask_solo.analysis.measures import RankCorrelation

T = TypeVar("T")
PROBES = {"knn": "kNN", "linear": "linear"}
References = dict[str, dict[str, float]]  # accuracies of other features, by name and probe


@dataclass(frozen=True)
class Versions(Generic[T]):
    """A measure of the plain features, and of the masked ones where there is a mask."""

    plain: T
    masked: T | None = None

    def items(self) -> list[tuple[str, T]]:
        """Those that there are, by name."""
        masked = [] if self.masked is None else [("masked", self.masked)]
        return [("plain", self.plain), *masked]


@dataclass(frozen=True)
class Difference:
    """Masked minus plain, with the 95 % interval of the paired differences over the images."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Accuracy(Versions[float]):
    """Of one probe, 0 to 1."""

    difference: Difference | None = None


@dataclass(frozen=True)
class Redundancy:
    """Of one version of the features; the singular values from the largest on."""

    constant_dims: int
    off_diagonal_energy: float
    off_diagonal_share: float
    rankme: float
    singular_values: list[float]


@dataclass(frozen=True)
class Curve:
    """Accuracies of one probe, at each rate of dimensions that are kept."""

    full: float
    mean: list[float]
    quantile_05: list[float]
    quantile_95: list[float]
    best: list[float]
    held_out_gain: float
    held_out_gain_error: float
    share_beating_full: list[float]
    top_by_mask: list[float] | None
    bottom_by_mask: list[float] | None
    draws: list[list[float]]


@dataclass(frozen=True)
class Subsets:
    """The subset experiment."""

    train_images: int
    val_images: int
    rates: list[float]
    kept_dims: list[int]
    knn: Curve
    linear: Curve
    references: References | None  # on the images of the experiment

    @property
    def curves(self) -> dict[str, Curve]:
        """By the names of the probes."""
        return {"knn": self.knn, "linear": self.linear}


@dataclass(frozen=True)
class Statistics:
    """Of the weights of a mask."""

    mean: float
    std: float
    min: float
    max: float
    effective_dims: float


@dataclass(frozen=True)
class History:
    """The mask over training."""

    step: list[int]
    statistics: list[Statistics]


@dataclass(frozen=True)
class Information:
    """What each dimension tells, the mean of those of the lowest and highest weights |m|."""

    values: list[float]
    lowest_tenth: float
    highest_tenth: float
    rank_correlation: RankCorrelation | None


@dataclass(frozen=True)
class MaskNumbers:
    """A mask, its way, and what its dimensions tell, by what they tell of."""

    values: list[float]
    statistics: Statistics
    history: History | None
    information: dict[str, Information]


@dataclass(frozen=True, kw_only=True)
class Brackets(Versions[Bracket]):
    """The bracket, and what it was computed of."""

    positives: str
    images: int


@dataclass(frozen=True)
class Numbers:
    """All measures of one checkpoint; None for what needs labels and has none, or a mask."""

    name: str
    path: str
    method: str | None
    dims: int
    accuracy: dict[str, Accuracy] | None
    redundancy: Versions[Redundancy]
    subsets: Subsets | None
    mask: MaskNumbers | None
    bracket: Brackets | None
    references: References | None  # on all images


@dataclass(frozen=True)
class Data:
    """The images; ``background`` says whether it is known what lies behind their objects."""

    folder: str
    classes: int | None
    train_images: int
    val_images: int
    background: bool


@dataclass(frozen=True)
class Settings:
    """What was asked for, and the constants of the probes."""

    seed: int
    samples: int
    draws: int
    knn_k: int
    knn_temperature: float
    penalties: list[float]


@dataclass(frozen=True)
class Analysis:
    """The whole of analysis.json."""

    made_by: str
    data: Data
    settings: Settings
    checkpoints: list[Numbers]
