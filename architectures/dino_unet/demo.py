"""The whole way on a synthetic cohort: phantom, training, prediction, scores, report; minutes on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trifuse.architectures.data.phantoms.left_atrium import write_left_atrium_phantom
from trifuse.architectures.data.samples.preprocessing import Preprocessing
from trifuse.architectures.runs.demonstration import demonstrate, write_phantom
from trifuse.architectures.runs.recipes import DataRecipe
from trifuse.architectures.training.recipe import Recipe

from .model import TINY_DECODER, DinoUNetConfig
from .train import DinoUNetRecipe
from .variants import EncoderShape

CASES = 16

# Eight blocks, of which four are selected; and enough for the paper's fixed list 7, 5, 3, 1.
ENCODER = EncoderShape(embed_dim=64, depth=8, num_heads=2, native_grid=16)


def demo_recipe(cohort: Path, split: Path, *, epochs: int = 14, seed: int = 0) -> DinoUNetRecipe:
    """Return a recipe small enough for a CPU: a tiny encoder with random weights, slices of 112 pixels."""
    return DinoUNetRecipe(
        data=DataRecipe(root=str(cohort), split=str(split), preprocessing=Preprocessing(image_size=112)),
        network=DinoUNetConfig(variant=ENCODER, init_seed=seed, **TINY_DECODER),
        training=Recipe(
            epochs=epochs, batch_size=8, lr=4e-3, weight_decay=1e-4, betas=(0.9, 0.95), warmup_epochs=1, seed=seed
        ),
        theta_lr_mult=5.0,
        cache_features=True,
    )


def write_demo_cohort(folder: Path, *, cases: int = CASES, seed: int = 0) -> tuple[Path, Path]:
    """Write the phantom cohort and its split; return their paths."""
    return write_phantom(folder, lambda cohort: write_left_atrium_phantom(cohort, cases=cases, seed=seed))


def write_quick_cohort(folder: Path) -> tuple[Path, Path]:
    """Write four tiny left atria and their split for ``trifuse torture``; return their paths."""
    return write_phantom(folder, lambda cohort: write_left_atrium_phantom(cohort, cases=4, size=(24, 24, 4)))


def run_demo(out: Path, *, seed: int = 0, overwrite: bool = False, command: Sequence[str] = ()) -> Path:
    """Make the phantom, train on it, predict its test cases, and print where the report lies; see `demonstrate`."""
    return demonstrate(
        out,
        f"{CASES} LGE volumes",
        lambda folder: write_demo_cohort(folder, seed=seed),
        lambda cohort, split: demo_recipe(cohort, split, seed=seed),
        overwrite=overwrite,
        command=command,
    )
