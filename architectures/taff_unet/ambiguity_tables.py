"""What an ablation on the ambiguous phantom shows beside its scores: gains, and results by days and by ambiguity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from trifuse.architectures.data.phantoms.ambiguous import MISSING, RIGHT, WRONG, read_truth
from trifuse.architectures.evaluation.interval_figures import interval_bins
from trifuse.architectures.evaluation.report import markdown_table
from trifuse.architectures.evaluation.statistics import mean_interval
from trifuse.architectures.evaluation.summary import mean_of_defined
from trifuse.architectures.evaluation.tables import number, read_case_table, write_csv

from .report import scar_dsc

Row = tuple[str, str]
Cases = Mapping[str, Mapping[str, str]]  # the phantom's truth
Group = Callable[[Mapping[str, str]], bool]

BY_DAYS, BY_AMBIGUITY, GAINS = "by_days.csv", "by_ambiguity.csv", "gains.csv"
_FRESH, _OLD = 21, 60  # days: what the ECG says is then right in most cases, or hardly more often than by chance
_ALIKE = (0.45, 0.55)  # the decoy's share of both candidates where they are about of one size


def _days(low: int, high: int) -> Group:
    return lambda case: case["ecg"] == RIGHT and low <= int(case["interval_days"]) < high


AGES: Mapping[str, Group] = {
    f"under {_FRESH} days": _days(0, _FRESH),
    f"{_FRESH} to {_OLD - 1} days": _days(_FRESH, _OLD),
    f"{_OLD} days and more": _days(_OLD, 10_000),
    "wrong ECG": lambda case: case["ecg"] == WRONG,
    "no ECG": lambda case: case["ecg"] == MISSING,
}
AMBIGUITIES: Mapping[str, Group] = {
    "decoy smaller": lambda case: float(case["decoy_share"]) < _ALIKE[0],
    "about the same": lambda case: _ALIKE[0] <= float(case["decoy_share"]) <= _ALIKE[1],
    "decoy larger": lambda case: float(case["decoy_share"]) > _ALIKE[1],
}
COMPARED = (  # what is gained by the second over the first
    ("the prior", "baseline", "ap"),
    ("the ECG", "ap", "ecg_ap"),
    ("time", "ecg_ap", "full"),
    ("the ECG and time", "ap", "full"),
    ("the territory", "ap", "territory given"),
)


def write_ambiguity_tables(out: Path, cohort: Path, runs: Mapping[Row, Sequence[Path]]) -> str:
    """Write ``gains.csv``, ``by_days.csv`` and ``by_ambiguity.csv``, and return their content as Markdown.

    Args:
        out: folder to write to.
        cohort: folder of the phantom, which says how each case was made.
        runs: by setting and prior, a finished run per seed; all score the same cases.
    """
    scores = {row: [scar_dsc(read_case_table(run / "test_cases.csv")) for run in of] for row, of in runs.items()}
    tested = next(iter(scores.values()))[0]
    cases = {case_id: case for case_id, case in read_truth(cohort).items() if case_id in tested}
    return "\n\n".join([*_gains(out, scores, cases), *_by_days(out, scores, cases), *_by_ambiguity(out, scores, cases)])


Scores = Mapping[Row, Sequence[Mapping[str, float]]]  # by row, for every seed the DSC of each case


def _gains(out: Path, scores: Scores, cases: Cases) -> list[str]:
    """Compare rows seed by seed, over all cases and over those of each age of the ECG."""
    groups: Mapping[str, Group] = {"all cases": lambda case: True, **AGES}
    cells, lines = [], []
    for what, before, after in COMPARED:
        for row, of in scores.items():
            prior = next((p for p in (row[1], "-") if (before, p) in scores), None)
            if row[0] != after or prior is None:
                continue
            shown = []
            for name, group in groups.items():
                chosen = [case_id for case_id, case in cases.items() if group(case)]
                first, second = _means(scores[before, prior], chosen), _means(of, chosen)
                gains = [b - a for a, b in zip(first, second, strict=True)]
                low, high = mean_interval(gains)
                mean = float(np.mean(gains))
                lines.append([what, row[1], name, len(chosen), *map(number, (mean, low, high)), len(gains)])
                interval = f" ({low:+.3f} to {high:+.3f})" if len(gains) > 1 else ""
                shown.append(f"{mean:+.3f}{interval}" if chosen else "-")
            cells.append([what, row[1], *shown])
    write_csv(out / GAINS, ["gained_by", "prior", "group", "cases", "mean", "low", "high", "seeds"], lines)
    return [
        "Gain in scar DSC, mean over the seeds and its 95 % interval (Student's t over seeds):",
        markdown_table(["gained by", "prior", *groups], cells),
    ]


def _by_days(out: Path, scores: Scores, cases: Cases) -> list[str]:
    """Tabulate the rows over the paper's bins of days, all ECGs, right or wrong."""
    days = {case_id: float(case["interval_days"]) for case_id, case in cases.items() if case["ecg"] != MISSING}
    groups: dict[str, Sequence[str]] = {each.name: each.case_ids for each in interval_bins(days)}
    groups["no ECG"] = [case_id for case_id, case in cases.items() if case["ecg"] == MISSING]
    lines = [
        [*row, name, len(chosen), *map(number, _mean_and_sd(_means(of, chosen)))]
        for row, of in scores.items()
        for name, chosen in groups.items()
    ]
    write_csv(out / BY_DAYS, ["setting", "prior", "days", "cases", "mean", "sd"], lines)
    header = ["setting", "prior", *(f"{name}, n = {len(chosen)}" for name, chosen in groups.items())]
    cells = [[*row, *(_shown(_means(of, chosen)) for chosen in groups.values())] for row, of in scores.items()]
    return ["Scar DSC by days between ECG and MRI, mean and SD over the seeds:", markdown_table(header, cells)]


def _by_ambiguity(out: Path, scores: Scores, cases: Cases) -> list[str]:
    """Tabulate the rows over the sizes of the two candidates, and over what the ECG says and how old it is."""
    groups = {
        (size, age): [case_id for case_id, case in cases.items() if is_size(case) and is_age(case)]
        for size, is_size in AMBIGUITIES.items()
        for age, is_age in AGES.items()
    }
    lines = [
        [*row, *names, len(chosen), *map(number, _mean_and_sd(_means(of, chosen)))]
        for row, of in scores.items()
        for names, chosen in groups.items()
    ]
    write_csv(out / BY_AMBIGUITY, ["setting", "prior", "ambiguity", "ecg", "cases", "mean", "sd"], lines)
    cells = [
        [*row, size, *(_shown(_means(of, groups[size, age])) for age in AGES)]
        for row, of in scores.items()
        for size in AMBIGUITIES
    ]
    counts = [["cases", "", size, *(str(len(groups[size, age])) for age in AGES)] for size in AMBIGUITIES]
    return [
        "Scar DSC by ambiguity, the size of the decoy beside the scar's, and by what the ECG says:",
        markdown_table(["setting", "prior", "ambiguity", *AGES], [*counts, *cells]),
    ]


def _means(of_seeds: Sequence[Mapping[str, float]], chosen: Sequence[str]) -> list[float]:
    """Return for every seed the mean over cases, NaN where there is none."""
    return [mean_of_defined([scores[case_id] for case_id in chosen]) for scores in of_seeds]


def _mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def _shown(values: Sequence[float]) -> str:
    mean, sd = _mean_and_sd(values)
    if mean != mean:  # NaN: there is no such case
        return "-"
    return f"{mean:.3f} ± {sd:.3f}" if len(values) > 1 else f"{mean:.3f}"
