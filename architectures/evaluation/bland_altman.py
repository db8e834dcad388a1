"""Whether predicted volumes agree with the true ones: bias and limits of agreement, as a picture and as CSV."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trifuse.architectures.storage.text import count
from trifuse.kernels import DataError, MissingExtra

from .picture import BLUE, FAINT, INK, LARGE, NORMAL, SMALL, VERMILION, Picture, new_figure, plain_axes, save_picture
from .scoring import Row
from .tables import number, write_csv

NAME = "volume_agreement"
LIMITS_TABLE = f"{NAME}_limits.csv"
PANELS_PER_ROW = 4
Interval = tuple[float, float]


@dataclass(frozen=True)
class Agreement:
    """How far measurements lie from the reference, in the unit of both.

    Attributes:
        cases, patients: how many; intervals are those of so many patients.
        bias: mean of measurement minus reference, and
        sd: the standard deviation of that difference.
        lower, upper: the limits of agreement, between which 95 % of the differences are expected.
        bias_interval, lower_interval, upper_interval: where bias and limits lie, at the level that was asked for.
    """

    cases: int
    patients: int
    bias: float
    sd: float
    lower: float
    upper: float
    bias_interval: Interval
    lower_interval: Interval
    upper_interval: Interval


@dataclass(frozen=True)
class ClassVolumes:
    """Volumes of one class in mL, a number for each case of which both are known."""

    class_name: str
    case_ids: tuple[str, ...]
    patients: tuple[str, ...]
    truth_ml: NDArray[np.float64]
    prediction_ml: NDArray[np.float64]
    left_out: int = 0


def limits_of_agreement(
    measured: ArrayLike, reference: ArrayLike, patients: Sequence[str] | None = None, *, level: float = 0.95
) -> Agreement:
    """Return bias and 95 % limits of agreement of measurements with a reference, and their intervals.

    The limits are bias - 1.96 SD and bias + 1.96 SD. Intervals are those of n independent, normal differences, n being
    the number of patients: several cases of one patient narrow nothing.

    Args:
        measured: what is judged, (n,).
        reference: what it is held against, (n,).
        patients: whose measurement each is; by default each is of another patient.
        level: of the intervals.

    Raises:
        ValueError: the two are not lists of one length, or not all finite.
        DataError: there are fewer than two patients: one says nothing about others.
        MissingExtra: scipy is not installed.

    Source: Bland and Altman (1999), "Measuring agreement in method comparison studies", Stat Methods Med Res 8,
    sections 2.1 and 2.2, with the variance of a limit before it is rounded to 3 SD^2 / n.
    """
    x, y = np.asarray(measured, float), np.asarray(reference, float)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"limits of agreement need two lists of one length; got shapes {x.shape} and {y.shape}")
    d = x - y
    if not np.isfinite(d).all():
        raise ValueError("limits of agreement need finite numbers; leave out the pairs that are not")
    n = len(d) if patients is None else len({*patients})
    if n < 2:
        want = "at least 2: an interval of one says nothing about others"
        raise DataError("limits of agreement", "patients", got=n, want=want)
    stats = _stats()
    z, t = stats.norm.ppf(0.975), stats.t.ppf((1 + level) / 2, n - 1)
    bias, sd = float(d.mean()), float(d.std(ddof=1))
    of_bias, of_limit = (t * sd * math.sqrt(1 / n + extra) for extra in (0.0, z**2 / (2 * (n - 1))))

    def about(value: float, reach: float) -> Interval:
        return float(value - reach), float(value + reach)

    lower, upper = about(bias, z * sd)
    intervals = about(bias, of_bias), about(lower, of_limit), about(upper, of_limit)
    return Agreement(len(d), n, bias, sd, lower, upper, *intervals)


def volumes_by_class(rows: Sequence[Row]) -> list[ClassVolumes]:
    """Collect the volumes of all scored cases by class; cases without a prediction are left out and counted."""
    found = []
    for class_name in dict.fromkeys(row.class_name for row in rows):
        known = [row for row in rows if row.class_name == class_name and row.slice is None and row.volumes is not None]
        pairs = [(row, *row.volumes) for row in known if row.volumes and math.isfinite(row.volumes.prediction_ml)]
        whose = tuple(row.case_id for row, *_ in pairs), tuple(row.patient for row, *_ in pairs)
        truth, prediction = (np.array([pair[which] for pair in pairs], float) for which in (1, 2))
        found.append(ClassVolumes(class_name, *whose, truth, prediction, len(known) - len(pairs)))
    return found


def draw_agreement(rows: Sequence[Row], out: Path, *, title: str = "Agreement of volumes") -> Picture | None:
    """Draw a Bland-Altman plot for each class, and write its points and its limits as CSV.

    The picture is ``out/volume_agreement.png``; its points lie in ``volume_agreement.csv`` and the bias and limits of
    each class, with 95 % intervals, in ``volume_agreement_limits.csv``.

    Args:
        rows: scores per volume, see `Row.volumes`.
        out: folder to write into.
        title: of the picture.

    Returns:
        The picture; None where no class has volumes of two patients, of which nothing can be said.

    Raises:
        MissingExtra: scipy or matplotlib is not installed.
    """
    shown = [each for each in volumes_by_class(rows) if len({*each.patients}) > 1]
    if not shown:
        return None
    agreed = [limits_of_agreement(each.prediction_ml, each.truth_ml, each.patients) for each in shown]
    columns = min(PANELS_PER_ROW, len(shown))
    lines = math.ceil(len(shown) / columns)
    figure = new_figure(4.3 * columns + 0.2, 3.6 * lines + 0.3)
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    for axis, volumes, agreement in zip(axes.flat, shown, agreed, strict=False):
        _draw_panel(axis, volumes, agreement)
    fewest, most = min(each.patients for each in agreed), max(each.patients for each in agreed)
    of = f"{most} patients" if fewest == most else f"{fewest} to {most} patients"
    note = f"Shaded: 95 % intervals of bias and limits, of {of}"
    figure.supxlabel(note, fontsize=SMALL, color=FAINT)
    figure.suptitle(title, fontsize=LARGE, color=INK)
    _write_limits(out / LIMITS_TABLE, shown, agreed)
    points = (
        [of.class_name, case, patient, *map(number, (truth, found, (truth + found) / 2, found - truth))]
        for of in shown
        for case, patient, truth, found in zip(of.case_ids, of.patients, of.truth_ml, of.prediction_ml, strict=True)
    )
    header = ["class_name", "case_id", "patient", "truth_ml", "prediction_ml", "mean_ml", "difference_ml"]
    alt = "Bland-Altman plots of predicted minus true volume against their mean: " + "; ".join(
        _sentence(of, agreement) for of, agreement in zip(shown, agreed, strict=True)
    )
    return save_picture(figure, out, NAME, title, f"{alt}.", header, points)


def _draw_panel(axis: Any, volumes: ClassVolumes, agreement: Agreement) -> None:
    mean, difference = (volumes.truth_ml + volumes.prediction_ml) / 2, volumes.prediction_ml - volumes.truth_ml
    levels = (  # with how far the words stand from the line, in points: close lines must not hide each other's
        (agreement.upper, agreement.upper_interval, VERMILION, "--", "+1.96 SD", 4, "bottom"),
        (agreement.bias, agreement.bias_interval, BLUE, "-", "bias", 0, "center"),
        (agreement.lower, agreement.lower_interval, VERMILION, "--", "-1.96 SD", -4, "top"),
    )
    beside = {"xycoords": axis.get_yaxis_transform(), "textcoords": "offset points", "fontsize": SMALL}
    axis.axhline(0, color=FAINT, lw=0.8, zorder=1)
    for level, (low, high), colour, style, words, up, side in levels:
        axis.axhspan(low, high, color=colour, alpha=0.13, lw=0, zorder=0)
        axis.axhline(level, color=colour, lw=1.4, ls=style, zorder=2)
        axis.annotate(f"{words}: {level:+.3g}", (1, level), (4, up), color=colour, va=side, **beside)
    # Intervals of few patients are far wider than what is to be seen, and may run out of the panel.
    least = 1e-3 * max(1.0, float(mean.max()))
    reach = 1.35 * max(float(np.abs(difference - agreement.bias).max()), agreement.upper - agreement.bias, least)
    axis.set_ylim(min(agreement.bias - reach, -0.2 * reach), max(agreement.bias + reach, 0.2 * reach))
    axis.scatter(mean, difference, s=22, color=INK, edgecolor="white", linewidth=0.5, zorder=3)
    axis.set_title(volumes.class_name, fontsize=NORMAL, color=INK, loc="left", weight="bold")
    axis.set_xlabel("Mean of truth and prediction, mL", fontsize=SMALL, color=INK)
    axis.set_ylabel("Prediction - truth, mL", fontsize=SMALL, color=INK)
    plain_axes(axis)


def agreement_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return header and readable cells of bias and limits of agreement, one line per class with two patients or more.

    Raises:
        MissingExtra: scipy is not installed.
    """
    header = ["Prediction - truth, mL", "n", "Bias", "Lower limit", "Upper limit"]
    lines = []
    for volumes in volumes_by_class(rows):
        if len({*volumes.patients}) > 1:
            of = limits_of_agreement(volumes.prediction_ml, volumes.truth_ml, volumes.patients)
            levels = (of.bias, of.bias_interval), (of.lower, of.lower_interval), (of.upper, of.upper_interval)
            cells = [f"{level:+.3g} ({low:+.3g} to {high:+.3g})" for level, (low, high) in levels]
            lines.append([volumes.class_name, str(of.cases), *cells])
    return header, lines


