"""ECGs on disk: WFDB records, and NumPy or CSV files of bare leads.

======== =======================================================================================================
``.hea`` a WFDB record; it may be named by its ``.hea``, its ``.dat`` or without a suffix
``.npy`` one array (12, T) or (T, 12), millivolts at 500 Hz unless the caller says otherwise
``.npz`` ``signal`` or ``ecg`` as in ``.npy``; ``rate``, ``leads`` and ``units`` if the file knows them, each also by
         its usual other names (``fs``, ``lead_names``); any other array is refused
``.csv`` a line of lead names, perhaps with their unit (``I_mV``) and a column of the time (``time_s``, ``t [ms]``),
         then a line per sample; between commas, or between semicolons or tabs, and then perhaps with decimal commas;
         empty cells were not recorded
======== =======================================================================================================

Nothing in a file is executed, and what a library cannot read becomes one sentence with the file's name. A
sampling rate that nobody says is taken for granted, with a note; a unit is not, for amplitudes are an ECG's in one unit
alone.
"""

from __future__ import annotations

import csv
import io
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from trifuse.architectures.storage.atomic_files import damage_advice, sha256_of
from trifuse.architectures.storage.numpy_file import NUMBERS, TEXT, Limit, open_npz, read_npy
from trifuse.architectures.storage.regular_file import require_regular
from trifuse.architectures.storage.text import listed, read_text, repeated
from trifuse.kernels.errors import DataError, MissingExtra

from .signal import LEADS, RATE_HZ, EcgRecord, arrange_leads, lead_row
from .wfdb_header import WfdbHeader, WfdbSignal, read_header, without_date

SUFFIXES = (".hea", ".npy", ".npz", ".csv")
_UNITS = re.compile(r"[\s_(\[]+([mµμun]?V)[)\]]?$")  # I_mV, I (mV)
_FACTS = Limit(1 << 16, "as it is a fact about 12 leads")  # of .npz files
_KEYS = {  # of .npz files: what arrays are for, and their names, the first of which is ours
    "signal": ("signal", "ecg"),
    "leads": ("leads", "lead_names", "lead_name", "sig_name", "channel_names"),
    "rate": ("rate", "rate_hz", "fs", "sfreq", "sample_rate", "sampling_rate", "sampling_frequency", "frequency"),
    "units": ("units", "unit"),
}
_TIME = re.compile(
    r"(?:(?:time|zeit|t)(?:[\s_(\[]+|$))?(s|secs?|seconds?|ms|msecs?|milliseconds?)?[)\]]?", re.IGNORECASE
)
_COUNTERS = ("", "index", "sample", "samples")  # columns that number the samples: pandas leaves the name empty
_WFDB_RATE_HZ = 250.0  # of a header that says none, by the definition of the format


@dataclass(frozen=True, eq=False)
class _Content:
    """What a file says: samples (C, T), names, rate and units where it knows them, and what is odd about it.

    ``usual_rate_hz`` is what a file of its kind means that says no rate.
    """

    samples: np.ndarray
    names: Sequence[str] | None = None
    rate_hz: float | None = None
    units: Sequence[str] | None = None
    notes: Sequence[str] = ()
    usual_rate_hz: float = RATE_HZ


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
        rate_hz: samples per second of a file that does not say; 500 without it, and 250 of a WFDB record.
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
    _refuse_contradictions(path, content, rate_hz, units, lead_names)
    rate = rate_hz if content.rate_hz is None else content.rate_hz
    notes = list(content.notes)
    if rate is None:
        rate = content.usual_rate_hz
        notes.append(f"no sampling rate is given: taken for {rate:g} Hz")
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


def digest_of_samples(path: Path) -> str:
    """Digest what a file holds of an ECG: of a WFDB record its samples and not its header, which has a name and a date.

    Of a file that cannot be read it is none of its content.
    """
    path = Path(path)
    header = path.with_suffix(".hea") if path.suffix in ("", ".dat", ".hea") else path
    try:
        found = read_header(header) if header.suffix == ".hea" else None
        files = (path,) if found is None else found.files
        signals = () if found is None else found.signals  # several records may share a file
        told = [*map(sha256_of, files), *(str(signal.checksum) for signal in signals)]
    except (OSError, ValueError):  # which whoever reads the ECG says
        told = [str(path)]
    return sha256(" ".join(told).encode()).hexdigest()


