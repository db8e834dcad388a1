"""An autoencoder's reconstruction of a beat drawn over the beat itself, lead by lead."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trifuse.architectures.data.ecg.signal import LEADS
from trifuse.kernels import ShapeError

from .picture import FAINT, INK, NORMAL, SMALL, VERMILION, Picture, save_picture
from .tables import number
from .twelve_leads import BEAT_START_MS, lead_axes, times_ms


def draw_reconstruction(
    beat: NDArray,
    reconstruction: NDArray,
    out: Path,
    *,
    name: str,
    title: str,
    usable: Sequence[bool] | NDArray,
    rate_hz: float = 500.0,
    start_ms: float = BEAT_START_MS,
) -> Picture:
    """Draw the twelve leads of a beat and of its reconstruction into ``out/<name>.png``.

    Each lead says the error of its reconstruction over that of a flat line at zero: the share of the signal that is
    not explained.

    Args:
        beat: of shape (12, T), as the network takes it.
        reconstruction: of the same shape.
        out: folder to write into.
        name: of the files.
        title: of the picture.
        usable: which leads count, (12,).
        rate_hz: samples per second.
        start_ms: time of the first sample, from the R peak.

    Raises:
        ShapeError: the two are not alike, or have not twelve leads.
    """
    beat, reconstruction = np.asarray(beat, float), np.asarray(reconstruction, float)
    if beat.shape != reconstruction.shape or beat.shape[:-1] != (len(LEADS),):
        got = f"{beat.shape} and {reconstruction.shape}"
        raise ShapeError(f"draw_reconstruction: expected two beats (12, T), got {got}")
    used = np.asarray(usable, bool)
    errors = relative_errors(beat, reconstruction, used)
    time_ms = times_ms(beat.shape[1], rate_hz, start_ms)
    figure, axes, _ = lead_axes(title, time_ms, np.stack((beat, reconstruction))[:, used])
    for lead, axis in enumerate(axes):
        _draw_lead(axis, time_ms, beat[lead], reconstruction[lead], errors[lead])
    handles, labels = axes[int(used.argmax())].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", ncols=2, fontsize=NORMAL, frameon=False, labelcolor=INK)
    rows = (
        [lead, number(at), number(value), number(again)]
        for lead, trace, other in zip(LEADS, beat, reconstruction, strict=True)
        for at, value, again in zip(time_ms, trace, other, strict=True)
    )
    order = [lead for lead in np.argsort(errors).tolist() if used[lead]]
    alt = (
        f"{title}: over the leads the error is {np.nanmean(errors):.2f} of that of a flat line; least in "
        f"{LEADS[order[0]]}, {errors[order[0]]:.2f}, most in {LEADS[order[-1]]}, {errors[order[-1]]:.2f}."
    )
    return save_picture(figure, out, name, title, alt, ["lead", "time_ms", "signal", "reconstruction"], rows)


def relative_errors(beat: NDArray, reconstruction: NDArray, usable: NDArray) -> NDArray:
    """Return the squared error of each lead over that of predicting zero, (..., 12); NaN where a lead is not usable.

    Args:
        beat: of shape (..., 12, T), zero where it was padded: there is no signal, and no error is counted.
        reconstruction: of the same shape.
        usable: bool, (..., 12).
    """
    there = (beat != 0).any(-2, keepdims=True)
    error = np.where(there, (reconstruction - beat) ** 2, 0.0).sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(usable, error / (beat**2).sum(-1), np.nan)


def _draw_lead(axis: Any, time_ms: NDArray, beat: NDArray, reconstruction: NDArray, error: float) -> None:
    if np.isnan(error):
        axis.text(0.5, 0.5, "not usable", transform=axis.transAxes, ha="center", color=FAINT, fontsize=NORMAL)
        return
    axis.plot(time_ms, beat, color=INK, lw=1.6, label="beat")
    axis.plot(time_ms, reconstruction, color=VERMILION, lw=1.4, ls=(0, (3, 1.2)), label="reconstruction")
    axis.text(
        0.98, 0.95, f"error {error:.2f}", transform=axis.transAxes, ha="right", va="top", color=INK, fontsize=SMALL
    )
