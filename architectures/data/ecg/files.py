"""ECGs on disk: WFDB records, and NumPy or CSV files of bare leads.

======== =======================================================================================================
``.hea`` a WFDB record; it may be named by its ``.hea``, its ``.dat`` or without a suffix
``.npy`` one array (12, T) or (T, 12), millivolts at 500 Hz unless the caller says otherwise
``.npz`` ``signal`` or ``ecg`` as in ``.npy``; ``rate``, ``leads`` and ``units`` if the file knows them
``.csv`` a line of lead names, perhaps with their unit (``I_mV``) and a column ``time_s``, then a line per sample;
         empty cells were not recorded
======== =======================================================================================================

Nothing in a file is executed, and what a library cannot read becomes one sentence with the file's name.
"""

from __future__ import annotations

import csv
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trifuse.kernels.errors import DataError, MissingExtra

from .signal import LEADS, RATE_HZ, EcgRecord, arrange_leads

SUFFIXES = (".hea", ".npy", ".npz", ".csv")
_UNITS = re.compile(r"[\s_(\[]+([mµμun]?V)[)\]]?$")  # I_mV, I (mV)
_TIME_COLUMNS = ("time", "time_s", "t", "seconds")


@dataclass(frozen=True, eq=False)
class _Content:
    """What a file says: samples (C, T), and names, rate and units if it knows them."""

    samples: np.ndarray
    names: Sequence[str] | None = None
    rate_hz: float | None = None
    units: Sequence[str] | None = None


def read_ecg(
    path: Path,
    *,
    rate_hz: float | None = None,
    units: str | None = None,
    lead_names: Sequence[str] | None = None,
    derive: bool = False,
    simultaneous: bool | None = None,
) -> EcgRecord:
    """Read an ECG.

    Args:
        path: of the file; a WFDB record may be named without suffix.
        rate_hz: samples per second of a file that does not say; 500 without it.
        units: of a file that does not say: mV, uV, nV or V; mV without it.
        lead_names: of a file that does not say; the usual order without them.
        derive: compute III, aVR, aVL and aVF that are missing from I and II.
        simultaneous: whether all leads show the same beats; False for paper prints, whose leads are NaN outside their
            own 2.5 seconds; None decides by that.

    Raises:
        DataError: the file is missing, damaged or of another kind, says otherwise than the caller, or is no usable
            12-lead ECG.
        MissingExtra: wfdb is not installed and the file is a WFDB record.
    """
    path = Path(path)
    with _named_errors(path):
        content = _read(path)
    notes = []
    if content.rate_hz is not None and rate_hz is not None and abs(content.rate_hz - rate_hz) > 1e-3 * rate_hz:
        hint = "leave rate_hz out, or correct the file"
        raise DataError(path, "rate_hz", got=f"{rate_hz:g} Hz", want=f"{content.rate_hz:g} Hz, as it says", hint=hint)
    rate = rate_hz if content.rate_hz is None else content.rate_hz
    if rate is None:
        rate = RATE_HZ
        notes.append(f"no sampling rate is given: taken for {RATE_HZ} Hz")
    return arrange_leads(
        content.samples,
        _names(path, content, lead_names),
        rate_hz=rate,
        name=str(path),
        units=content.units or units or "mV",
        derive=derive,
        simultaneous=simultaneous,
        notes=notes,
    )


def _names(path: Path, content: _Content, lead_names: Sequence[str] | None) -> Sequence[str]:
    names = content.names or lead_names or LEADS
    if len(names) != len(content.samples):
        hint = "say which leads they are: pass lead_names=" if names is LEADS else ""
        got = f"{len(content.samples)} channels"
        raise DataError(path, "leads", got=got, want=f"{len(names)}: {', '.join(names)}", hint=hint)
    return names