def _refuse_contradictions(
    path: Path, content: _Content, rate_hz: float | None, units: str | None, lead_names: Sequence[str] | None
) -> None:
    """Refuse a caller who says otherwise than the file."""
    differing: list[tuple[str, str, str]] = []
    if rate_hz is not None and content.rate_hz is not None and not abs(content.rate_hz - rate_hz) <= 1e-3 * rate_hz:
        differing.append(("rate_hz", f"{rate_hz:g} Hz", f"{content.rate_hz:g} Hz"))
    if units is not None and content.units is not None and {unit.lower() for unit in content.units} != {units.lower()}:
        differing.append(("units", units, listed(dict.fromkeys(content.units))))
    if lead_names is not None and content.names is not None and list(content.names) != list(lead_names):
        differing.append(("lead_names", listed(lead_names), listed(content.names)))
    for name, got, want in differing:
        hint = f"leave {name} out, or correct the file"
        raise DataError(path, name, got=got, want=f"{want}, as it says", hint=hint)


def _names(path: Path, content: _Content, lead_names: Sequence[str] | None) -> Sequence[str]:
    names = content.names or lead_names or LEADS
    if len(names) != len(content.samples):
        hint = "say which leads they are: pass lead_names=" if names is LEADS else ""
        got = f"{len(content.samples)} channels"
        raise DataError(path, "leads", got=got, want=f"{len(names)}: {', '.join(names)}", hint=hint)
    return names


def _read(path: Path) -> _Content:
    if path.suffix == ".npy":
        return _Content(_channels_first(path, read_npy(path, Limit.of_file(path))))
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
        got = f"{error.strerror or error}: {Path(error.filename).name}" if error.filename else str(error)
        raise DataError(path, "file", got=got, want="a readable ECG") from error
    except Exception as error:  # a damaged record makes wfdb raise nearly anything
        got = f"{type(error).__name__}: {error}"
        raise DataError(path, "content", got=got, want="an intact ECG", hint=damage_advice(error)) from error


def _channels_first(path: Path, array: np.ndarray) -> np.ndarray:
    """Return numbers as (C, T): the shorter side are the channels."""
    if array.dtype.kind not in "iuf":
        raise DataError(path, "content", got=f"values of type {array.dtype}", want="numbers")
    if array.ndim != 2 or array.shape[0] == array.shape[1]:
        raise DataError(path, "shape", got=array.shape, want="(leads, samples) or (samples, leads)")
    return (array if array.shape[0] < array.shape[1] else array.T).astype(np.float64)


def _read_npz(path: Path) -> _Content:
    with open_npz(path) as archive:
        keys = _keys_of(path, archive.names)
        samples = _channels_first(path, archive.read(keys.pop("signal"), Limit.of_file(path)))
        said = {fact: archive.read(key, _FACTS, kinds=NUMBERS + TEXT) for fact, key in keys.items()}
    names, units = (_texts(said[key]) if key in said else None for key in ("leads", "units"))
    rates = np.unique(said["rate"]).tolist() if "rate" in said else []
    if len(rates) > 1:
        raise DataError(path, "rate", got=listed(rates), want="one rate, of all leads")
    if units is not None and len(units) == 1:
        units *= len(samples)
    if units is not None and len(units) != len(samples):
        raise DataError(path, "units", got=listed(units), want=f"one for all, or {len(samples)}, one for each channel")
    return _Content(samples, names, float(rates[0]) if rates else None, units)