def _write_limits(path: Path, shown: Sequence[ClassVolumes], agreed: Sequence[Agreement]) -> None:
    names = ("bias", "sd", "lower", "upper")
    header = ["class_name", "cases", "patients", "left_out", *(f"{name}_ml" for name in names)]
    header += [f"{name}_{end}_ml" for name in ("bias", "lower", "upper") for end in ("low", "high")]
    lines = (
        [of.class_name, each.cases, each.patients, of.left_out]
        + [number(value) for value in (each.bias, each.sd, each.lower, each.upper)]
        + [number(end) for pair in (each.bias_interval, each.lower_interval, each.upper_interval) for end in pair]
        for of, each in zip(shown, agreed, strict=True)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_csv(path, header, lines)


def _sentence(of: ClassVolumes, agreement: Agreement) -> str:
    low, high = agreement.bias_interval
    left_out = f", {count(of.left_out, 'case')} without a prediction left out" if of.left_out else ""
    return (
        f"{of.class_name}: bias {agreement.bias:+.3g} mL ({low:+.3g} to {high:+.3g}), 95 % limits of agreement "
        f"{agreement.lower:+.3g} to {agreement.upper:+.3g} mL, {count(agreement.cases, 'case')}{left_out}"
    )


def _stats() -> Any:
    try:
        from scipy import stats
    except ImportError:
        raise MissingExtra("scipy", "med", "limits of agreement") from None
    return stats
