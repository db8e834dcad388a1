"""What the header of a WFDB record says, and what it leaves open: the libraries that read one fill in defaults.

A header has a line for the record and one for each signal; their fields are separated by blanks, and each but the
first two may be left out with all that follow::

    name signals [rate[/counter] [samples [time [date]]]]
    file format[xN] [gain[(baseline)][/unit] [bits [zero [first [checksum [block [name]]]]]]]

``xN`` is the number of samples that the signal has in each frame; the rate is that of the frames. A gain of 0, like one
that is left out, says that the signal is not calibrated.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from trifuse.architectures.storage.file_names import path_below, real_path
from trifuse.architectures.storage.text import read_text
from trifuse.kernels.errors import DataError, require

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RATE = re.compile(rf"({_NUMBER})(?:/{_NUMBER}(?:\({_NUMBER}\))?)?")
_FORMAT = re.compile(r"\d+(?:x(\d+))?(?::\d+)?(?:\+\d+)?")
_GAIN = re.compile(rf"({_NUMBER})(?:\([+-]?\d+\))?(?:/(\S+))?")
_DATE_FIELD, _NAME_FIELD = 4, 8
_WANT_RATE, _WANT_GAIN = "samples per second as a number, such as 500", "counts per unit, such as 1000/mV or 1000(0)/mV"


@dataclass(frozen=True)
class WfdbSignal:
    """A signal by its line; what is None the line does not say."""

    file: Path
    name: str | None
    samples_per_frame: int
    gain: float | None
    unit: str | None
    checksum: int | None


@dataclass(frozen=True)
class WfdbHeader:
    """A record by its header: frames per second, if it says so, and its signals."""

    rate_hz: float | None
    signals: tuple[WfdbSignal, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the samples, each once."""
        return tuple(dict.fromkeys(signal.file for signal in self.signals))


@contextmanager
def without_date(header: Path) -> Iterator[Path]:
    """Yield the path, without suffix, of a record that is the same but for time and date in its first line.

    Nothing here needs them, and data sets write them in forms (``2014-05-08 05:05:15``, ``12-May-2020``) that are not
    the format's and that wfdb refuses. Where there are some, header and samples are those of a temporary folder: a copy
    without them, and links.
    """
    lines = read_text(header, errors="replace").splitlines()
    first = next((number for number, line in enumerate(lines) if _holds_fields(line)), 0)
    if not lines or len(lines[first].split()) <= _DATE_FIELD:
        yield header.with_suffix("")
        return
    lines[first] = " ".join(lines[first].split()[:_DATE_FIELD])
    with TemporaryDirectory() as name:
        folder = Path(name)
        for line in filter(_holds_fields, lines[first + 1 :]):
            link = folder / Path(line.split()[0]).name
            if not link.is_symlink():
                link.symlink_to(real_path(header.parent / link.name))
        (folder / header.name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        yield (folder / header.name).with_suffix("")


def _holds_fields(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


def read_header(path: Path) -> WfdbHeader:
    """Read a header of a record of one segment.

    Raises:
        DataError: a field is not what stands in its place, the record has several segments, or its lines are not as
            many as its signals; all problems of the header at once.
    """
    text = read_text(path, errors="replace")
    lines = [line.split() for line in text.splitlines() if _holds_fields(line)]
    if not lines or len(lines[0]) < 2 or not lines[0][1].isdecimal():
        raise DataError(path, "first line", got=" ".join(lines[0]) if lines else "nothing", want="name and signals")
    record, *signals = lines
    if "/" in record[0]:
        hint = "write it as one, for example by wfdb.rdrecord and wfdb.wrsamp"
        raise DataError(path, "segments", got=record[0], want="a record of one segment", hint=hint)
    problems: list[DataError] = []
    rate = None
    if len(record) > 2:
        if stated := _RATE.fullmatch(record[2]):
            rate = float(stated[1])
        else:
            problems.append(DataError(path, "rate", got=record[2], want=_WANT_RATE))
    if len(signals) != int(record[1]):
        got = f"{len(signals)} lines of signals"
        problems.append(DataError(path, "signals", got=got, want=f"{record[1]}, as its first line says"))
    found = tuple(_signal(path, number, fields, problems) for number, fields in enumerate(signals, start=1))
    if problems:
        raise DataError.merge(problems)
    return WfdbHeader(rate, found)


def _signal(path: Path, number: int, fields: list[str], problems: list[DataError]) -> WfdbSignal:
    """Read the line of a signal; what stands in no field's form is a problem."""
    format_ = _FORMAT.fullmatch(fields[1]) if len(fields) > 1 else None
    gain = _GAIN.fullmatch(fields[2]) if len(fields) > 2 else None
    file = path_below(path.parent, fields[0])
    counts = fields[3:_NAME_FIELD]
    wrong = [text for text in counts if not re.fullmatch(r"[+-]?\d+", text)]
    for faulty, got, want in (
        (file is None, fields[:1], "a file below the folder of the header"),
        (format_ is None, fields[1:2], "a file and its format, such as rec.dat 16"),
        (gain is None and len(fields) > 2, fields[2:3], _WANT_GAIN),
        (bool(wrong), wrong, "whole numbers between gain and name"),
    ):
        if faulty:
            problems.append(DataError(path, f"signal {number}", got=" ".join(got) or "nothing", want=want))
    return WfdbSignal(
        file=file or path,
        name=" ".join(fields[_NAME_FIELD:]) or None,
        samples_per_frame=int(format_[1] or 1) if format_ else 1,
        gain=float(gain[1]) or None if gain else None,
        unit=gain[2] if gain else None,
        checksum=int(counts[3]) if len(counts) > 3 and not wrong else None,
    )


def require_reader(ecgs: Iterable[Path]) -> None:
    """Look for what reading ECGs needs, by their names alone.

    Raises:
        MissingExtra: wfdb is not installed, and one of them is a WFDB record.
    """
    if record := next((path for path in ecgs if path.suffix in ("", ".dat", ".hea")), None):
        require("wfdb", "ecg", f"reading {record.name}")
