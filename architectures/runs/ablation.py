"""What a paper's ablation needs at tiny size: rows times seeds, finished trainings kept, one table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trifuse.architectures.evaluation.report import describe_environment
from trifuse.architectures.evaluation.summary import mean_of_defined
from trifuse.architectures.evaluation.tables import read_case_table, write_csv
from trifuse.architectures.storage.atomic_files import write_text

from .parallel import run_each
from .results import is_kept

Scores = Mapping[str, Sequence[float]]  # by metric, one mean per seed


def train_all(trainings: Sequence[tuple[Any, Path]], train: Callable[..., object], jobs: int = 1) -> None:
    """Train what has not finished, each on one thread, ``jobs`` of them at a time in processes of their own.

    Args:
        trainings: recipe and folder of each.
        train: the network's, a function of a module; a run that was broken off is resumed.
        jobs: trainings at a time.
    """
    left = [(train, recipe, run) for recipe, run in trainings if not is_kept(run, recipe)]
    run_each(_train, left, jobs)


def _train(train: Callable[..., object], recipe: Any, run: Path) -> None:
    train(recipe, run, resume=True)


def scores_of_runs(
    runs: Sequence[Path], metrics: Sequence[str], class_name: str | None = None
) -> dict[str, list[float]]:
    """Return by metric, for every run, the mean over its test cases and classes, or over one class alone."""
    scores: dict[str, list[float]] = {metric: [] for metric in metrics}
    for run in runs:
        rows = [
            row for row in read_case_table(run / "test_cases.csv") if class_name is None or row.class_name == class_name
        ]
        for metric, means in scores.items():
            means.append(mean_of_defined([row.scores[metric] for row in rows]))
    return scores


def train_each(
    out: Path, name: str, recipes: Sequence[Any], train: Callable[..., object], metrics: Sequence[str]
) -> dict[str, list[float]]:
    """Train one row of the table with every seed, on one thread, and return what its test cases score.

    Args:
        out: folder of the ablation; a training lies in ``<name>-seed<n>``, and one that has finished is not repeated.
        name: of the row.
        recipes: one per seed.
        train: the network's; a run that was broken off is resumed.
        metrics: columns of the table of test cases.

    Returns:
        By metric, for every seed the mean over cases and classes.
    """
    runs = [out / f"{name}-seed{seed}" for seed in range(len(recipes))]
    train_all(list(zip(recipes, runs, strict=True)), train)
    return scores_of_runs(runs, metrics)


def write_ablation(
    out: Path,
    columns: Sequence[str],
    rows: Mapping[tuple[str, ...], Scores],
    titles: Mapping[str, tuple[str, str]],
    *,
    caption: str,
    tests: tuple[str, Mapping[tuple[str, ...], str]] | None = None,
    further: str = "",
    command: Sequence[str] = (),
) -> Path:
    """Write ``table.csv`` and ``table.md``, and return the latter's path.

    Args:
        out: folder to write to.
        columns: titles of the columns that name a row.
        rows: the scores of each row, by what stands in those columns.
        titles: of each metric's columns, its mean and its SD over the seeds.
        caption: what the table shows; the environment is added.
        tests: title and cells, by the same keys, of a column for a statistical test.
        further: Markdown that follows the table.
        command: the command line that makes the table again, to be put below it.
    """
    header = [*columns, *(title for pair in titles.values() for title in pair), *(tests[:1] if tests else ()), "seeds"]
    lines = []
    for row, scores in rows.items():
        cells = [cell for metric in titles for cell in _mean_and_sd(scores[metric])]
        cells += [tests[1][row]] if tests else []
        lines.append([*row, *cells, str(len(next(iter(scores.values()))))])
    write_csv(out / "table.csv", header, lines)
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *lines])
    text = f"{caption} {'; '.join(describe_environment().values())}.\n\n{table}\n" + (further and f"\n{further}\n")
    write_text(out / "table.md", text + (f"\n`{' '.join(command)}`\n" if command else ""))
    return out / "table.md"


def _mean_and_sd(values: Sequence[float]) -> tuple[str, str]:
    return f"{statistics.mean(values):.3f}", f"{statistics.stdev(values):.3f}" if len(values) > 1 else "-"
