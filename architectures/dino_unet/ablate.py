"""Table II of the paper on a synthetic study: which blocks feed the decoder, with and without the image.

The encoder's weights are random and the study is a phantom: the table shows that every row of the paper can be run, not
what the paper's rows are worth.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..evaluation.report import describe_environment
from ..evaluation.tables import read_case_table, write_csv
from ..files import write_text
from .demo import demo_recipe, one_thread, write_demo_study
from .train import train
from .variants import EncoderShape

# Eight blocks, so that the paper's fixed list 7, 5, 3, 1 exists.
ENCODER = EncoderShape(embed_dim=64, depth=8, num_heads=2, native_grid=16)
ROWS = [
    (selection, integration) for selection in ("learned", "last4", "fixed:[7,5,3,1]") for integration in (True, False)
]


def ablate(out: Path, *, seeds: int = 3, epochs: int = 14, cases: int = 16, command: Sequence[str] = ()) -> Path:
    """Train every row with every seed and write ``table.md`` and ``table.csv``; a finished training is not repeated.

    Args:
        out: folder for the study, the runs and the table.
        seeds: trainings of each row; a seed decides the encoder's weights, the decoder's and the order of samples.
        epochs: of each training.
        cases: of the phantom.
        command: the words to put below the table as the way to do it again.
    """
    study, split = write_demo_study(out, cases=cases)
    results: dict[tuple[str, bool], list[float]] = {}
    for selection, integration in ROWS:
        for seed in range(seeds):
            run = out / f"{_slug(selection)}-{'image' if integration else 'no-image'}-seed{seed}"
            recipe = demo_recipe(study, split, epochs=epochs, seed=seed)
            network = replace(
                recipe.network, variant=ENCODER, block_selection=selection, spatial_integration=integration
            )
            if not (run / "report.md").exists():
                with one_thread():
                    train(replace(recipe, network=network), run, resume=True)
            rows = read_case_table(run / "test_cases.csv")
            results.setdefault((selection, integration), []).append(statistics.mean(row.scores["dsc"] for row in rows))
    return _write_table(out, results, seeds=seeds, epochs=epochs, command=command)


def _write_table(
    out: Path, results: dict[tuple[str, bool], list[float]], *, seeds: int, epochs: int, command: Sequence[str]
) -> Path:
    header = ["blocks", "image integration", "mean DSC", "SD over seeds", "seeds"]
    lines = [
        [
            selection,
            "yes" if integration else "no",
            f"{statistics.mean(scores):.3f}",
            f"{statistics.stdev(scores):.3f}" if len(scores) > 1 else "-",
            str(len(scores)),
        ]
        for (selection, integration), scores in results.items()
    ]
    write_csv(out / "table.csv", header, lines)
    rows = "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *lines])
    path = out / "table.md"
    write_text(
        path,
        f"Synthetic: a phantom study, a frozen encoder of {ENCODER.depth} blocks with random weights, {epochs} epochs. "
        f"DSC of the test volumes, mean over cases, then mean and SD over {seeds} seeds. "
        f"{'; '.join(describe_environment().values())}.\n\n{rows}\n"
        + (f"\n`{' '.join(command)}`\n" if command else ""),
    )
    return path


def _slug(selection: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in selection).strip("-").replace("--", "-")
