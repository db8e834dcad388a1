"""The report over several runs of one recipe: the mean over cases of each run first, then mean and SD over the runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trifuse.architectures.evaluation.charts import draw_training_curves
from trifuse.architectures.evaluation.protocols import Protocol, differing_rules
from trifuse.architectures.evaluation.report import (
    REPORT,
    EarlierCommand,
    PaperTable,
    markdown_table,
    paper_parts,
    picture_parts,
    provenance_parts,
)
from trifuse.architectures.evaluation.scoring import Row
from trifuse.architectures.evaluation.summary import (
    METRIC_NAMES,
    PUBLISHED,
    Scored,
    beside_the_scar,
    format_score,
    headline_class,
    headline_summaries,
    mean_and_sd,
    side_by_side_cells,
    summarise,
    summarise_runs,
)
from trifuse.architectures.evaluation.tables import case_tables, number, read_case_table, write_csv, write_summary_table
from trifuse.architectures.storage.atomic_files import write_text
from trifuse.architectures.storage.epoch_log import read_log
from trifuse.architectures.storage.text import count

from .folder import validates

RUNS_TABLE = "runs.csv"


@dataclass(frozen=True)
class RepeatedRun:
    """One of several runs: its folder, as a finished run leaves it, and the seed that tells it from the others."""

    folder: Path
    seed: int


def write_repeats_report(
    out: Path,
    runs: Sequence[RepeatedRun],
    *,
    title: str,
    facts: Mapping[str, str] | None = None,
    command: Sequence[str] = (),
    earlier: Sequence[EarlierCommand] = (),
    protocol: Protocol | None = None,
    paper_tables: Sequence[PaperTable] = (),
    paper: str = "",
) -> Path:
    """Write ``report.md`` over several runs, ``runs.csv`` and ``summary.csv``, and return the report's path.

    Args:
        out: folder to write to, above those of the runs.
        runs: finished ones, in this order.
        title: first line of the report.
        facts, command, earlier, paper_tables, paper: see `write_report`.
        protocol: how the publication scored, and which scores it reports.

    Raises:
        DataError: a run has no case table, or no log.
    """
    # Runs of older versions lack the publication's protocol: what all of them have is shown.
    tables = zip(*(case_tables(run.folder) for run in runs), strict=False)
    scored = [[read_case_table(table) for table in of_runs] for of_runs in tables]  # by convention, then by run
    metrics = PUBLISHED if protocol is None else protocol.metrics
    summaries = [Scored(rows[0][0].conventions, summarise_runs(rows), metrics) for rows in scored]
    cases = len({row.case_id for row in scored[0][0]})
    parts = [f"# {title}", _headline(summaries[0], cases)]
    parts += ["## Over the runs", markdown_table(*side_by_side_cells(summaries))]
    parts += [f"Each number is the mean over the cases of a run; then mean ± SD over {len(runs)} runs."]
    parts += [part.conventions.describe() for part in summaries]
    parts += [] if protocol is None or len(summaries) == 1 else [protocol.source]
    for other in summaries[1:]:
        rules = differing_rules(summaries[0].conventions, other.conventions, metrics)
        parts.append("\n".join(f"* {rule}" for rule in rules))
    parts += ["## Each run", markdown_table(*_run_cells(runs, scored))]
    parts.append("Reports: " + ", ".join(f"[{name}]({name}/{REPORT})" for name in (run.folder.name for run in runs)))
    write_summary_table(out / "summary.csv", summaries)
    _write_runs_table(out / RUNS_TABLE, runs, scored)
    parts.append(f"Tables: [{RUNS_TABLE}]({RUNS_TABLE}), [summary.csv](summary.csv)")
    log, trained_on = _joined_log(out / "log.csv", runs), not all(validates(run.folder) for run in runs)
    curves = draw_training_curves(log, out / "figures", trained_on=trained_on)
    parts += [*picture_parts(curves, out), *provenance_parts(facts or {}, command, earlier)]
    parts += paper_parts(paper_tables, paper)
    write_text(out / REPORT, "\n\n".join(part for part in parts if part) + "\n")
    return out / REPORT


def _headline(scored: Scored, cases: int) -> str:
    (dsc,) = (summary for summary in headline_summaries(scored.summaries) if summary.metric == "dsc")
    of_what = f"mean ± SD over {count(dsc.count, 'run')} of {count(cases, 'case')} each"
    convention = f"empty masks `{scored.conventions.empty_masks}`"
    return (
        f"**DSC {mean_and_sd(dsc)}** for {dsc.class_name}, {of_what}, {convention}.{beside_the_scar(scored.summaries)}"
    )


def _run_cells(
    runs: Sequence[RepeatedRun], scored: Sequence[Sequence[Sequence[Row]]]
) -> tuple[list[str], list[list[str]]]:
    """Return header and cells of the DSC and HD95 that speak for each run under each convention."""
    header, lines = ["Run", "Seed"], [[run.folder.name, str(run.seed)] for run in runs]
    of_what = headline_class(row.class_name for row in scored[0][0])
    for of_runs in scored:
        conventions = of_runs[0][0].conventions
        for metric in ("dsc", conventions.hd95):
            header.append(f"{METRIC_NAMES[metric]} of {of_what} ({conventions.empty_masks})")
            for line, rows in zip(lines, of_runs, strict=True):
                means = {summary.metric: summary.mean for summary in headline_summaries(summarise(rows))}
                line.append(format_score(means[metric], metric))
    return header, lines


def _write_runs_table(path: Path, runs: Sequence[RepeatedRun], scored: Sequence[Sequence[Sequence[Row]]]) -> None:
    """Write the mean over cases of every score of every class in every run, the conventions in each line."""
    lines = (
        [run.folder.name, run.seed, s.class_name, s.metric, number(s.mean), s.count, s.undefined, label]
        for of_runs in scored
        for label in [of_runs[0][0].conventions.label]
        for run, rows in zip(runs, of_runs, strict=True)
        for s in summarise(rows)
    )
    write_csv(path, ["run", "seed", "class_name", "metric", "mean", "count", "undefined", "conventions"], lines)


def _joined_log(path: Path, runs: Sequence[RepeatedRun]) -> Path:
    """Write loss and validation score of all runs side by side, a row per epoch, and return the path."""
    logs = [{row["epoch"]: row for row in read_log(run.folder / "log.csv")} for run in runs]
    columns = [(name, run, log) for name in ("loss", "val_dice") for run, log in zip(runs, logs, strict=True)]
    epochs = sorted({epoch for log in logs for epoch in log})
    lines = (
        [number(epoch), *(number(log.get(epoch, {}).get(name, math.nan)) for name, _, log in columns)]
        for epoch in epochs
    )
    write_csv(path, ["epoch", *(f"{name}_{run.folder.name}" for name, run, _ in columns)], lines)
    return path
