"""From an ECG to one heart beat: 600 samples of every lead, round the R peak, the median over all beats alike.

The steps: resample to 500 Hz; band-pass 0.5 to 50 Hz without delay; find QRS complexes in lead II (in the most peaked
lead where II shows none); lay the beats over each other, one shift for all leads; leave out beats that do not look like
the mean, such as extra systoles; take the median over the rest.

At the edges: a record shorter than one beat's 1.2 s has none and is an error; of a record longer than five minutes the
first five count. Beats that begin before the record, or end after it, are left out.

The detector is ``scipy.signal.find_peaks`` on the energy of the QRS band. wfdb's XQRS was tried beside it: as it comes,
it finds no beat in one of seven public records and takes T waves for beats in another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from trifuse.architectures.storage.lead_scaling import VOLTAGE_UNIT_MV, LeadScaling
from trifuse.architectures.storage.text import count
from trifuse.kernels.errors import DataError, MissingExtra

from .files import read_ecg
from .quality import arms_look_swapped, recorded_part
from .signal import LEADS, RATE_HZ, EcgRecord, at_rate

BEFORE_R, AFTER_R = 200, 400
"""Samples of a beat before its R peak, and from there on: -0.4 s to +0.8 s."""
BEAT_SAMPLES = BEFORE_R + AFTER_R
PADDING = 4
"""Zeros on either side of a beat, so that the network can halve it five times."""
LONGEST_S = 300
ALIKE = 0.8
"""Beats that correlate less with the mean beat, from 0.2 s before to 0.4 s after R, are left out."""
HEART_RATES_BPM = (25, 250)

_BAND_HZ = (0.5, 50.0)
_QRS_BAND_HZ = (8.0, 30.0)
_REFRACTORY_S = 0.25
_CLOSEST_S = 0.1  # closer than any two heart beats: what shows that a record plays too fast
_QRS_S = 0.08
_WAVE_BAND_HZ = (3.0, 40.0)
_CENTRE_AFTER_R_S = 0.006  # measured on seven public records, where it scatters by 0.005 s
_SHIFT = 10  # samples by which beats are moved to lie over each other
_COMPLEX = slice(BEFORE_R - 100, BEFORE_R + 200)


@dataclass(frozen=True, eq=False)
class Beat:
    """One heart beat.

    Attributes:
        signal_mv: float32 samples of shape (12, 600), millivolts at 500 Hz, R at sample 200, leads as in ``LEADS``;
            zero where a lead is not usable, never NaN.
        usable: which of the 12 leads can be used.
        beats: how many beats it is the median of; 1 for a file that holds a median beat already.
        notes: what was changed, left out or is odd, a sentence each.
        name: of the record.
        heart_rate_bpm: beats per minute; None where a single beat tells none.
    """

    signal_mv: np.ndarray
    usable: np.ndarray
    beats: int
    notes: tuple[str, ...] = ()
    name: str = ""
    heart_rate_bpm: float | None = None


def load_beat(path: Path, *, rate_hz: float | None = None, min_beats: int = 3) -> Beat:
    """Read an ECG of any supported kind as one beat; 600 samples at 500 Hz are a median beat already.

    Raises:
        DataError: there is no beat to be had; see ``read_ecg`` and ``median_beat``.
        MissingExtra: wfdb or scipy is not installed and needed.
    """
    record = read_ecg(path, rate_hz=rate_hz)
    if record.rate_hz == RATE_HZ and record.signal_mv.shape[1] == BEAT_SAMPLES:
        return _beat(record, record.signal_mv, record.usable, 1, None, [])
    return median_beat(record, min_beats)


def median_beat(record: EcgRecord, min_beats: int = 3) -> Beat:
    """Reduce a record to its median beat.

    Args:
        record: at any rate. If it is not simultaneous, each lead's beats are taken from the part in which it was
            recorded, by the R peaks of lead II if that ran all the time, else by the lead's own.
        min_beats: how many beats there must be; 1 makes do with the little that paper prints show.

    Raises:
        DataError: no R peak is found, the heart rate is none (is the sampling rate right?), or too few beats are alike.
        MissingExtra: scipy is not installed.
    """
    record, notes = _shortened(at_rate(record))
    if record.signal_mv.shape[1] < BEAT_SAMPLES:
        got = f"{record.duration_s:.2f} s"
        raise DataError(record.name, "duration", got=got, want="at least the 1.2 s of one beat")
    filtered = _filtered(record)
    reduce = _median_of_all_leads if record.simultaneous else _median_group_by_group
    signal, usable, beats, rate, found = reduce(record, filtered, min_beats)
    if beats < 3:
        found.append(f"a median of only {count(beats, 'beat')}: noise is not averaged away")
    return _beat(record, signal, usable, beats, rate, [*notes, *found])


def network_ecg(beat: Beat, scaling: LeadScaling = "zscore") -> Tensor:
    """Return what the network sees of a beat: float32 of shape (12, 608).

    Every lead has mean 0, and standard deviation 1 or what its voltage is in units of `VOLTAGE_UNIT_MV`, and then four
    zeros on either side; a lead that cannot be used, or does not vary, is zero.
    """
    signal = beat.signal_mv.astype(np.float64)
    centred = signal - signal.mean(1, keepdims=True)
    spread = centred.std(1, keepdims=True)
    varies = (spread > 1e-6) & beat.usable[:, None]
    unit = np.where(varies, spread, 1) if scaling == "zscore" else VOLTAGE_UNIT_MV
    scaled = np.where(varies, centred / unit, 0)
    return F.pad(torch.from_numpy(scaled.astype(np.float32)), (PADDING, PADDING))


def _beat(
    record: EcgRecord, signal: np.ndarray, usable: np.ndarray, beats: int, rate: float | None, notes: list[str]
) -> Beat:
    signal = np.where(usable[:, None], signal, 0).astype(np.float32)
    if usable[[LEADS.index("I"), LEADS.index("aVR")]].all() and arms_look_swapped(signal, BEFORE_R):
        notes = [*notes, "P and QRS are negative in I and positive in aVR: were the arm electrodes swapped?"]
    return Beat(signal, usable, beats, (*record.notes, *notes), record.name, rate)


def _shortened(record: EcgRecord) -> tuple[EcgRecord, list[str]]:
    """Keep the first five minutes."""
    if record.duration_s <= LONGEST_S:
        return record, []
    note = f"the first {LONGEST_S} s of {record.duration_s:.0f} s are used"
    return replace(record, signal_mv=record.signal_mv[:, : LONGEST_S * RATE_HZ]), [note]


def _signal_processing() -> Any:
    try:
        import scipy.signal
    except ImportError:
        raise MissingExtra("scipy", "med", "finding heart beats") from None
    return scipy.signal


def _band_pass(values: np.ndarray, band_hz: tuple[float, float]) -> np.ndarray:
    """Filter forwards and backwards, so that nothing is delayed."""
    signal = _signal_processing()
    return signal.sosfiltfilt(signal.butter(2, band_hz, "bandpass", fs=RATE_HZ, output="sos"), values)


def _filtered(record: EcgRecord) -> np.ndarray:
    """Band-pass the part of each lead that was recorded; NaN elsewhere."""
    filtered = np.full(record.signal_mv.shape, np.nan)
    for row in np.flatnonzero(record.usable):
        part = recorded_part(record.signal_mv[row])
        if part.stop - part.start >= BEAT_SAMPLES:
            filtered[row, part] = _band_pass(record.signal_mv[row, part], _BAND_HZ)
    return filtered


def _qrs_peaks(leads: np.ndarray, distance_s: float = _REFRACTORY_S) -> np.ndarray:
    """Return where the energy of the QRS band peaks in leads of shape (leads, T)."""
    window = np.hanning(round(_QRS_S * RATE_HZ) + 2)[1:-1]
    power = (_band_pass(leads, _QRS_BAND_HZ) ** 2).sum(0)
    envelope = np.sqrt(np.convolve(power, window / window.sum(), "same"))
    height = 0.4 * np.percentile(envelope, 98)
    return _signal_processing().find_peaks(envelope, height=height, distance=round(distance_s * RATE_HZ))[0]


def _heart_rate(peaks: np.ndarray) -> float | None:
    return 60 * RATE_HZ / float(np.median(np.diff(peaks))) if len(peaks) > 1 else None


def _plausible_peaks(values: np.ndarray, name: str) -> tuple[np.ndarray, float | None]:
    """Return the QRS complexes of a lead and the heart rate.

    Raises:
        DataError: there are none, or no heart beats like that.
    """
    peaks = _qrs_peaks(values[None])
    rates = [_heart_rate(_qrs_peaks(values[None], _CLOSEST_S)), _heart_rate(peaks)]
    low, high = HEART_RATES_BPM
    if strange := [rate for rate in rates if rate is not None and not low <= rate <= high]:
        hint = "is the sampling rate right? pass rate_hz="
        raise DataError(name, "heart rate", got=f"{strange[0]:.0f}/min", want=f"{low} to {high}/min", hint=hint)
    return peaks, rates[-1]


def _median_of_all_leads(
    record: EcgRecord, filtered: np.ndarray, min_beats: int
) -> tuple[np.ndarray, np.ndarray, int, float | None, list[str]]:
    """Return the median beat of leads that were recorded together."""
    problems: list[DataError] = []
    for row in _detection_leads(record):
        try:
            peaks, rate = _plausible_peaks(filtered[row], record.name)
            leads = filtered[record.usable]
            r_peaks = _on_the_peak(filtered[row], peaks) if LEADS[row] == "II" else _near_r(leads, peaks)
            beats = _alike(_laid_over(leads, r_peaks))
            _refuse_too_few(record.name, len(beats), len(peaks), min_beats)
        except DataError as problem:
            problems.append(problem)
            continue
        signal = np.zeros((len(LEADS), BEAT_SAMPLES))
        signal[record.usable] = np.median(beats, 0)
        notes = [f"beats found in {LEADS[row]}"] if LEADS[row] != "II" else []
        return signal, record.usable, len(beats), rate, notes
    raise problems[0]


def _detection_leads(record: EcgRecord) -> Iterator[int]:
    """Yield lead II if it is usable, then the most peaked lead."""
    second = LEADS.index("II")
    if record.usable[second]:
        yield second
    centred = record.signal_mv - record.signal_mv.mean(1, keepdims=True)
    variance = np.maximum((centred**2).mean(1), 1e-12)
    kurtosis = np.where(record.usable, (centred**4).mean(1) / variance**2, 0)
    if (peaked := int(kurtosis.argmax())) != second:
        yield peaked


def _refuse_too_few(name: str, alike: int, found: int, min_beats: int) -> None:
    if alike >= max(min_beats, 1):
        return
    hint = "is the sampling rate right? is it an ECG?"
    if alike:
        hint = f"pass min_beats={alike} to make do with them, at the price of noise"
    got = f"{alike} of the {found} that were found"
    raise DataError(
        name, "beats", got=got, want=f"at least {max(min_beats, 1)} complete beats that are alike", hint=hint
    )


def _on_the_peak(values: np.ndarray, peaks: np.ndarray) -> np.ndarray:
    """Move each QRS complex to its tallest deflection, the same polarity in all of them."""
    reach = round(_QRS_S * RATE_HZ)
    around = [values[max(0, peak - reach) : peak + reach + 1] for peak in peaks]
    upright = np.median([part.max() + part.min() for part in around] or [0.0]) >= 0
    starts = np.maximum(0, peaks - reach)
    return starts + [int(part.argmax() if upright else part.argmin()) for part in around]


def _near_r(leads: np.ndarray, peaks: np.ndarray) -> np.ndarray:
    """Move QRS complexes to where lead II would have its R peak: shortly before the middle of all leads' energy."""
    power = (_band_pass(leads, _WAVE_BAND_HZ) ** 2).sum(0)
    reach, moved = round(0.1 * RATE_HZ), []
    for peak in peaks:
        start = max(0, peak - reach)
        part = power[start : peak + reach + 1]
        moved.append(start + part @ np.arange(part.size) / part.sum() - _CENTRE_AFTER_R_S * RATE_HZ)
    return np.rint(moved).astype(int)