def _read(path: Path) -> _Content:
    if path.suffix == ".npy":
        return _Content(_channels_first(path, np.load(path, allow_pickle=False)))
    if path.suffix == ".npz":
        return _read_npz(path)
    if path.suffix == ".csv":
        return _read_csv(path)
    return _read_wfdb(path)


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Say which file it was that could not be read, whatever a library stumbled over."""
    try:
        yield
    except (DataError, MissingExtra):
        raise
    except OSError as error:
        got = f"{error.strerror or error}: {error.filename}" if error.filename else str(error)
        raise DataError(path, "file", got=got, want="a readable ECG") from error
    except Exception as error:  # a damaged record makes wfdb raise nearly anything
        got = f"{type(error).__name__}: {error}"
        raise DataError(path, "content", got=got, want="an intact ECG", hint="copy it again") from error


def _channels_first(path: Path, array: np.ndarray) -> np.ndarray:
    """Return numbers as (C, T): the shorter side are the channels."""
    if array.dtype.kind not in "iuf":
        raise DataError(path, "content", got=f"values of type {array.dtype}", want="numbers")
    if array.ndim != 2 or array.shape[0] == array.shape[1]:
        raise DataError(path, "shape", got=array.shape, want="(leads, samples) or (samples, leads)")
    return (array if array.shape[0] < array.shape[1] else array.T).astype(np.float64)


def _read_npz(path: Path) -> _Content:
    with np.load(path, allow_pickle=False) as archive:
        key = next((key for key in ("signal", "ecg") if key in archive), None)
        if key is None:
            got = f"arrays {', '.join(sorted(archive)) or 'none'}"
            raise DataError(path, "content", got=got, want="an array named 'signal' or 'ecg'")
        samples = _channels_first(path, archive[key])
        names = [str(name) for name in archive["leads"]] if "leads" in archive else None
        rate = float(archive["rate"]) if "rate" in archive else None
        units = [str(archive["units"])] * len(samples) if "units" in archive else None
    return _Content(samples, names, rate, units)


def _read_csv(path: Path) -> _Content:
    text = path.read_text(encoding="utf-8-sig")
    delimiter = ";" if ";" in text.partition("\n")[0] else ","
    header, *lines = [line for line in csv.reader(io.StringIO(text), delimiter=delimiter) if line]
    table = np.array([[float(cell) if cell.strip() else np.nan for cell in line] for line in lines], np.float64)
    columns = dict(zip((name.strip() for name in header), table.T, strict=True))
    time = next((columns.pop(name) for name in list(columns) if name.lower() in _TIME_COLUMNS), None)
    rate = None if time is None else _rate_of(path, time)
    named = [(name, _UNITS.search(name)) for name in columns]
    names = [name[: units.start()] if units else name for name, units in named]
    units = [units[1] for _, units in named if units]
    return _Content(np.stack(list(columns.values())), names, rate, units if len(units) == len(names) else None)


def _rate_of(path: Path, time_s: np.ndarray) -> float:
    steps = np.diff(time_s)
    step = float(np.median(steps))
    if not step > 0 or np.abs(steps - step).max() > step / 2:
        raise DataError(path, "time", got="steps that differ", want="seconds that rise evenly")
    return round(1 / step, 3)


def _read_wfdb(path: Path) -> _Content:
    stem = path.with_suffix("") if path.suffix in (".hea", ".dat") else path
    header = stem.with_name(stem.name + ".hea")
    if not header.is_file():
        got = "a file of another kind" if path.is_file() else "a folder" if path.is_dir() else "nothing there"
        raise DataError(path, "file", got=got, want=f"a WFDB record with {header.name}, or .npy, .npz, .csv")
    wfdb = _load_wfdb(f"reading {header.name}")
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        record = wfdb.rdrecord(str(stem), physical=False, smooth_frames=False)
        _refuse_damage(stem, record)
        samples = np.stack(record.dac(expanded=True))
    names = None if None in record.sig_name else record.sig_name
    return _Content(samples, names, float(record.fs * record.samps_per_frame[0]), record.units)


def _refuse_damage(stem: Path, record: Any) -> None:
    """Refuse a record whose samples are not those that its header summed up, which wfdb does not check."""
    sums = record.calc_checksum(expanded=True)
    wrong = [
        name
        for name, stated, found in zip(record.sig_name, record.checksum, sums, strict=True)
        if stated is not None and (stated - found) % 65536
    ]
    if wrong:
        raise DataError(
            stem,
            "checksum",
            got=f"other samples in {', '.join(wrong)}",
            want="those that its .hea counts",
            hint="the record is damaged: copy it again",
        )


def _load_wfdb(purpose: str) -> Any:
    """Import wfdb without its dependencies' warnings.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import wfdb
    except ImportError:
        raise MissingExtra("wfdb", "ecg", purpose) from None
    return wfdb
