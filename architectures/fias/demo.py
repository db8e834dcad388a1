"""The whole way on a synthetic cohort: phantom abdomen, training, prediction, scores, report; minutes on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trifuse.architectures.data.layouts.split import write_split
from trifuse.architectures.data.phantoms.abdomen import write_abdomen_phantom
from trifuse.architectures.data.samples.preprocessing import Preprocessing
from trifuse.architectures.runs.demonstration import one_thread, print_results
from trifuse.architectures.runs.pipeline import claim_folder
from trifuse.architectures.runs.recipes import DataRecipe
from trifuse.architectures.training.recipe import Recipe

from .model import FiasConfig
from .train import FiasRecipe, train
from .variants import DilateFormerShape

CASES = 20
SIZE = (96, 96, 24)  # columns, rows and slices of each
EPOCHS = 10

# One block for each stage: dilated attention in the first two, global attention in the others.
ENCODER = DilateFormerShape(embed_dim=24, depths=(1, 1, 1, 1), num_heads=(3, 3, 3, 3))


def demo_recipe(cohort: Path, split: Path, *, epochs: int = EPOCHS, seed: int = 0) -> FiasRecipe:
    """Return a recipe small enough for a CPU: a narrow encoder with random weights, slices of 96 pixels."""
    return FiasRecipe(
        data=DataRecipe(
            root=str(cohort),
            split=str(split),
            label_space="transunet9",
            preprocessing=Preprocessing(
                intensity="as_is", resize="cubic", channels=1, restore="labels", image_size=SIZE[0]
            ),
        ),
        network=FiasConfig(variant=ENCODER, decoder_heads=(4, 4, 2, 2), drop_path=0.0, dropout=0.0, init_seed=seed),
        training=Recipe(epochs=epochs, batch_size=8, lr=5e-3, weight_decay=1e-4, warmup_epochs=1, seed=seed),
    )


def write_demo_cohort(folder: Path, *, cases: int = CASES, seed: int = 0) -> tuple[Path, Path]:
    """Write the phantom cohort and its split; return their paths."""
    cohort, split = folder / "phantom", folder / "phantom_split.json"
    folder.mkdir(parents=True, exist_ok=True)
    write_split(split, write_abdomen_phantom(cohort, cases=cases, seed=seed, size=SIZE))
    return cohort, split


def run_demo(out: Path, *, seed: int = 0, overwrite: bool = False, command: Sequence[str] = ()) -> Path:
    """Make the phantom, train on it, predict its test cases, and print where the report lies."""
    run = out / "run"
    claim_folder(run, overwrite=overwrite)
    print(f"writing a synthetic cohort of {CASES} abdominal CT volumes to {out / 'phantom'}", flush=True)
    cohort, split = write_demo_cohort(out, cases=CASES, seed=seed)
    with one_thread():
        report = train(demo_recipe(cohort, split, epochs=EPOCHS, seed=seed), run, command=command)
    assert report is not None  # a demo is one process
    print_results(report)
    return report
