"""Folders on disk that always hold one whole checkpoint, however the process ends and however full the disk is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trifuse.architectures.storage.atomic_files import sync_folder
from trifuse.kernels.errors import CheckpointError

_MOST_FAILURES = 3  # in a row
_COPIES_ON_DISK = 3  # beside the first last/: best/, and one of each while it is written


class CheckpointFolder:
    """A folder that always holds one whole checkpoint, whenever the process is killed.

    The new checkpoint is written beside the old one and read back; then the two change places in two renames.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._new, self._old = path.with_name(f"{path.name}.new"), path.with_name(f"{path.name}.old")

    def recover(self) -> None:
        """Finish a change of places that was cut short, and remove what an unfinished write left."""
        if self._old.exists() and not self.path.exists():  # killed between the renames: the new one was complete
            os.replace(self._new, self.path)
        for leftover in (self._new, self._old):
            shutil.rmtree(leftover, ignore_errors=True)

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
            os.rename(self.path, self._old)
        os.rename(self._new, self.path)
        shutil.rmtree(self._old, ignore_errors=True)
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

    def recover(self) -> None:
        """Bring both folders in order after a process was killed."""
        self.last.recover()
        self.best.recover()

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
                    "make room and resume"
                ) from error
            return False
        self._failures = 0
        return True
