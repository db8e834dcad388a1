"""What a paper's ablation needs at tiny size: rows times seeds, finished trainings kept, one table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .demonstration import one_thread
from .evaluation.report import describe_environment
from .evaluation.tables import read_case_table, write_csv
from .files import write_text

Scores = Mapping[str, Sequence[float]]  # by metric, one mean per seed


def train_each(
    out: Path, name: str, recipes: Sequence[Any], train: Callable[..., object], metrics: Sequence[str]
) -> dict[str, list[float]]:
    """Train one row of the table with every seed, on one thread, and return what its test cases score.

    Args:
        out: folder of the ablation; a training lies in ``<name>-seed<n>``, and one that has a report is not repeated.
        name: of the row.
        recipes: one per seed.
        train: the network's; a run that was broken off is resumed.
        metrics: columns of the table of test cases.

    Returns:
        By metric, for every seed the mean over cases and classes.
    """
    scores: dict[str, list[float]] = {metric: [] for metric in metrics}
    for seed, recipe in enumerate(recipes):
        run = out / f"{name}-seed{seed}"
        if not (run / "report.md").exists():
            with one_thread():
                train(recipe, run, resume=True)
        rows = read_case_table(run / "test_cases.csv")
        for metric, means in scores.items():
            means.append(statistics.mean(row.scores[metric] for row in rows))
    return scores


def write_ablation(
    out: Path,
    columns: Sequence[str],
    rows: Mapping[tuple[str, ...], Scores],
    titles: Mapping[str, tuple[str, str]],
    *,
    caption: str,
    command: Sequence[str] = (),
) -> Path:
    """Write ``table.csv`` and ``table.md``, and return the latter's path.

    Args:
        out: folder to write to.
        columns: titles of the words that name a row.
        rows: by those words, the row's scores.
        titles: of each metric's columns, its mean and its SD over the seeds.
        caption: what the table shows; the environment is added.
        command: the words to put below the table as the way to do it again.
    """
    header = [*columns, *(title for pair in titles.values() for title in pair), "seeds"]
    lines = []
    for words, scores in rows.items():
        cells = [cell for metric in titles for cell in _mean_and_sd(scores[metric])]
        lines.append([*words, *cells, str(len(next(iter(scores.values()))))])
    write_csv(out / "table.csv", header, lines)
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *lines])
    text = f"{caption} {'; '.join(describe_environment().values())}.\n\n{table}\n"
    write_text(out / "table.md", text + (f"\n`{' '.join(command)}`\n" if command else ""))
    return out / "table.md"


def _mean_and_sd(values: Sequence[float]) -> tuple[str, str]:
    return f"{statistics.mean(values):.3f}", f"{statistics.stdev(values):.3f}" if len(values) > 1 else "-"