def _keys_of(path: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the name of each array by what it is for; refuse a second one for the same, and any other array."""
    found = {fact: [name for name in names if name.lower() in known] for fact, known in _KEYS.items()}
    if not found["signal"]:
        got = f"arrays {', '.join(sorted(names)) or 'none'}"
        raise DataError(path, "content", got=got, want="an array named 'signal' or 'ecg'")
    problems = [
        DataError(path, fact, got=f"arrays {listed(several)}", want="one array", hint="leave the others out")
        for fact, several in found.items()
        if len(several) > 1
    ]
    if others := sorted(set(names).difference(*found.values())):
        want = f"none but {listed(_KEYS)}, as no other is used"
        problems.append(DataError(path, "content", got=f"arrays {listed(others)}", want=want, hint="leave them out"))
    if problems:
        raise DataError.merge(problems)
    return {fact: keys[0] for fact, keys in found.items() if keys}


def _texts(array: np.ndarray) -> list[str]:
    return [text.decode() if isinstance(text, bytes) else str(text) for text in np.atleast_1d(array).ravel().tolist()]


def _read_csv(path: Path) -> _Content:
    header, table, notes = _table(path, read_text(path))
    columns = dict(zip(header, table.T, strict=True))
    rate = _rate_of(path, {name: columns.pop(name) for name in header if name and _TIME.fullmatch(name)})
    named = [(name, _UNITS.search(name)) for name in columns]
    names = [name[: unit.start()] if unit else name for name, unit in named]
    units = {name: unit[1] if unit else "" for name, (_, unit) in zip(names, named, strict=True)}
    bare = [name for name in names if lead_row(name) is not None and not units[name]]
    if bare and any(units.values()):
        raise DataError(path, "units", got=f"none of {listed(bare)}", want="a unit in every lead's name, or in none")
    _refuse_unnamed_time(path, {name: columns[column] for name, column in zip(names, list(columns), strict=True)})
    known = [units[name] or "mV" for name in names] if any(units.values()) else None  # of a stranger none is needed
    return _Content(np.stack(list(columns.values())), names, rate, known, notes)


def _table(path: Path, text: str) -> tuple[list[str], np.ndarray, list[str]]:
    """Return the names of a CSV file's columns, its numbers, a row per line, and a note where commas are decimal."""
    delimiter = next((mark for mark in ";\t" if mark in text.partition("\n")[0]), ",")
    reader = csv.reader(io.StringIO(text), delimiter=delimiter)
    header, *lines = [(reader.line_num, cells) for cells in reader if any(map(str.strip, cells))] or [(1, [])]
    names = [name.strip() for name in header[1]]
    if double := sorted(repeated(names)):
        raise DataError(path, "columns", got=f"{listed(double)} more than once", want="each column once")
    for number, cells in lines:
        if len(cells) != len(names):
            hint = "with decimal commas, separate columns by semicolons" if delimiter == "," else ""
            want = f"{len(names)}, as in the first line"
            raise DataError(path, f"line {number}", got=f"{len(cells)} cells", want=want, hint=hint)
    cells = [cell for _, line in lines for cell in line]
    commas = any("," in cell for cell in cells)
    if commas and any("." in cell for cell in cells):
        raise DataError(path, "numbers", got="points and commas", want="one of them, before the decimals")
    numbers = []
    for number, line in lines:
        try:
            numbers.append([float(cell.replace(",", ".")) if cell.strip() else np.nan for cell in line])
        except ValueError as error:
            raise DataError(path, f"line {number}", got=error, want="numbers, or nothing") from error
    if not numbers:
        raise DataError(path, "content", got="no line of numbers", want="a line of names, then a line per sample")
    return names, np.array(numbers, np.float64), ["commas are taken for decimal points"] if commas else []


def _rate_of(path: Path, times: dict[str, np.ndarray]) -> float | None:
    """Return samples per second by the columns of the time; None without one."""
    rates = {}
    for name, time in times.items():
        unit = _TIME.fullmatch(name)[1] or "s"  # type: ignore[index]  # they match
        if not (step := _even_step(time)):
            raise DataError(path, name, got="steps that differ", want="a time that rises evenly")
        rates[name] = round((1000 if unit.lower().startswith("m") else 1) / step, 3)
    if len(set(rates.values())) > 1:
        got = listed(f"{name} {rate:g} Hz" for name, rate in rates.items())
        raise DataError(path, "time", got=got, want="one rate")
    return next(iter(rates.values()), None)


def _even_step(values: np.ndarray) -> float | None:
    """Return the step by which values rise evenly, give or take what rounding does; None if they do not."""
    steps = np.diff(values)
    step = float(values[-1] - values[0]) / max(len(steps), 1)  # of all: single ones are rounded
    return step if step > 0 and np.abs(steps - step).max() <= step / 2 else None


def _refuse_unnamed_time(path: Path, columns: dict[str, np.ndarray]) -> None:
    """Refuse a column of another name that rises evenly: a time, by which another rate than the usual may hold."""
    for name, values in columns.items():
        if lead_row(name) is not None or not (step := _even_step(values)):
            continue
        if name.lower() not in _COUNTERS or step != 1:
            got = f"no lead, but values that rise by {step:g}"
            hint = "a time: name it time_s or time_ms; anything else: leave it out"
            raise DataError(path, f"column {name!r}", got=got, want="a lead", hint=hint)


def _read_wfdb(path: Path) -> _Content:
    stem = path.with_suffix("") if path.suffix in (".hea", ".dat", ".mat") else path
    header = stem.with_name(stem.name + ".hea")
    if not header.is_file():
        got = "a file of another kind" if path.is_file() else "a folder" if path.is_dir() else "nothing there"
        raise DataError(path, "file", got=got, want=f"a WFDB record with {header.name}, or .npy, .npz, .csv")
    wfdb = _load_wfdb(f"reading {header.name}")
    said = read_header(header)
    for file in said.files:
        require_regular(file)
    named = all(signal.name for signal in said.signals)
    used = [channel for channel, each in enumerate(said.signals) if not named or lead_row(str(each.name)) is not None]
    used = used or list(range(len(said.signals)))
    leads = [said.signals[channel] for channel in used]
    _refuse_what_is_no_lead(header, leads)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), without_date(header) as undated:
        warnings.simplefilter("ignore")
        record = wfdb.rdrecord(str(undated), physical=False, smooth_frames=False)
        _refuse_damage(stem, record, said)
        samples = record.dac(expanded=True)
    notes = []
    if strangers := [str(signal.name) for signal in said.signals if signal not in leads]:
        notes.append(f"ignored {', '.join(strangers)}: not among the 12 leads")
    if any(lead.checksum is None for lead in leads):
        notes.append("its header has no checksums: damage to the samples would go unseen")
    units = [lead.unit for lead in leads]
    return _Content(
        np.stack([samples[channel] for channel in used]),
        [str(lead.name) for lead in leads] if named else None,
        None if said.rate_hz is None else said.rate_hz * leads[0].samples_per_frame,
        None if not any(units) else [unit or "mV" for unit in units],
        notes,
        usual_rate_hz=_WFDB_RATE_HZ * leads[0].samples_per_frame,
    )


