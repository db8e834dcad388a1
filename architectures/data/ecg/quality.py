"""What is wrong with the leads of an ECG: not recorded, flat, at the end of the scale, or contradicting each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trifuse.kernels.errors import DataError

SHORT_GAP_S = 0.04
"""Gaps up to this length, half a QRS complex, are bridged by a straight line."""
MOST_BRIDGED = 0.05
"""No lead may consist of bridges by more than this share."""
SATURATED_S = 0.1
"""A lead that rests on its highest or lowest value for longer in all was cut off there."""
TRIANGLE_RESIDUAL = 0.3
"""I + III may differ from II by this share of the largest of the three."""


def checked_leads(
    signal_mv: np.ndarray, rate_hz: float, name: str, leads: Sequence[str], *, simultaneous: bool
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Bridge short gaps and mask leads without a usable signal.

    Args:
        signal_mv: leads of shape (12, T); NaN where nothing was recorded.
        rate_hz: samples per second.
        name: of the record.
        leads: names of the rows.
        simultaneous: whether every lead was recorded all the time; if not, NaN before and after a lead's own part
            stays.

    Returns:
        The leads, zero where masked; which of them are usable, (12,) bool; and what was done, a sentence each.

    Raises:
        DataError: no lead is usable.
    """
    checked, usable, notes = np.zeros_like(signal_mv), np.zeros(len(leads), bool), []
    for row, lead in enumerate(leads):
        values, fault, bridged = _examined(signal_mv[row], rate_hz, simultaneous)
        usable[row] = not fault
        if fault:
            notes.append(f"{lead} is not used: {fault}")
            continue
        checked[row] = values
        if bridged:
            notes.append(f"{lead}: bridged {bridged} missing samples")
    if not usable.any():
        raise DataError(name, "leads", got="; ".join(notes), want="a lead that shows a heart beat")
    return checked, usable, tuple(notes)


def refuse_broken_triangle(signal_mv: np.ndarray, usable: np.ndarray, name: str) -> tuple[str, ...]:
    """Check Einthoven's triangle, I + III = II, in rows 0, 2 and 1; what is constant in a lead does not count.

    Returns:
        A note if a limb lead cannot be used and nothing can be checked, or if aVR, row 3, is upside down.

    Raises:
        DataError: they differ by more than ``TRIANGLE_RESIDUAL``.
    """
    if not usable[:3].all():
        return ("Einthoven's triangle not checked: a limb lead is missing",)
    one, two, three = signal_mv[:3] - signal_mv[:3].mean(1, keepdims=True)
    residual = np.linalg.norm(one + three - two) / max(np.linalg.norm(lead) for lead in (one, two, three))
    if residual >= TRIANGLE_RESIDUAL:
        raise DataError(
            name,
            "leads I, II, III",
            got=f"I + III differs from II by {residual:.0%}",
            want=f"less than {TRIANGLE_RESIDUAL:.0%}",
            hint="are the leads named rightly? if they were not recorded at the same time, pass simultaneous=False",
        )
    if usable[3] and signal_mv[3] @ (one + two) > 0:
        return ("aVR has the sign that -aVR should have: was the record written in Cabrera's order?",)
    return ()


def _examined(values: np.ndarray, rate_hz: float, simultaneous: bool) -> tuple[np.ndarray, str, int]:
    """Return a lead with its gaps bridged, what makes it unusable ("" if nothing), and how many samples that took."""
    part = slice(0, values.size) if simultaneous else recorded_part(values)
    inside = values[part]
    if not np.isfinite(inside).any():
        return values, "nothing was recorded", 0
    gaps = ~np.isfinite(inside)
    if gaps.any():
        if longest_run(gaps) > SHORT_GAP_S * rate_hz or gaps.mean() > MOST_BRIDGED:
            return values, f"{gaps.sum()} of {gaps.size} samples are missing", 0
        where = np.arange(gaps.size)
        inside = np.where(gaps, np.interp(where, where[~gaps], inside[~gaps]), inside)
    values = values.copy()
    values[part] = inside
    return values, _fault(inside, rate_hz), int(gaps.sum())


def _fault(values: np.ndarray, rate_hz: float) -> str:
    """Return why a lead without gaps is unusable; empty if it is usable."""
    span = float(np.ptp(values))
    if span < 1e-3 or longest_run(np.diff(values) == 0) >= values.size // 2:
        return "flat"
    middle = np.median(values)  # where a lead rests anyway between its beats
    for end in (values.max(), values.min()):
        resting = int((values == end).sum())
        if resting > max(SATURATED_S * rate_hz, 0.01 * values.size) and abs(end - middle) > span / 20:
            return f"saturated at {end:.4g} mV"
    return ""


def recorded_part(values: np.ndarray) -> slice:
    """Return from where to where a lead has values; empty if it has none."""
    seen = np.flatnonzero(np.isfinite(values))
    return slice(int(seen[0]), int(seen[-1]) + 1) if seen.size else slice(0, 0)


def longest_run(flags: np.ndarray) -> int:
    """Return the length of the longest run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flags, [False])).astype(np.int8)))
    return int((edges[1::2] - edges[::2]).max(initial=0))


def arms_look_swapped(beat_mv: np.ndarray, r_sample: int) -> bool:
    """Tell whether P and QRS of a beat (12, 600) at 500 Hz are negative in I and QRS is positive in aVR."""
    one, avr = beat_mv[0] - np.median(beat_mv[0]), beat_mv[3] - np.median(beat_mv[3])
    qrs, p_wave = slice(r_sample - 30, r_sample + 30), slice(r_sample - 120, r_sample - 40)
    return bool(
        one[qrs].max() + one[qrs].min() < 0 < avr[qrs].max() + avr[qrs].min()
        and one[p_wave].max() + one[p_wave].min() < 0
    )
