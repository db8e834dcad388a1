"""Everything that is wrong with a folder of ECGs, found by reading each of them down to its median beat."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trifuse.architectures.storage.text import count
from trifuse.kernels.errors import DataError

from .median_beat import Beat, load_beat
from .ptbxl import TABLE, find_ecgs, open_ptbxl
from .signal import LEADS
from .wfdb_header import require_reader


@dataclass(frozen=True, eq=False)
class EcgFinding:
    """One record: its beat, or the error that there is instead."""

    path: Path
    beat: Beat | None
    error: DataError | None = None

    def __str__(self) -> str:
        """Return a line: usable leads, beats, heart rate, and what is odd; or the error."""
        if self.beat is None:
            return f"{self.path.name}: error: {self.error}"
        rate = f", {self.beat.heart_rate_bpm:.0f}/min" if self.beat.heart_rate_bpm else ""
        leads = f"{int(self.beat.usable.sum())} of {len(LEADS)} leads"
        return "; ".join([f"{self.path.name}: {leads}, {count(self.beat.beats, 'beat')}{rate}", *self.beat.notes])


@dataclass(frozen=True, eq=False)
class EcgFindings:
    """What was found: a finding per record, and what is odd about the folder."""

    root: Path
    records: tuple[EcgFinding, ...]
    notes: tuple[str, ...] = ()

    @property
    def errors(self) -> tuple[DataError, ...]:
        """The errors of records that give no beat."""
        return tuple(record.error for record in self.records if record.error is not None)


def check_ecgs(root: Path, *, min_beats: int = 3) -> EcgFindings:
    """Read every ECG of a folder down to its median beat; a record that gives none does not end the check.

    Args:
        root: PTB-XL's folder, a folder of WFDB records or arrays, or one file.
        min_beats: how many beats a median beat needs.

    Raises:
        DataError: there is no ECG at all, or PTB-XL's table is faulty.
        MissingExtra: wfdb or scipy is not installed and needed.
    """
    root, notes = Path(root), tuple[str, ...]()
    if (root / TABLE).is_file():
        data_set = open_ptbxl(root)
        paths, notes = [record.path for record in data_set.records], data_set.notes
    else:
        paths = find_ecgs(root)
    require_reader(paths)
    return EcgFindings(root, tuple(_check(path, min_beats) for path in paths), notes)


def _check(path: Path, min_beats: int) -> EcgFinding:
    try:
        return EcgFinding(path, load_beat(path, min_beats=min_beats))
    except DataError as error:
        return EcgFinding(path, None, error)
