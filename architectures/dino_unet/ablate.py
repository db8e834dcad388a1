"""Table II of the paper on a synthetic cohort: which blocks feed the decoder, with and without the image.

The encoder's weights are random and the cohort is a phantom: the table shows that each row of the paper can be run, not
what the paper's rows are worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trifuse.architectures.runs.ablation import Scores, train_each, write_ablation
from trifuse.architectures.runs.pipeline import train

from .demo import ENCODER, demo_recipe, write_demo_cohort

BLOCKS: dict[str, Any] = {"learned": None, "last4": "last4", "fixed:[7,5,3,1]": (7, 5, 3, 1)}  # by the row's name
ROWS = [(selection, integration) for selection in BLOCKS for integration in (True, False)]


def ablate(out: Path, *, seeds: int = 3, epochs: int = 14, cases: int = 16, command: Sequence[str] = ()) -> Path:
    """Train every row with every seed and write ``table.md`` and ``table.csv``; a finished training is not repeated.

    Args:
        out: folder for the cohort, the runs and the table.
        seeds: trainings of each row; a seed decides the encoder's weights, the decoder's and the order of samples.
        epochs: of each training.
        cases: of the phantom.
        command: the command line that makes the table again, to be put below it.
    """
    cohort, split = write_demo_cohort(out, cases=cases)
    rows: dict[tuple[str, ...], Scores] = {}
    for selection, integration in ROWS:
        row: dict[str, Any] = {"blocks": BLOCKS[selection], "spatial_integration": integration}
        plain = [demo_recipe(cohort, split, epochs=epochs, seed=seed) for seed in range(seeds)]
        recipes = [replace(recipe, network=replace(recipe.network, **row)) for recipe in plain]
        name = f"{_slug(selection)}-{'image' if integration else 'no-image'}"
        rows[selection, "yes" if integration else "no"] = train_each(out, name, recipes, train, ["dsc"])
    return write_ablation(
        out,
        ("blocks", "image integration"),
        rows,
        {"dsc": ("mean DSC", "SD over seeds")},
        caption=f"Synthetic: phantom cohort, a frozen encoder of {ENCODER.depth} blocks with random weights, {epochs} "
        f"epochs. DSC of the test volumes, mean over cases, then mean and SD over {seeds} seeds.",
        command=command,
    )


def _slug(selection: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in selection).strip("-").replace("--", "-")