def _laid_over(leads: np.ndarray, r_peaks: np.ndarray) -> np.ndarray:
    """Cut beats of shape (n, leads, 600) from leads (leads, T), each moved so that its QRS lies over the median one."""
    first, last = BEFORE_R + _SHIFT, leads.shape[1] - AFTER_R - _SHIFT
    wide = [leads[:, r - first : r + AFTER_R + _SHIFT] for r in r_peaks if first <= r <= last]
    if not wide:
        return np.zeros((0, len(leads), BEAT_SAMPLES))
    beats = np.stack(wide)
    qrs = slice(first - 50, first + 50)
    template = np.median(beats[:, :, qrs], 0)
    shifts = range(-_SHIFT, _SHIFT + 1)
    fits = [(beats[:, :, qrs.start + shift : qrs.stop + shift] * template).sum((1, 2)) for shift in shifts]
    best = np.argmax(fits, 0)
    return np.stack([beat[:, start : start + BEAT_SAMPLES] for beat, start in zip(beats, best, strict=True)])


def _alike(beats: np.ndarray) -> np.ndarray:
    """Keep the beats that correlate with the mean of all."""
    if len(beats) < 2:
        return beats
    flat = beats[:, :, _COMPLEX].reshape(len(beats), -1)
    flat = flat - flat.mean(1, keepdims=True)
    mean = flat.mean(0)
    correlation = flat @ mean / np.maximum(np.linalg.norm(flat, axis=1) * np.linalg.norm(mean), 1e-12)
    return beats[correlation >= ALIKE]


