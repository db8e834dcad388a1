"""How the plain U-Net is trained: nnU-Net's recipe and loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trifuse.architectures.runs.nnunet_recipe import nnunet_data, nnunet_training, with_smoothed_dice
from trifuse.architectures.runs.prepared_data import PreparedData
from trifuse.architectures.runs.recipes import DataRecipe
from trifuse.architectures.training.losses import SegmentationLoss
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

    Raises:
        ValueError: data that do not fit the network.
    """

    data: DataRecipe = field(default_factory=nnunet_data)
    network: PlainUNetConfig = field(default_factory=PlainUNetConfig)
    training: Recipe = field(default_factory=nnunet_training)
    batch_dice: bool = True

    def __post_init__(self) -> None:
        if self.data.preprocessing.channels != self.network.in_channels:
            raise ValueError(
                f"data.preprocessing.channels is {self.data.preprocessing.channels}, but network.in_channels is "
                f"{self.network.in_channels}"
            )
        object.__setattr__(self, "network", replace(self.network, image_size=self.data.preprocessing.image_size))

    @staticmethod
    def upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
        """Spell out what older versions did, see `with_smoothed_dice`."""
        return with_smoothed_dice(values)


def fit_options(model: PlainUNet, recipe: PlainUNetRecipe, data: PreparedData, out: Path) -> dict[str, Any]:
    """Return how this network is trained, as arguments of `trifuse.architectures.training.loop.fit`."""
    return {"loss": SegmentationLoss(batch_dice=recipe.batch_dice)}


def report(best: PlainUNet, recipe: PlainUNetRecipe, data: PreparedData) -> dict[str, Any]:
    """Return what only this network has to report, as arguments of `report_run`."""
    pooled = "pooled over the batch" if recipe.batch_dice else "of each sample"
    return {
        "facts": {
            "Stages": f"{len(best.config.features)}, of {', '.join(map(str, best.config.features))} channels",
            "Loss": f"Dice {pooled} and cross-entropy, at all resolutions but the coarsest",
        },
    }


def title(recipe: PlainUNetRecipe) -> str:
    """Return the first line of a report."""
    return f"Plain U-Net ({recipe.network.base_dim} channels) on {Path(recipe.data.root).name}"