def _refuse_what_is_no_lead(header: Path, leads: Sequence[WfdbSignal]) -> None:
    """Refuse leads that are not calibrated, that say no unit where others do, or that have rates of their own."""
    label = {number: str(lead.name or f"signal {number}") for number, lead in enumerate(leads, start=1)}
    problems = []
    if bare := [label[number] for number, lead in enumerate(leads, start=1) if lead.gain is None]:
        hint = "nothing says how many counts are a millivolt: write the converter's gain into their lines"
        got = f"none, or 0, of {listed(bare)}"
        problems.append(DataError(header, "gain", got=got, want="counts per unit, such as 1000/mV", hint=hint))
    lacking = [label[number] for number, lead in enumerate(leads, start=1) if not lead.unit]
    if lacking and len(lacking) < len(leads):
        problems.append(DataError(header, "units", got=f"none of {listed(lacking)}", want="one of each lead, or none"))
    if len({lead.samples_per_frame for lead in leads}) > 1:
        got = listed(f"{label[number]} {lead.samples_per_frame}" for number, lead in enumerate(leads, start=1))
        hint = "resample the leads to one rate"
        problems.append(DataError(header, "samples per frame", got=got, want="the same of all leads", hint=hint))
    if problems:
        raise DataError.merge(problems)


def _refuse_damage(stem: Path, record: Any, said: WfdbHeader) -> None:
    """Refuse a record whose samples are not those that its header summed up, which wfdb does not check."""
    sums = record.calc_checksum(expanded=True)
    wrong = [
        signal.name or f"signal {number}"
        for number, (signal, found) in enumerate(zip(said.signals, sums, strict=True), start=1)
        if signal.checksum is not None and (signal.checksum - found) % 65536
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
