"""How nnU-Net trains in two dimensions: the default recipe of the plain U-Net and of TAFF-UNet.

Source: Isensee et al., nnU-Net, Nature Methods 2021, and its second version's 2D configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trifuse.architectures.data.samples.preprocessing import Patches, Preprocessing
from trifuse.architectures.training.recipe import Recipe

from .recipes import DataRecipe

VAL_DICE_EMA = 0.9  # share of the epochs before in the moving average of Dice that chooses the best one


def nnunet_data() -> DataRecipe:
    """Return how images are prepared: patches of 256 pixels, z-scores of each volume, nnU-Net's augmentation."""
    return DataRecipe(
        augment="nnunet",
        preprocessing=Preprocessing(intensity="zscore", channels=1, image_size=256, patches=Patches()),
    )


def nnunet_training() -> Recipe:
    """Return how long, and by which optimiser; with its data that makes 250 iterations to the epoch."""
    return Recipe(
        epochs=1000,
        batch_size=12,
        lr=1e-2,
        weight_decay=3e-5,
        optimizer="sgd",
        momentum=0.99,
        schedule="poly",
        grad_clip=12.0,
        best_epoch_smoothing=VAL_DICE_EMA,
    )


def with_smoothed_dice(values: Mapping[str, Any]) -> dict[str, Any]:
    """Spell out how older versions chose the best epoch of a run by this recipe, which had no word for it."""
    training = values.get("training")
    if not isinstance(training, dict):
        return dict(values)
    return {**values, "training": {"best_epoch_smoothing": VAL_DICE_EMA, **training}}
