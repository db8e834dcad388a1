"""Loggers: what a run tells of its epochs beside log.csv, for TensorBoard, for MLflow, or for a tool of one's own.

log.csv belongs to the run: resuming reads it, and no epoch is lost from it. A logger has a copy to look at, so one that
fails while the run trains is left out from then on, and the run goes on.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from trifuse.kernels.errors import TrifuseError, require

from .atomic_files import write_text
from .config_json import leaves
from .text import read_text

Row = Mapping[str, float | int]


class RunLogger(Protocol):
    """Gets a run's configuration, then a row of numbers for each epoch; told on the first rank alone.

    One that is closed may be started again, for another run.
    """

    name: str

    def start(self, folder: Path, configuration: Mapping[str, Any], epochs_done: int) -> None:
        """Begin, or go on with what an earlier part of the run has begun.

        Args:
            folder: of the run, which exists.
            configuration: all that decides the run's result, as in its ``run.json``.
            epochs_done: the rows that follow begin after this epoch; later ones, which a run that was killed may have
                logged before its next checkpoint, come once more.
        """

    def log(self, row: Row) -> None:
        """Take the row of log.csv of one more epoch, which is ``row["epoch"]``, counted from 1."""

    def close(self, *, finished: bool) -> None:
        """End; not finished means that the run was stopped or failed, and may be resumed."""


class TensorBoardLogger:
    """Writes scalars, and the configuration as text, to ``tensorboard/`` in the run's folder.

    Raises:
        MissingExtra: tensorboard is not installed.
    """

    name = "tensorboard"

    def __init__(self) -> None:
        require("tensorboard", "tb", "logging to TensorBoard")

    def start(self, folder: Path, configuration: Mapping[str, Any], epochs_done: int) -> None:
        """See `RunLogger`; TensorBoard itself drops what was logged of epochs that come once more."""
        from torch.utils.tensorboard import SummaryWriter

        own = folder / "tensorboard"
        is_new = not any(own.glob("events.*"))  # TensorBoard drops no text
        self._writer = SummaryWriter(own, purge_step=epochs_done + 1)
        if is_new:
            self._writer.add_text("configuration", f"```json\n{json.dumps(configuration, indent=2)}\n```")

    def log(self, row: Row) -> None:
        """See `RunLogger`."""
        for name, value in row.items():
            self._writer.add_scalar(name, value, row["epoch"])
        self._writer.flush()

    def close(self, *, finished: bool) -> None:
        """See `RunLogger`."""
        self._writer.close()


class MLflowLogger:
    """Keeps an MLflow run of metrics and parameters in ``mlflow/mlflow.db``, SQLite, in the run's folder.

    Where ``MLFLOW_TRACKING_URI`` is set, it is kept there instead. The experiment is that of ``MLFLOW_EXPERIMENT_NAME``
    or "trifuse", the run is called like its folder. Parameters are those that the run began with.

    Raises:
        MissingExtra: mlflow, or what it needs for SQLite, is not installed.
    """

    name = "mlflow"

    def __init__(self) -> None:
        for package in ("mlflow", "sqlalchemy", "alembic"):
            require(package, "mlflow", "logging to MLflow")

    def start(self, folder: Path, configuration: Mapping[str, Any], epochs_done: int) -> None:
        """See `RunLogger`; epochs that MLflow has already are not logged again, since it would show both."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # or it tells its makers that it is used
        from mlflow import MlflowClient
        from mlflow.entities import Param

        own, known = folder.absolute() / "mlflow", folder / "mlflow" / "run_id"
        own.mkdir(exist_ok=True)
        client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{own}/mlflow.db")
        if known.exists():
            run = client.get_run(read_text(known).strip())
            client.update_run(run.info.run_id, status="RUNNING")
        else:
            run = client.create_run(_experiment(client), run_name=folder.absolute().name)
            parameters = [Param(_mlflow_name(name), str(value)) for name, value in leaves(configuration)]
            for start in range(0, len(parameters), _MOST_PARAMETERS):
                client.log_batch(run.info.run_id, params=parameters[start : start + _MOST_PARAMETERS])
            write_text(known, run.info.run_id)
        self._client, self._run_id = client, run.info.run_id
        self._epochs_there = run.data.metrics.get("epoch", 0)

    def log(self, row: Row) -> None:
        """See `RunLogger`."""
        if row["epoch"] <= self._epochs_there:
            return
        from mlflow.entities import Metric

        now_ms, epoch = int(time.time() * 1000), int(row["epoch"])
        metrics = [Metric(_mlflow_name(name), float(value), now_ms, epoch) for name, value in row.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self, *, finished: bool) -> None:
        """See `RunLogger`."""
        self._client.set_terminated(self._run_id, "FINISHED" if finished else "KILLED")


LOGGERS: dict[str, type[TensorBoardLogger] | type[MLflowLogger]] = {
    logger.name: logger for logger in (TensorBoardLogger, MLflowLogger)
}
"""The loggers that `--log` knows, by name."""


class Loggers:
    """Several loggers as one, of which those that fail are left out; see `started`.

    Args:
        say: is told once of each that fails.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.working: list[RunLogger] = []
        self._say = say

    def log(self, row: Row) -> None:
        """Give all of them a row."""
        self._tell(lambda logger: logger.log(row))

    def close(self, *, finished: bool) -> None:
        """Close all of them."""
        self._tell(lambda logger: logger.close(finished=finished))

    def _tell(self, call: Callable[[RunLogger], None]) -> None:
        for logger in tuple(self.working):
            try:
                call(logger)
            except Exception as error:  # of any package, or of the disk
                self.working.remove(logger)
                with suppress(Exception):
                    logger.close(finished=False)
                self._say(f"{logger.name} failed, and gets nothing more of this run ({error}); log.csv has every epoch")


@contextmanager
def started(
    loggers: Sequence[RunLogger],
    folder: Path,
    configuration: Mapping[str, Any],
    epochs_done: int,
    say: Callable[[str], None],
) -> Iterator[Loggers]:
    """Start loggers, and close them at the end; the arguments are those of `RunLogger.start` and of `Loggers`.

    Raises:
        TrifuseError: one of them cannot be started.
    """
    group, finished = Loggers(say), False
    try:
        for logger in loggers:
            try:
                logger.start(folder, configuration, epochs_done)
            except Exception as error:
                raise TrifuseError(f"{logger.name} cannot log to {folder}: {error}; or train without it") from error
            group.working.append(logger)
        yield group
        finished = True
    finally:
        group.close(finished=finished)


_MOST_PARAMETERS = 100  # that MLflow takes at once


def _experiment(client: Any) -> str:
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "trifuse"
    found = client.get_experiment_by_name(name)
    return str(client.create_experiment(name) if found is None else found.experiment_id)


def _mlflow_name(name: str) -> str:
    """Return a name with an underscore for every sign that MLflow refuses."""
    return re.sub(r"[^\w\-. /]", "_", name, flags=re.ASCII)
