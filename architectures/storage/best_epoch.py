"""Which epoch's weights a run keeps as best, and what chose it: ``best/score.json``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from trifuse.kernels.errors import CheckpointError

from .config_json import config_from_json
from .epoch_log import SMOOTHED
from .record import read_record, write_record

LAST = "last"  # what chooses the best epoch where no score does: that it is the last
SCORE_FILE = "score.json"
SCORE_COLUMN = "val_"  # begins the name of a score in log.csv
_WORDS = {"dice": "Dice", "explained": "the share that is explained"}
_CLASS = "dice_"  # begins the name of the Dice of one class


@dataclass(frozen=True)
class BestEpoch:
    """The choice of an epoch.

    Attributes:
        epoch: counted from 1.
        metric: the score, or its moving average, that chose it; or `LAST`.
        score: its value; None for the last epoch.
    """

    epoch: int
    metric: str
    score: float | None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read it from the folder of the weights.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        path = folder / SCORE_FILE
        try:
            values = read_record(path)
        except OSError as error:
            raise CheckpointError(
                f"{path}: expected the epoch, the metric and the score that chose it: {error}"
            ) from error
        return config_from_json(cls, values, path)

    def write(self, folder: Path) -> None:
        """Write it beside the weights."""
        write_record(folder / SCORE_FILE, asdict(self))

    @property
    def column(self) -> str | None:
        """The column of ``log.csv`` that chose the epoch; None for the last one."""
        return None if self.metric == LAST else f"{SCORE_COLUMN}{self.metric}"

    def words(self, cases: str, epochs: int) -> str:
        """Say which of so many epochs was chosen by what, on which ``cases`` (such as "the val cases")."""
        which = f"epoch {self.epoch} of {epochs}"
        if self.metric == LAST:
            return f"{which}, the last one, whatever its scores"
        score, averaged = self.metric.removesuffix(SMOOTHED), self.metric.endswith(SMOOTHED)
        of_class = f"Dice of {score.removeprefix(_CLASS)}" if score.startswith(_CLASS) else score
        return f"{which}, by {_WORDS.get(score, of_class)}{', averaged over epochs,' if averaged else ''} on {cases}"
