"""What the files of a run's folder hold: its task, its costs, its result, or why it failed."""

import json
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from metamask_solo.atomic_files import atomic_write
from metamask_solo.errors import UserError

R = TypeVar("R", bound="Record")


class Record(BaseModel):
    """One JSON file; keys that it does not know, of another version, are ignored."""

    model_config = ConfigDict(frozen=True)
    FILE: ClassVar[str]

    @classmethod
    def is_in(cls, folder: Path) -> bool:
        return (folder / cls.FILE).is_file()

    @classmethod
    def read(cls: type[R], folder: Path) -> R:
        """The file of that folder.

        Raises:
            UserError: it is not such a file.
        """
        try:
            return cls.model_validate_json((folder / cls.FILE).read_bytes())
        except ValidationError as error:
            raise UserError(f"{folder / cls.FILE}: {first_error(error)}") from error

    def write(self, folder: Path) -> None:
        with atomic_write(folder / self.FILE) as path:
            path.write_text(json.dumps(self.model_dump(), indent=1))


class Task(Record):
    """What a run's own process is to do: the config of its pretraining, and what is measured."""

    FILE = "run.json"
    method: str
    setting: dict[str, Any]
    seed: int
    config: dict[str, Any]
    evaluations: list[str]
    keep_checkpoints: bool


class Failure(Record):
    """Why a run has no result, and the exit code of its process."""

    FILE = "failed.json"
    error: str
    exit_code: int


class Cost(Record):
    """What training costs; None where nothing was trained."""

    FILE = "measured.json"
    seconds_per_step: float | None = None
    peak_memory_mib: float | None = None
    parameters: int | None = None
    device: str | None = None


class Result(Cost):
    """What a run gave.

    Attributes:
        metrics: by the names of the evaluations, accuracies in percent; of a method with a mask,
            those of its plain features end in ``_plain``.
        chosen: what an evaluation chose on the training images, the C of the linear probe.
        logged: the last value of everything that training logged.
        curve: epoch (from 1) and accuracy in percent of the kNN on the way.
        commit: of the project, where it is used from a clone.
        versions: of the packages, and of Python.
    """

    FILE = "result.json"
    metrics: dict[str, float]
    chosen: dict[str, float] = {}
    logged: dict[str, float] = {}
    curve: list[tuple[int, float]] = []
    seconds_per_epoch: float | None = None
    epochs: int | None = None
    commit: str | None = None
    versions: dict[str, str | None] = {}


def first_error(error: ValidationError) -> str:
    """In one line what is wrong with a record."""
    first = error.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"]))
    return f"{key}={first['input']}: {first['msg']}" if key else first["msg"]
