"""Whether two runs differ: paired tests over the same cases, and intervals by patient."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from trifuse.architectures.storage.text import count
from trifuse.kernels import DataError, MissingExtra

from .metrics import Conventions
from .scoring import Row
from .summary import METRIC_NAMES, SCAR, aligned, case_means, headline_class
from .tables import number, read_case_table, write_csv

ROUNDING = 1e-12  # differences of scores that vary by less than this differ by rounding alone
BOOTSTRAP_RESAMPLES = 10_000
_DRAWS_AT_ONCE = 1 << 20
MOST_NAMED = 8  # cases in a message: it has to fit on a screen


@dataclass(frozen=True)
class PairedTest:
    """A two-sided paired test: statistic, p-value, number of pairs."""

    statistic: float
    p: float
    count: int


@dataclass(frozen=True)
class Comparison:
    """One score of one class in two runs, over the cases where both have it, of so many ``patients``.

    Differences are B minus A.
    """

    class_name: str
    metric: str
    mean_a: float
    mean_b: float
    difference: float
    low: float
    high: float
    effect_size: float
    t_test: PairedTest
    p_holm: float
    wilcoxon: PairedTest
    undefined: int
    patients: int
    conventions: Conventions


def paired_t_test(a: ArrayLike, b: ArrayLike) -> PairedTest:
    """Test whether the mean of ``b - a`` over the same cases is zero: t = mean / (sd / sqrt(n)), n - 1 degrees.

    Where all differences are equal, p is 1 if they are zero and 0 if not. One pair has no p-value (NaN).

    Raises:
        ValueError: the scores are not two lists of one length, or not all finite.
        MissingExtra: scipy is not installed.

    Source: Student (1908), "The probable error of a mean".
    """
    d = _differences(a, b)
    if d.size < 2:
        return PairedTest(math.nan, math.nan, d.size)
    mean, sd = float(d.mean()), float(d.std(ddof=1))
    if sd <= ROUNDING:
        same = abs(mean) <= ROUNDING
        return PairedTest(0.0 if same else math.copysign(math.inf, mean), 1.0 if same else 0.0, d.size)
    t = mean / (sd / math.sqrt(d.size))
    return PairedTest(t, float(2 * _stats().t.sf(abs(t), d.size - 1)), d.size)


def wilcoxon_test(a: ArrayLike, b: ArrayLike) -> PairedTest:
    """Test whether ``b - a`` is symmetric about zero by signed ranks, zeros dropped; p is 1 if all are zero.

    Differences that are equal but for the rounding of the scores have one rank. One pair has no p-value (NaN).

    Raises:
        ValueError: the scores are not two lists of one length, or not all finite.
        MissingExtra: scipy is not installed.

    Source: Wilcoxon (1945), "Individual comparisons by ranking methods".
    """
    d = _differences(a, b)
    if d.size < 2:
        return PairedTest(math.nan, math.nan, d.size)
    d = np.round(d / (ROUNDING * max(1.0, np.abs(np.asarray([a, b])).max())))  # ranks do not depend on the unit
    if not d.any():
        return PairedTest(0.0, 1.0, d.size)
    result = _stats().wilcoxon(d)
    return PairedTest(float(result.statistic), float(result.pvalue), d.size)


def bootstrap_interval(
    differences: ArrayLike,
    patients: Sequence[str],
    *,
    weights: ArrayLike | None = None,
    level: float = 0.95,
    resamples: int = BOOTSTRAP_RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile interval of the mean difference, resampling patients with all their cases.

    With weights of 0 or more it is that of the weighted mean. NaN for fewer than two patients with a weight: one
    patient says nothing about others.

    Source: Efron (1979), "Bootstrap methods: another look at the jackknife".
    """
    d = np.asarray(differences, dtype=float)
    w = np.ones_like(d) if weights is None else np.asarray(weights, dtype=float)
    return bootstrap_intervals([(d[w > 0], np.asarray(patients)[w > 0], w[w > 0])], level, resamples, seed)[0]


def bootstrap_intervals(
    scores: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    level: float = 0.95,
    resamples: int = BOOTSTRAP_RESAMPLES,
    seed: int = 0,
) -> list[tuple[float, float]]:
    """Return what `bootstrap_interval` does for each of several scores: differences, patients, weights above 0.

    Scores of equally many patients share their draws, so that many take little longer than one.
    """
    intervals = [(math.nan, math.nan)] * len(scores)
    by_patients: dict[int, dict[int, tuple[np.ndarray, np.ndarray]]] = {}
    for place, (d, patients, w) in enumerate(scores):
        names, index = np.unique(patients, return_inverse=True)
        if names.size > 1:
            of_score = np.bincount(index, weights=d * w), np.bincount(index, weights=w)
            by_patients.setdefault(names.size, {})[place] = of_score
    for of_scores in by_patients.values():
        sums, counts = (np.stack(columns, axis=1) for columns in zip(*of_scores.values(), strict=True))
        means = np.concatenate([(times @ sums) / (times @ counts) for times in times_drawn(len(sums), resamples, seed)])
        ends = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
        for place, low, high in zip(of_scores, *ends, strict=True):
            intervals[place] = float(low), float(high)
    return intervals


