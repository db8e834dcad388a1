"""Table 3 of the paper on a synthetic cohort: without the second encoder, without its fusion, without mixing attention.

A last row takes the fusion's equations as they are written, see `ContextAwareFusion`.

The weights start at random and the cohort is a phantom: the table shows that each row of the paper can be run, not what
the paper's rows are worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trifuse.architectures.runs.ablation import Scores, train_each, write_ablation
from trifuse.architectures.runs.pipeline import train

from .demo import demo_recipe, write_demo_cohort

COLUMNS = ("DMK", "fusion", "MixAtt")
ROWS: dict[tuple[str, ...], dict[str, Any]] = {  # the paper's, in its order, and one of ours
    ("no", "CAF", "yes"): {"no_dmk": "dup"},
    ("yes", "sum", "yes"): {"fusion": "sum"},
    ("yes", "CAF", "no"): {"mixatt": False},
    ("yes", "CAF", "yes"): {},
    ("yes", "CAF as written", "yes"): {"channel_weights": "literal"},
}
TITLES = {
    "dsc": ("mean DSC", "SD of DSC"),
    "hd95_vox": ("mean HD95 (voxels)", "SD of HD95"),
}


def ablate(out: Path, *, seeds: int = 3, epochs: int = 8, cases: int = 16, command: Sequence[str] = ()) -> Path:
    """Train every row with every seed and write ``table.md`` and ``table.csv``; a finished training is not repeated.

    Args:
        out: folder for the cohort, the runs and the table.
        seeds: trainings of each row; a seed decides the weights at the start and the order of samples.
        epochs: of each training.
        cases: of the phantom.
        command: the command line that makes the table again, to be put below it.
    """
    cohort, split = write_demo_cohort(out, cases=cases)
    rows: dict[tuple[str, ...], Scores] = {}
    for row, changes in ROWS.items():
        plain = [demo_recipe(cohort, split, epochs=epochs, seed=seed) for seed in range(seeds)]
        recipes = [replace(recipe, network=replace(recipe.network, **changes)) for recipe in plain]
        name = "-".join(f"{column}-{value}" for column, value in zip(COLUMNS, row, strict=True))
        rows[row] = train_each(out, name.lower().replace(" ", "-"), recipes, train, list(TITLES))
    return write_ablation(
        out,
        COLUMNS,
        rows,
        TITLES,
        caption=f"Synthetic: a phantom abdomen, encoders with random weights, {epochs} epochs. DSC and HD95 of the "
        f"test volumes, mean over cases and organs, then mean and SD over {seeds} seeds.",
        command=command,
    )
