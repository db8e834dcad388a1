"""The whole way on a synthetic cohort: phantom abdomen, training, prediction, scores, report; minutes on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trifuse.architectures.data.phantoms.abdomen import write_abdomen_phantom
from trifuse.architectures.data.samples.preprocessing import Preprocessing
from trifuse.architectures.runs.demonstration import demonstrate, write_phantom
from trifuse.architectures.runs.recipes import DataRecipe
from trifuse.architectures.training.recipe import Recipe

from .model import FiasConfig
from .train import FiasRecipe
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
    return write_phantom(folder, lambda cohort: write_abdomen_phantom(cohort, cases=cases, seed=seed, size=SIZE))


def run_demo(out: Path, *, seed: int = 0, overwrite: bool = False, command: Sequence[str] = ()) -> Path:
    """Make the phantom, train on it, predict its test cases, and print where the report lies; see `demonstrate`."""
    return demonstrate(
        out,
        f"{CASES} abdominal CT volumes",
        lambda folder: write_demo_cohort(folder, cases=CASES, seed=seed),
        lambda cohort, split: demo_recipe(cohort, split, epochs=EPOCHS, seed=seed),
        overwrite=overwrite,
        command=command,
    )