def times_drawn(count: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each of so many patients is drawn, (n, count) for a few resamples at a time."""
    generator, most = np.random.default_rng(seed), max(1, _DRAWS_AT_ONCE // count)
    for start in range(0, resamples, most):
        n = min(most, resamples - start)
        drawn = generator.integers(count, size=(n, count)) + count * np.arange(n)[:, None]
        yield np.bincount(drawn.ravel(), minlength=n * count).reshape(n, count).astype(float)


def mean_interval(values: Sequence[float], *, level: float = 0.95) -> tuple[float, float]:
    """Return the interval of the mean of independent values, such as one per seed; NaN for fewer than two.

    Raises:
        MissingExtra: scipy is not installed.

    Source: Student (1908), "The probable error of a mean".
    """
    x = np.asarray(values, dtype=float)
    if x.size < 2:
        return math.nan, math.nan
    reach = float(_stats().t.ppf((1 + level) / 2, x.size - 1) * x.std(ddof=1) / math.sqrt(x.size))
    return float(x.mean()) - reach, float(x.mean()) + reach


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number, step down; NaN stays NaN and does not count.

    Source: Holm (1979), "A simple sequentially rejective multiple test procedure".
    """
    adjusted = [math.nan] * len(p_values)
    order = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    running = 0.0
    for rank, (p, i) in enumerate(order):
        running = max(running, min(1.0, p * (len(order) - rank)))
        adjusted[i] = running
    return adjusted


def compare_runs(table_a: Path, table_b: Path) -> list[Comparison]:
    """Compare two case tables of the same cases, one row per class and score; the scar's come first where there is one.

    Slices are averaged to their case first: slices of one case are not independent.

    Raises:
        DataError: a table cannot be read, the two were scored under different conventions, or a case or class of one
            is absent from the other (all of them named).
    """
    rows_a, rows_b = read_case_table(table_a), read_case_table(table_b)
    if rows_a[0].conventions != rows_b[0].conventions:
        raise DataError(
            table_b,
            "conventions",
            got=rows_b[0].conventions.label,
            want=rows_a[0].conventions.label,
            hint="evaluate both runs under one convention",
        )
    _check_pairs(table_a, rows_a, table_b, rows_b)
    compared, differences = zip(
        *[
            _compare(class_name, metric, rows_a, rows_b)
            for class_name in sorted(dict.fromkeys(row.class_name for row in rows_a), key=lambda name: name != SCAR)
            for metric in rows_a[0].conventions.metrics
        ],
        strict=True,
    )
    adjusted = holm([row.t_test.p for row in compared])
    intervals = bootstrap_intervals(differences)
    return [
        replace(row, p_holm=p, low=low, high=high)
        for row, p, (low, high) in zip(compared, adjusted, intervals, strict=True)
    ]


def comparison_cells(rows: Sequence[Comparison]) -> tuple[list[str], list[list[str]]]:
    """Return header and readable cells of a comparison, for a terminal or a report."""
    header = ["class", "score", "n", "A", "B", "B - A", "95 % interval", "t-test p", "Holm p", "Wilcoxon p", "d"]
    cells = [
        [
            row.class_name,
            METRIC_NAMES[row.metric],
            str(row.t_test.count),
            f"{row.mean_a:.4g}",
            f"{row.mean_b:.4g}",
            f"{row.difference:+.3g}",
            f"{row.low:+.3g} to {row.high:+.3g}",
            format_p(row.t_test.p),
            format_p(row.p_holm),
            format_p(row.wilcoxon.p),
            f"{row.effect_size:+.2f}",
        ]
        for row in rows
    ]
    return header, [["-" if "nan" in cell else cell for cell in line] for line in cells]


def format_comparison(rows: Sequence[Comparison], name_a: str, name_b: str) -> str:
    """Return a comparison as text in aligned columns."""
    notes = [f"A: {name_a}", f"B: {name_b}", *_headline(rows), rows[0].conventions.describe()]
    notes += ["n cases; two-sided paired tests; interval by patient; d = mean / SD"]
    notes += dependence_notes(rows)
    undefined = sum(row.undefined for row in rows)
    if undefined:
        notes.append(f"{undefined} scores were undefined in A or B and left out")
    return "\n".join([*notes, "", *aligned(*comparison_cells(rows))])


def dependence_notes(rows: Sequence[Comparison]) -> list[str]:
    """Return a sentence on tests over cases of which several are of one patient; none where each has its own."""
    most = max(rows, key=lambda row: row.t_test.count - row.patients)
    if most.patients == most.t_test.count:
        return []
    of = f"{count(most.t_test.count, 'case')} of {count(most.patients, 'patient')}"
    return [f"{of}: cases of one patient are not independent; the tests take them as such, so p is likely too small"]


def _headline(rows: Sequence[Comparison]) -> list[str]:
    """Say in a line by how much the DSC differs, of the scar or the only class; nothing where several are alike."""
    name = headline_class(row.class_name for row in rows)
    return [
        f"DSC of {name}: A {row.mean_a:.3f}, B {row.mean_b:.3f}, B - A {row.difference:+.3f}"
        for row in rows
        if (row.class_name, row.metric) == (name, "dsc") and row.t_test.count
    ]


def format_p(p: float) -> str:
    """Return a p-value as it is usually printed: three decimals, or that it is below 0.001."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def write_comparison_table(path: Path, rows: Sequence[Comparison]) -> None:
    """Write a comparison as CSV, atomically, at full precision."""
    header = ["class_name", "metric", "count", "undefined", "mean_a", "mean_b", "difference", "low", "high", "t"]
    header += ["p_t_test", "p_holm", "p_wilcoxon", "effect_size", "conventions"]
    lines = (
        [row.class_name, row.metric, row.t_test.count, row.undefined]
        + [number(value) for value in (row.mean_a, row.mean_b, row.difference, row.low, row.high, row.t_test.statistic)]
        + [number(value) for value in (row.t_test.p, row.p_holm, row.wilcoxon.p, row.effect_size)]
        + [row.conventions.label]
        for row in rows
    )
    write_csv(path, header, lines)


def _differences(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    first, second = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"a paired test needs two lists of one length; got shapes {first.shape} and {second.shape}")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("a paired test needs finite scores; leave out the pairs that are not")
    return second - first


def _check_pairs(table_a: Path, rows_a: Sequence[Row], table_b: Path, rows_b: Sequence[Row]) -> None:
    keys_a, keys_b = ({(row.case_id, row.class_name, row.slice) for row in rows} for rows in (rows_a, rows_b))
    problems = []
    for here, there, missing in ((table_b, table_a, keys_a - keys_b), (table_a, table_b, keys_b - keys_a)):
        names = sorted({f"{case_id} ({class_name})" for case_id, class_name, _ in missing})
        if names:
            more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
            got = f"none for {', '.join(names[:MOST_NAMED])}{more}"
            problems.append(DataError(here, "cases", got=got, want=f"a pair for every row of {Path(there).name}"))
    if problems:
        raise DataError.merge(problems)


def _compare(
    class_name: str, metric: str, rows_a: Sequence[Row], rows_b: Sequence[Row]
) -> tuple[Comparison, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Compare one score of one class but for its interval; return also what `bootstrap_intervals` takes."""
    a, b = (case_means([r for r in rows if r.class_name == class_name], metric) for rows in (rows_a, rows_b))
    defined = [case_id for case_id in a if math.isfinite(a[case_id]) and math.isfinite(b[case_id])]
    patients = {row.case_id: row.patient for row in rows_a}
    first, second = np.array([a[c] for c in defined]), np.array([b[c] for c in defined])
    d = second - first
    sd = float(d.std(ddof=1)) if d.size > 1 else math.nan
    comparison = Comparison(
        class_name,
        metric,
        mean_a=float(first.mean()) if d.size else math.nan,
        mean_b=float(second.mean()) if d.size else math.nan,
        difference=float(d.mean()) if d.size else math.nan,
        low=math.nan,
        high=math.nan,
        effect_size=float(d.mean()) / sd if sd > ROUNDING else math.nan,
        t_test=paired_t_test(first, second),
        p_holm=math.nan,
        wilcoxon=wilcoxon_test(first, second),
        undefined=len(a) - len(defined),
        patients=len({patients[case_id] for case_id in defined}),
        conventions=rows_a[0].conventions,
    )
    return comparison, (d, np.array([patients[case_id] for case_id in defined]), np.ones_like(d))


def _stats() -> Any:
    try:
        from scipy import stats
    except ImportError:
        raise MissingExtra("scipy", "med", "comparing two runs") from None
    return stats
