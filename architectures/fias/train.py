"""How FIAS is trained: its recipe, its loss, and the defaults that a layout changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trifuse.architectures.data.layouts import acdc, acdc_slices
from trifuse.architectures.data.layouts.layout import Layout
from trifuse.architectures.data.layouts.open_cohort import AUTO, layout_of
from trifuse.architectures.data.samples.preprocessing import Preprocessing
from trifuse.architectures.runs.prepared_data import PreparedData
from trifuse.architectures.runs.recipes import DataRecipe
from trifuse.architectures.training.losses import MutationLoss
from trifuse.architectures.training.recipe import Recipe

from .dilateformer import REDUCTION
from .model import Fias, FiasConfig
from .report import describe_mechanisms


def layout_defaults(layout: Layout | None) -> dict[str, Any]:
    """Return the defaults, by dotted name, that differ for a layout; none where it is not known.

    ACDC is trained for longer. Values that were clipped and scaled by those who published them stay as they are.
    """
    differing: dict[str, Any] = {}
    if layout in (acdc.LAYOUT, acdc_slices.LAYOUT):
        differing["training.epochs"] = 400
    if layout is not None and layout.prepared_window_hu is not None:
        differing["data.preprocessing.intensity"] = "as_is"
    return differing


def chosen_defaults(given: Mapping[str, Any], config: Path | None) -> dict[str, Any]:
    """Return the defaults that differ for the layout of the cohort that is given."""
    root = Path(given["data.root"])
    return layout_defaults(layout_of(root, given.get("data.layout", AUTO))) if root.is_dir() else {}


def paper_data() -> DataRecipe:
    """Return how the paper prepares slices: 256 pixels, cubic, one channel, TransUNet's augmentation."""
    return DataRecipe(
        augment="transunet",
        preprocessing=Preprocessing(resize="cubic", channels=1, restore="labels", image_size=256),
    )


@dataclass(frozen=True)
class FiasRecipe:
    """A run of FIAS; the defaults are the paper's.

    Attributes:
        data: which cases, and how their slices are prepared.
        network: the network; its number of classes follows the cohort.
        training: how it is trained.
        gamma: weight of Dice in the loss; that of the cross-entropy is 1 - gamma.
        subsets: which sums of the heads' maps the loss sees: of all ``"mutation"`` subsets, of each head alone
            (``"deep_supervision"``), or the ``"last"`` head.
        reduction: of the losses of the subsets: ``"sum"`` or ``"mean"``.

    Raises:
        ValueError: a gamma outside [0, 1], or data that do not fit the network.
    """

    data: DataRecipe = field(default_factory=paper_data)
    network: FiasConfig = field(default_factory=FiasConfig)
    training: Recipe = field(
        default_factory=lambda: Recipe(
            epochs=300, batch_size=2, lr=1e-4, weight_decay=1e-4, optimizer="adam", schedule="constant", seed=2222
        )
    )
    gamma: float = 0.4
    subsets: Literal["mutation", "deep_supervision", "last"] = "mutation"
    reduction: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        if not 0.0 <= self.gamma <= 1.0:
            raise ValueError(f"gamma must be in [0, 1], got {self.gamma}")
        if self.data.preprocessing.image_size % REDUCTION and not self.network.pad:
            raise ValueError(
                f"data.preprocessing.image_size must be a multiple of {REDUCTION}, got "
                f"{self.data.preprocessing.image_size}; or set network.pad"
            )
        if self.data.preprocessing.channels != self.network.in_channels:
            raise ValueError(
                f"data.preprocessing.channels is {self.data.preprocessing.channels}, but network.in_channels is "
                f"{self.network.in_channels}"
            )


def fit_options(model: Fias, recipe: FiasRecipe, data: PreparedData, out: Path) -> dict[str, Any]:
    """Return how this network is trained, as arguments of `trifuse.architectures.training.loop.fit`."""
    return {"loss": MutationLoss(recipe.gamma, recipe.subsets, recipe.reduction)}


def report(best: Fias, recipe: FiasRecipe, data: PreparedData, out: Path) -> dict[str, Any]:
    """Return what only this network has to report, as arguments of `report_run`."""
    checkpoint = recipe.network.encoder_checkpoint
    weights = "random weights" if checkpoint is None else f"weights of {Path(checkpoint).name}"
    reduction = "summed" if recipe.reduction == "sum" else "averaged"
    return {
        "facts": {
            "Encoder": f"DilateFormer {_variant_name(recipe.network)}, {weights}",
            "Loss": f"{recipe.gamma:g} Dice + {1 - recipe.gamma:g} cross-entropy of the heads' sums "
            f"({recipe.subsets}), {reduction}",
            **describe_mechanisms(best, data, data.split.test or data.cases_of(data.validated_on)),
        },
    }


def title(recipe: FiasRecipe) -> str:
    """Return the first line of a report."""
    return f"FIAS ({_variant_name(recipe.network)}) on {Path(recipe.data.root).name}"


def _variant_name(config: FiasConfig) -> str:
    return config.variant if isinstance(config.variant, str) else f"{config.variant.embed_dim} channels"
