"""How the plain U-Net is trained: nnU-Net's recipe and loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trifuse.architectures.runs.nnunet_recipe import nnunet_data, nnunet_training, with_smoothed_dice
from trifuse.architectures.runs.prepared_data import PreparedData
from trifuse.architectures.runs.recipes import DataRecipe
from trifuse.architectures.training.losses import SegmentationLoss, check_weights
from trifuse.architectures.training.recipe import Recipe

from .model import PlainUNet, PlainUNetConfig


@dataclass(frozen=True)
class PlainUNetRecipe:
    """A run of the plain U-Net; the defaults are nnU-Net's, with its 250 iterations to the epoch.

    Attributes:
        data: which cases, and how their slices are prepared: as patches, or whole where its
            ``preprocessing.patches`` is None.
        network: the network; its number of classes follows the cohort, its image size the data.
        training: how it is trained.
        batch_dice: whether the Dice of the loss pools its sums over the batch.
        lambda_dice: weight of the Dice,
        lambda_ce: and of the cross-entropy.

    Raises:
        ValueError: data that do not fit the network, or a weight that is negative; or both are zero.
    """

    data: DataRecipe = field(default_factory=nnunet_data)
    network: PlainUNetConfig = field(default_factory=PlainUNetConfig)
    training: Recipe = field(default_factory=nnunet_training)
    batch_dice: bool = True
    lambda_dice: float = 1.0
    lambda_ce: float = 1.0

    def __post_init__(self) -> None:
        check_weights(lambda_dice=self.lambda_dice, lambda_ce=self.lambda_ce)
        if self.data.preprocessing.channels != self.network.in_channels:
            raise ValueError(
                f"data.preprocessing.channels is {self.data.preprocessing.channels}, but network.in_channels is "
                f"{self.network.in_channels}"
            )
        object.__setattr__(self, "network", replace(self.network, image_size=self.data.preprocessing.image_size))

    @staticmethod
    def upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
        """Spell out what older versions did: Dice and cross-entropy weighed alike, the best epoch by an average."""
        return {"lambda_dice": 1.0, "lambda_ce": 1.0, **with_smoothed_dice(values)}


def fit_options(model: PlainUNet, recipe: PlainUNetRecipe, data: PreparedData, out: Path) -> dict[str, Any]:
    """Return how this network is trained, as arguments of `trifuse.architectures.training.loop.fit`."""
    return {"loss": _loss(recipe)}


def _loss(recipe: PlainUNetRecipe) -> SegmentationLoss:
    return SegmentationLoss(batch_dice=recipe.batch_dice, w_dice=recipe.lambda_dice, w_ce=recipe.lambda_ce)


def report(best: PlainUNet, recipe: PlainUNetRecipe, data: PreparedData, out: Path) -> dict[str, Any]:
    """Return what only this network has to report, as arguments of `report_run`."""
    return {
        "facts": {
            "Stages": f"{len(best.config.features)}, of {', '.join(map(str, best.config.features))} channels",
            "Loss": _loss(recipe).words,
        },
    }


def title(recipe: PlainUNetRecipe) -> str:
    """Return the first line of a report."""
    return f"Plain U-Net ({recipe.network.base_dim} channels) on {Path(recipe.data.root).name}"
