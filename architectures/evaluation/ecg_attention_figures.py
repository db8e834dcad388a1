"""The attention of the ECG autoencoder: between leads, and along the beat of each lead."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trifuse.architectures.data.ecg.signal import LEADS
from trifuse.kernels import ShapeError

from .picture import INK, LARGE, NORMAL, SMALL, Picture, new_figure, save_picture
from .tables import number
from .twelve_leads import BEAT_START_MS, lead_axes, times_ms

MOST_MAPS_IN_A_ROW = 3
WIDTHS = (1.0, 3.6)  # points, of a trace where least and most attention goes


def draw_lead_attention(
    groups: Mapping[str, NDArray], out: Path, *, name: str = "lead_attention", leads: Sequence[str] = LEADS
) -> Picture:
    """Draw the attention between leads, one map for each group on one colour scale, into ``out/<name>.png``.

    Args:
        groups: attention weights (12, 12) by the group's name, e.g. averaged over its records; rows look at columns
            and add up to 1.
        out: folder to write into.
        name: of the files.
        leads: names of rows and columns.

    Raises:
        ShapeError: no group, or weights of another shape.
    """
    maps = {group: np.asarray(weights, float) for group, weights in groups.items()}
    wanted = (len(leads), len(leads))
    for group, weights in maps.items():
        if weights.shape != wanted:
            raise ShapeError(f"draw_lead_attention: expected weights {wanted} for {group!r}, got {weights.shape}")
    if not maps:
        raise ShapeError("draw_lead_attention: expected at least one group, got none")
    columns = min(len(maps), MOST_MAPS_IN_A_ROW)
    rows = -(-len(maps) // columns)
    figure = new_figure(3.9 * columns + 1.1, 3.9 * rows + 0.3)
    axes = figure.subplots(rows, columns, squeeze=False)
    low, high = (float(extreme) for extreme in _extremes(maps.values()))
    for axis, (group, weights) in zip(axes.flat, maps.items(), strict=False):
        image = _draw_map(axis, group if len(maps) > 1 else "", weights, leads, low, high)
    for axis in axes.flat[len(maps) :]:
        axis.set_axis_off()
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02, aspect=30)
    _label_bar(bar, f"Attention weight (all alike: {1 / len(leads):.3f})")
    header = ["group", "looking_lead", *leads]
    lines = (
        [group, lead, *(number(weight) for weight in row)]
        for group, weights in maps.items()
        for lead, row in zip(leads, weights, strict=True)
    )
    alt = "Attention between the leads: " + "; ".join(_map_sentence(*item, leads) for item in maps.items()) + "."
    return save_picture(figure, out, name, "Attention between the leads", alt, header, lines)


def draw_temporal_attention(
    beat: NDArray,
    temporal: NDArray,
    out: Path,
    *,
    name: str = "temporal_attention",
    title: str = "Attention along the beat",
    rate_hz: float = 500.0,
    start_ms: float = BEAT_START_MS,
) -> Picture:
    """Draw the twelve leads of a beat, coloured and thickened by the attention they get, into ``out/<name>.png``.

    Args:
        beat: of shape (12, T), as the network takes it.
        temporal: attention weights (12, M, M) of each lead over time; rows look at columns and add up to 1.
        out: folder to write into.
        name: of the files.
        title: of the picture.
        rate_hz: samples per second of the beat.
        start_ms: time of its first sample, from the R peak.

    Raises:
        ShapeError: beat and weights do not belong together.
    """
    beat, received = np.asarray(beat, float), attention_received(temporal, np.shape(beat)[-1])
    if beat.shape[:-1] != (len(LEADS),) or received.shape != beat.shape:
        got = f"{beat.shape} and {np.shape(temporal)}"
        raise ShapeError(f"draw_temporal_attention: expected a beat (12, T) and weights (12, M, M), got {got}")
    time_ms = times_ms(beat.shape[1], rate_hz, start_ms)
    figure, axes, bar = lead_axes(title, time_ms, beat, bar=True)
    scale = float(received.min()), float(received.max())
    for axis, trace, share in zip(axes, beat, received, strict=True):
        lines = _draw_trace(axis, time_ms, trace, share, scale)
    _label_bar(figure.colorbar(lines, cax=bar), "Attention received / equal share")
    rows = (
        [lead, number(at), number(value), number(weight)]
        for lead, trace, weights in zip(LEADS, beat, received, strict=True)
        for at, value, weight in zip(time_ms, trace, weights, strict=True)
    )
    peaks = time_ms[received.argmax(1)]
    strongest = np.argsort(-received.max(1))[:3].tolist()
    most = ", ".join(f"{peaks[lead]:.0f} ms in {LEADS[lead]} ({received[lead].max():.2f})" for lead in strongest)
    alt = (
        "Twelve leads of a beat coloured by the attention they get, "
        f"{scale[0]:.2f} to {scale[1]:.2f} times an equal share; most at {most}."
    )
    header = ["lead", "time_ms", "signal", "attention_over_equal_share"]
    return save_picture(figure, out, name, title, alt, header, rows)


def attention_received(temporal: NDArray, steps: int) -> NDArray:
    """Return how much attention each sample gets, (..., steps), 1 for an equal share, of weights (..., M, M).

    The mean over a column of the map is what its key gets; between the keys, which stand for steps / M samples each, it
    is interpolated linearly.

    Raises:
        ShapeError: the maps are not square.
    """
    weights = np.asarray(temporal, float)
    if weights.ndim < 2 or weights.shape[-1] != weights.shape[-2]:
        raise ShapeError(f"attention_received: expected weights (..., M, M), got {weights.shape}")
    count = weights.shape[-1]
    by_key = weights.mean(-2) * count
    samples_per_key = steps / count
    centres = (np.arange(count) + 0.5) * samples_per_key - 0.5
    flat = [np.interp(np.arange(steps), centres, row) for row in by_key.reshape(-1, count)]
    return np.reshape(flat, (*by_key.shape[:-1], steps))


def _draw_map(axis: Any, title: str, weights: NDArray, leads: Sequence[str], low: float, high: float) -> Any:
    image = axis.imshow(weights, cmap="cividis", vmin=low, vmax=high, interpolation="nearest")
    axis.set_title(title, fontsize=LARGE, color=INK, loc="left", weight="bold")
    axis.set_xticks(range(len(leads)), leads, rotation=90)
    axis.set_yticks(range(len(leads)), leads)
    axis.set_xlabel("Lead looked at", fontsize=NORMAL, color=INK)
    axis.set_ylabel("Looking lead", fontsize=NORMAL, color=INK)
    axis.tick_params(labelsize=SMALL, colors=INK, length=0)
    for edge in (2.5, 5.5):  # limb leads, augmented limb leads, chest leads
        axis.axhline(edge, color="white", lw=1.2)
        axis.axvline(edge, color="white", lw=1.2)
    for spine in axis.spines.values():
        spine.set_visible(False)
    return image


def _draw_trace(axis: Any, time_ms: NDArray, trace: NDArray, attention: NDArray, scale: tuple[float, float]) -> Any:
    from matplotlib.collections import LineCollection

    low, high = scale
    points = np.column_stack((time_ms, trace))
    share = (attention[1:] + attention[:-1]) / 2  # of the piece between two samples
    widths = WIDTHS[0] + (WIDTHS[1] - WIDTHS[0]) * (share - low) / ((high - low) or 1.0)
    lines = LineCollection([*np.stack((points[:-1], points[1:]), axis=1)], cmap=_trace_colours(), capstyle="round")
    lines.set_array(share)
    lines.set_clim(low, high)
    lines.set_linewidth(widths)
    return axis.add_collection(lines)


def _trace_colours() -> Any:
    """A scale from grey-blue over purple to orange, dark enough for a line on white at either end."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("attention", ["#A9B8C6", "#5B6BB5", "#8E2F8F", "#D1495B", "#E07A00"])


def _label_bar(bar: Any, label: str) -> None:
    bar.set_label(label, fontsize=NORMAL, color=INK)
    bar.ax.tick_params(labelsize=SMALL, colors=INK)
    bar.outline.set_visible(False)


def _extremes(maps: Any) -> tuple[float, float]:
    values = np.concatenate([weights.ravel() for weights in maps])
    return float(values.min()), max(float(values.max()), math.nextafter(float(values.min()), math.inf))


def _map_sentence(group: str, weights: NDArray, leads: Sequence[str]) -> str:
    row, column = divmod(int(weights.argmax()), len(leads))
    favourite = int(weights.mean(0).argmax())
    return (
        f"{group}: lead {leads[favourite]} is looked at most, {weights.mean(0)[favourite]:.3f} on average, and the "
        f"largest weight, {weights[row, column]:.3f}, is that of {leads[row]} on {leads[column]}"
    )