def _median_group_by_group(
    record: EcgRecord, filtered: np.ndarray, min_beats: int
) -> tuple[np.ndarray, np.ndarray, int, float | None, list[str]]:
    """Return the median beat of leads that were recorded one group after the other."""
    rhythm, rate = _rhythm(record, filtered)
    signal, counts, found = np.zeros((len(LEADS), BEAT_SAMPLES)), np.zeros(len(LEADS), int), 0
    for rows, part in _groups(filtered):
        leads = filtered[rows, part]
        peaks = _near_r(leads, _qrs_peaks(leads)) if rhythm is None else rhythm - part.start
        found = max(found, len(peaks))
        beats = _alike(_laid_over(leads, peaks))
        if len(beats):
            signal[rows], counts[rows] = np.median(beats, 0), len(beats)
    fewest = int(counts[counts > 0].min(initial=counts.max()))
    _refuse_too_few(record.name, fewest, found, min_beats)
    notes = ["leads were not recorded together: each group is laid over by the R peaks of lead II"]
    if rhythm is None:
        notes = ["leads were not recorded together, nor lead II all the time: groups may lie 0.02 s apart"]
    if lost := [lead for lead, usable, n in zip(LEADS, record.usable, counts, strict=True) if usable and not n]:
        notes.append(f"{', '.join(lost)} not used: no complete beat")
    return signal, counts > 0, fewest, rate, notes


def _groups(filtered: np.ndarray) -> list[tuple[list[int], slice]]:
    """Return leads that were recorded from and to the same time, give or take 0.1 s, and their common part."""
    groups: list[tuple[list[int], slice]] = []
    for row, part in enumerate(map(recorded_part, filtered)):
        if part.stop == 0:
            continue
        for i, (rows, common) in enumerate(groups):
            if max(abs(part.start - common.start), abs(part.stop - common.stop)) < 0.1 * RATE_HZ:
                both = slice(max(part.start, common.start), min(part.stop, common.stop))
                groups[i] = ([*rows, row], both)
                break
        else:
            groups.append(([row], part))
    return groups


def _rhythm(record: EcgRecord, filtered: np.ndarray) -> tuple[np.ndarray | None, float | None]:
    """Return the R peaks and the rate of a lead II that ran all the time; without one, None."""
    second = filtered[LEADS.index("II")]
    part = recorded_part(second)
    if part.stop - part.start < 0.9 * second.size:
        return None, None
    peaks, rate = _plausible_peaks(second[part], record.name)
    return part.start + _on_the_peak(second[part], peaks), rate
