"""Folders on disk that always hold one whole checkpoint, however the process ends and however full the disk is.

The checkpoint before it is kept beside it, for the day on which it turns out to be damaged.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from trifuse.architectures.storage.atomic_files import sync_folder
from trifuse.kernels.errors import CheckpointError

_MOST_FAILURES = 3  # in a row
_COPIES_ON_DISK = 4  # beside the first last/: the one before it, two of best/, and one while it is written
T = TypeVar("T")


class CheckpointFolder:
    """A folder that always holds one whole checkpoint, whenever the process is killed.

    The new checkpoint is written beside the old one and read back; then it takes that one's place in two renames, and
    that one the place of the one before, which ends in ``.old``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.previous = path.with_name(f"{path.name}.old")
        self._new, self._damaged = path.with_name(f"{path.name}.new"), path.with_name(f"{path.name}.damaged")

    def recover(self) -> None:
        """Finish a change of places that was cut short, and remove what an unfinished write left."""
        if self.previous.exists() and not self.path.exists():  # killed between the renames: the new one was complete
            os.rename(self._new if self._new.exists() else self.previous, self.path)
        for leftover in (self._new, self._damaged):
            shutil.rmtree(leftover, ignore_errors=True)

    def fall_back(self) -> None:
        """Let the checkpoint before take the place of the newest one, which is damaged."""
        if self.path.exists():
            os.rename(self.path, self._damaged)
        os.rename(self.previous, self.path)
        shutil.rmtree(self._damaged, ignore_errors=True)

    @contextmanager
    def replaced(self) -> Iterator[Path]:
        """Yield an empty folder to fill; afterwards its content is the checkpoint.

        If filling it fails, the previous checkpoint stays.
        """
        self.recover()
        try:
            self._new.mkdir()
            yield self._new
        except BaseException:
            shutil.rmtree(self._new, ignore_errors=True)
            raise
        if self.path.exists():
            shutil.rmtree(self.previous, ignore_errors=True)
            os.rename(self.path, self.previous)
        os.rename(self._new, self.path)
        sync_folder(self.path.parent)


class SaveError(CheckpointError):
    """Checkpoints can no longer be written; the one before them is kept. On the command line, exit code 5."""


class CheckpointManager:
    """Save ``last/`` and ``best/`` of a run; a full disk costs a checkpoint, and the run only if it stays full.

    Args:
        out: the output folder.
        say: prints a line.
    """

    def __init__(self, out: Path, say: Callable[[str], None]) -> None:
        self.last, self.best = CheckpointFolder(out / "last"), CheckpointFolder(out / "best")
        self._say = say
        self._failures = 0
        self._damaged: list[CheckpointFolder] = []

    def recover(self) -> None:
        """Bring both folders in order after a process was killed."""
        self.last.recover()
        self.best.recover()

    def load(self, checkpoint: CheckpointFolder, read: Callable[[Path], T]) -> T:
        """Read a checkpoint; if it is damaged, say so, and read the one before it: see `drop_damaged`.

        Raises:
            CheckpointError: neither can be read.
        """
        try:
            return read(checkpoint.path)
        except CheckpointError as error:
            try:
                found = read(checkpoint.previous)
            except CheckpointError as worse:
                raise CheckpointError(f"{error}; nor can the one before take its place: {worse}") from error
            self._say(f"warning: {error}; {checkpoint.previous.name}/, the one before, takes its place")
            self._damaged.append(checkpoint)
            return found

    def drop_damaged(self) -> None:
        """Give their places on the disk to the checkpoints that were read for damaged ones, after all ranks did."""
        while self._damaged:
            self._damaged.pop().fall_back()

    def save_first(self, fill: Callable[[Path], None]) -> None:
        """Write ``last/`` before there is anything to lose.

        Raises:
            CheckpointError: the folder cannot be written, or has no room for the checkpoints to come.
        """
        try:
            with self.last.replaced() as folder:
                fill(folder)
        except OSError as error:
            raise CheckpointError(f"{self.last.path}: cannot be written ({error}); choose another folder") from error
        needed = _COPIES_ON_DISK * sum(file.stat().st_size for file in self.last.path.iterdir())
        free = shutil.disk_usage(self.last.path).free
        if free < needed:
            raise CheckpointError(
                f"{self.last.path}: the checkpoints need {needed / 1e6:.0f} MB more and {free / 1e6:.0f} MB are free; "
                "make room, or choose another folder"
            )

    def save(self, checkpoint: CheckpointFolder, fill: Callable[[Path], None]) -> bool:
        """Save and return True; on a full disk keep the old checkpoint, say so, and return False.

        Raises:
            SaveError: several saves in a row failed.
        """
        try:
            with checkpoint.replaced() as folder:
                fill(folder)
        except OSError as error:
            self._failures += 1
            self._say(f"warning: {checkpoint.path} could not be saved ({error}); the one before it is kept")
            if self._failures >= _MOST_FAILURES:
                raise SaveError(
                    f"{checkpoint.path}: {self._failures} saves in a row failed, the last one with: {error}; "
                    f"{self._remedy()}"
                ) from error
            return False
        self._failures = 0
        return True

    def save_final(self, fill: Callable[[Path], None]) -> None:
        """Write ``last/`` where no later save could make good a failure.

        Raises:
            SaveError: it failed.
        """
        if not self.save(self.last, fill):
            raise SaveError(f"{self.last.path}: the final checkpoint could not be saved; {self._remedy()}")

    def _remedy(self) -> str:
        if self.last.path.parent.is_dir():
            return "make room and resume"
        return "the run's folder has gone from there: resume where it lies by now, or put it back and resume"
