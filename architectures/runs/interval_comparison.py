"""Two runs on one cohort by the days between ECG and MRI: a picture, its numbers, and a table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from trifuse.architectures.evaluation.interval_figures import draw_interval_bars, interval_bins, interval_days
from trifuse.architectures.evaluation.picture import Picture
from trifuse.architectures.evaluation.summary import SCAR, aligned, headline_scores
from trifuse.architectures.evaluation.tables import case_tables, read_case_table
from trifuse.kernels import DataError

from .folder import run_section
from .overlay import check_same_cohort, names_of
from .recipes import DataRecipe
from .results import check_tables


def compare_by_interval(runs: Sequence[Path], out: Path) -> tuple[Picture, str]:
    """Draw the DSC of two runs per bin of days into ``out/interval_bars.png``; return the picture and a table.

    The scores are those of the scar where it is a class, and else the mean over classes. Cases without an ECG are left
    out, and so are those that one of the runs did not score.

    Args:
        runs: folders of two runs.
        out: folder to write into.

    Raises:
        DataError: the runs are of different cohorts, lack a table of scores, or share no case with an ECG.
        CheckpointError: a folder holds no run.
        MissingExtra: matplotlib is not installed.
    """
    cohorts = [run_section(run, "data", DataRecipe).open() for run in runs]
    for run, cohort in zip(runs, cohorts, strict=True):
        check_same_cohort(run, cohort, cohorts[0])
    scores = {name: _dsc(run) for name, run in zip(names_of(runs), runs, strict=True)}
    first, second = scores.values()
    common = [case for case in first if math.isfinite(first[case]) and math.isfinite(second.get(case, math.nan))]
    days = interval_days(cohorts[0], common)
    if not days:
        raise DataError(runs[-1], "cases", got="none with an ECG that both runs scored", want="at least one")
    score_name = f"{SCAR} DSC" if SCAR in cohorts[0].class_names else "mean DSC"
    return draw_interval_bars(days, scores, out, score_name=score_name), _table(days, scores)


def _dsc(run: Path) -> dict[str, float]:
    check_tables(run)
    return headline_scores(read_case_table(case_tables(run)[0]), "dsc")


def _table(days: Mapping[str, float], scores: Mapping[str, Mapping[str, float]]) -> str:
    """Return a line per bin: cases, both means, and by how much the second is higher."""
    groups = [(each.name, each.case_ids) for each in interval_bins(days)]
    lines = []
    for name, cases in [*groups, ("all", tuple(days))]:
        means = [sum(of[case] for case in cases) / len(cases) for of in scores.values()] if cases else []
        cells = [*(f"{mean:.3f}" for mean in means), f"{means[1] - means[0]:+.3f}"] if means else ["-"] * 3
        lines.append([name, str(len(cases)), *cells])
    names = [f"{letter}: {name}" for letter, name in zip("AB", scores, strict=True)]
    return "\n".join([*names, "", *aligned(["days", "n", "A", "B", "B - A"], lines)])
