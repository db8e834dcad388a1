"""A 12-lead ECG in memory: its leads in one order, in millivolts, with what cannot be used marked as such.

Files name and order leads as they like, count in microvolts, and have leads that were off. Here all that becomes one
form; what was changed or left out on the way is said in the record's notes, a sentence each.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from trifuse.kernels.errors import DataError, MissingExtra

from .quality import checked_leads, recorded_part, refuse_broken_triangle

LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
"""The order in which every record has its leads."""

RATE_HZ = 500
"""Samples per second that the networks work with."""

RATES_HZ = (80.0, 20_000.0)
"""Below the first, a QRS complex is not seen; above the second, nobody records an ECG."""

_MV_PER_UNIT = {"mv": 1.0, "uv": 1e-3, "nv": 1e-6, "v": 1e3}
_FROM_I_AND_II = {"III": (-1.0, 1.0), "aVR": (-0.5, -0.5), "aVL": (1.0, -0.5), "aVF": (-0.5, 1.0)}
_PREFIX = re.compile(r"^(mdc[_ ]ecg[_ ])?((lead|ecg|ableitung)[\s_.:-]*)?")
_KNOWN = {lead.lower(): row for row, lead in enumerate(LEADS)} | {"di": 0, "dii": 1, "diii": 2}


@dataclass(frozen=True, eq=False)
class EcgRecord:
    """A 12-lead ECG.

    Attributes:
        signal_mv: samples of shape (12, T) in millivolts, leads in the order of ``LEADS``; zero where a lead is not
            usable; NaN only in a record that is not simultaneous, where a lead was not being recorded.
        rate_hz: samples per second.
        name: of the record, for messages.
        usable: which of the 12 leads can be used.
        simultaneous: whether all leads show the same heart beats; paper prints of 2.5 s per lead do not.
        notes: what was changed, left out or is odd, a sentence each.
    """

    signal_mv: np.ndarray
    rate_hz: float
    name: str
    usable: np.ndarray
    simultaneous: bool = True
    notes: tuple[str, ...] = ()

    @property
    def duration_s(self) -> float:
        """Length of the record."""
        return self.signal_mv.shape[1] / self.rate_hz


def lead_row(name: str) -> int | None:
    """Return the row of a lead by any of its usual names (``aVR``, ``LEAD II``, ``MDC_ECG_LEAD_V1``); else None."""
    return _KNOWN.get(_PREFIX.sub("", name.strip().lower()))


def arrange_leads(
    samples: np.ndarray,
    names: Sequence[str],
    *,
    rate_hz: float,
    name: str,
    units: str | Sequence[str] = "mV",
    derive: bool = False,
    simultaneous: bool | None = None,
    notes: Sequence[str] = (),
) -> EcgRecord:
    """Make a record of samples whose leads have names.

    Args:
        samples: of shape (C, T); values that are not finite were not recorded.
        names: of the C channels, case and usual prefixes do not matter; channels that are none of the 12 are ignored.
        rate_hz: samples per second.
        name: of the record, for messages.
        units: of all channels, or of each: mV, uV, nV or V.
        derive: compute III, aVR, aVL and aVF that are missing from I and II.
        simultaneous: whether all leads show the same beats; None decides by the samples: where at least half of the
            leads were recorded for less than 60% of the time, as on paper prints, they do not.
        notes: what is known already.

    Raises:
        DataError: the rate is none of an ECG, leads are missing or named twice, the unit is unknown or cannot be true,
            no lead is usable, or the limb leads contradict each other.
    """
    refuse_wrong_rate(rate_hz, name)
    rows, known = _rows_of(names, name)
    said = list(notes)
    if strangers := [text for text in names if lead_row(text) is None]:
        said.append(f"ignored {', '.join(strangers)}: not among the 12 leads")
    signal = np.full((len(LEADS), samples.shape[1]), np.nan)
    for row, channel in rows.items():
        signal[row] = samples[channel] * _scale(units if isinstance(units, str) else units[channel], name)
    signal[~np.isfinite(signal)] = np.nan
    if missing := [lead for lead in LEADS if lead not in known]:
        said.append(_derive(signal, missing, name, derive))
    refuse_wrong_units(signal, name)
    if simultaneous is None:
        simultaneous = not _recorded_in_turns(signal)
    signal, usable, found = checked_leads(signal, rate_hz, name, LEADS, simultaneous=simultaneous)
    if simultaneous:
        found += refuse_broken_triangle(signal, usable, name)
    return EcgRecord(signal, float(rate_hz), name, usable, simultaneous, (*said, *found))


def at_rate(record: EcgRecord, rate_hz: float = RATE_HZ) -> EcgRecord:
    """Return the record at another rate, resampled by a polyphase filter, with a note; itself if it has that rate.

    Raises:
        MissingExtra: scipy is not installed.
    """
    if record.rate_hz == rate_hz:
        return record
    try:
        from scipy.signal import resample_poly
    except ImportError:
        raise MissingExtra("scipy", "med", "resampling an ECG") from None
    factor = Fraction(rate_hz / record.rate_hz).limit_denominator(1000)
    up, down = factor.numerator, factor.denominator
    signal = np.full((len(LEADS), -(-record.signal_mv.shape[1] * up // down)), np.nan)
    for row, lead in enumerate(record.signal_mv):
        part = recorded_part(lead)
        values = resample_poly(lead[part], up, down, padtype="line")
        start = part.start * up // down
        signal[row, start : start + values.size] = values[: signal.shape[1] - start]
    note = f"resampled from {record.rate_hz:g} to {rate_hz:g} Hz"
    return replace(record, signal_mv=signal, rate_hz=float(rate_hz), notes=(*record.notes, note))


def refuse_wrong_rate(rate_hz: float, name: str) -> None:
    """Refuse a sampling rate that no ECG has, and name the units in which the number would be one.

    Raises:
        DataError: it is not between the two `RATES_HZ`.
    """
    low, high = RATES_HZ
    if low <= rate_hz <= high:
        return
    by_unit = {"kHz": rate_hz * 1e3, "mHz": rate_hz / 1e3}
    if rate_hz > 0:
        by_unit |= {"seconds per sample": 1 / rate_hz, "milliseconds per sample": 1e3 / rate_hz}
    probable = [f"{hz:g} Hz if it is in {unit}" for unit, hz in by_unit.items() if 100 <= hz <= 10_000]
    hint = " or ".join(probable) or "whoever recorded it knows its rate"
    want = f"samples per second, {low:g} to {high:g}"
    raise DataError(name, "rate_hz", got=f"{rate_hz:g}", want=want, hint=hint)


def refuse_wrong_units(signal_mv: np.ndarray, name: str) -> None:
    """Refuse amplitudes that are implausible in millivolts.

    Raises:
        DataError: the leads' typical height is above 20 mV or below 0.02 mV.
    """
    seen = [row[np.isfinite(row)] for row in signal_mv]
    heights = [np.subtract(*np.percentile(row, (99.5, 0.5))) for row in seen if row.size and np.ptp(row) > 0]
    if not heights or 0.02 <= (height := float(np.median(heights))) <= 20:
        return
    if height > 20:
        hint = "microvolts? pass units='uV'; counts of a converter must be divided by its gain"
    else:
        hint = "millivolts or volts under another name? pass units='mV' or units='V'"
    want = "0.02 to 20 mV from trough to peak"
    raise DataError(name, "units", got=f"leads of {height:.3g} mV", want=want, hint=hint)


def _rows_of(names: Sequence[str], name: str) -> tuple[dict[int, int], list[str]]:
    """Return the channel of each row, and the leads that there are."""
    rows: dict[int, int] = {}
    for channel, text in enumerate(names):
        row = lead_row(text)
        if row is None:
            continue
        if row in rows:
            raise DataError(name, "leads", got=f"{names[rows[row]]} and {text}", want=f"{LEADS[row]} once")
        rows[row] = channel
    return rows, [LEADS[row] for row in rows]


def _recorded_in_turns(signal: np.ndarray) -> bool:
    lengths = np.array([part.stop - part.start for part in map(recorded_part, signal)])
    return bool(((lengths > 0) & (lengths < 0.6 * signal.shape[1])).sum() >= len(LEADS) / 2)


def _scale(units: str, name: str) -> float:
    word = units.strip().lower().replace("µ", "u").replace("μ", "u")
    if word not in _MV_PER_UNIT:
        raise DataError(name, "units", got=repr(units), want="mV, uV, nV or V", hint="pass units='mV' or 'uV'")
    return _MV_PER_UNIT[word]


def _derive(signal: np.ndarray, missing: list[str], name: str, derive: bool) -> str:
    """Fill in the limb leads that follow from I and II, and return the note about them."""
    possible = not {"I", "II"} & set(missing) and set(missing) <= set(_FROM_I_AND_II)
    if not (derive and possible):
        hint = "III, aVR, aVL and aVF follow from I and II: pass derive=True" if possible else ""
        got = f"no {', '.join(missing)}"
        raise DataError(name, "leads", got=got, want=f"the 12 leads {', '.join(LEADS)}", hint=hint)
    for lead in missing:
        weights = _FROM_I_AND_II[lead]
        signal[LEADS.index(lead)] = weights[0] * signal[0] + weights[1] * signal[1]
    return f"computed {', '.join(missing)} from I and II"
