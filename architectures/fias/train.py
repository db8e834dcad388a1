"""Train FIAS on a cohort, predict its test cases, and write the report.

``python -m trifuse.architectures.fias.train`` is ``trifuse train fias``, alone or under torchrun.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Unpack

from trifuse.architectures.data.layouts import acdc, acdc_slices
from trifuse.architectures.data.layouts.layout import Layout
from trifuse.architectures.data.samples.preprocessing import Preprocessing
from trifuse.architectures.evaluation.report import PaperTable
from trifuse.architectures.runs.pipeline import PreparedData, RunOptions, train_and_report
from trifuse.architectures.runs.recipes import DataRecipe
from trifuse.architectures.runs.repeats import repeat_training
from trifuse.architectures.storage.pretrained import config_to_json
from trifuse.architectures.training.loop import FitResult, fit
from trifuse.architectures.training.losses import MutationLoss
from trifuse.architectures.training.recipe import Recipe
from trifuse.architectures.training.validation import SliceValidation

from .dilateformer import REDUCTION
from .model import Fias, FiasConfig

PAPER = "the paper on FIAS, feature imbalance-aware medical image segmentation"

_ROW_MEANS = "The organs' means are not the printed mean for"
SYNAPSE = PaperTable(
    "Paper-reported: Synapse, 12 test cases, DSC in %, HD95 in voxels",
    ("Method", "Aorta", "Gallbl.", "Kidney L", "Kidney R", "Liver", "Pancreas", "Spleen", "Stomach", "HD95", "DSC"),
    (
        ("TransUNet", "87.23", "63.13", "81.87", "77.02", "94.08", "55.86", "88.05", "75.62", "31.69", "77.48"),
        ("UNETR", "89.80", "56.30", "85.60", "84.521", "94.57", "60.47", "85.00", "70.46", "18.59", "78.35"),
        ("Swin-UNet", "85.47", "64.66", "82.89", "74.92", "94.29", "56.58", "89.06", "76.60", "21.55", "79.13"),
        ("TransUNet+", "88.70", "67.57", "82.48", "81.42", "94.20", "65.73", "90.55", "81.95", "20.16", "81.57"),
        ("AFTer-UNet", "90.91", "64.81", "87.90", "85.30", "92.20", "63.54", "90.99", "72.48", "20.83", "81.02"),
        ("MT-UNet", "87.92", "64.99", "81.47", "77.29", "93.06", "59.46", "87.75", "76.81", "26.59", "78.59"),
        ("E-TransUNet", "87.41", "67.34", "85.95", "82.88", "95.11", "66.53", "90.01", "83.49", "19.42", "82.34"),
        ("MIST", "89.15", "74.58", "93.28", "92.54", "94.94", "72.43", "92.83", "87.23", "11.07", "86.92"),
        ("FIAS", "90.47", "76.31", "94.79", "92.84", "94.93", "72.56", "91.43", "89.12", "8.75", "87.81"),
    ),
    "The paper's text says 89.06 ± 0.1 and HD95 7.75 ± 0.1 for FIAS; its organs' mean is 87.81, as in the table. "
    f"{_ROW_MEANS} TransUNet (77.86), Swin-UNet (78.06) and MIST (87.12).",
)
ACDC = PaperTable(
    "Paper-reported: ACDC, DSC in %",
    ("Method", "Mean", "RV", "MYO", "LV"),
    (
        ("TransUNet", "89.71", "88.86", "84.53", "95.73"),
        ("UNETR", "86.61", "85.29", "86.52", "94.02"),
        ("SwinUNet", "90.00", "88.55", "85.62", "95.83"),
        ("TransUNet+", "90.42", "89.15", "87.65", "94.12"),
        ("AFTer-UNet", "90.82", "87.42", "89.31", "95.73"),
        ("MT-UNet", "90.43", "86.64", "89.04", "95.62"),
        ("E-TransUNet", "91.64", "90.21", "89.12", "95.61"),
        ("MIST", "92.56", "91.23", "90.31", "96.14"),
        ("FIAS", "93.27", "92.09", "91.25", "96.47"),
    ),
    f"{_ROW_MEANS} UNETR (88.61) and TransUNet+ (90.31).",
)
ABLATION = PaperTable(
    "Paper-reported: ablation, DSC in %, HD95 in voxels",
    ("DMK", "Fusion", "MixAtt", "HD95", "DSC"),
    (
        ("no", "CAF", "yes", "11.47", "86.53"),
        ("yes", "sum", "yes", "14.22", "84.89"),
        ("yes", "CAF", "no", "19.73", "82.68"),
        ("yes", "CAF", "yes", "8.75", "87.81"),
    ),
    "Its caption says ACDC, but its last row is that of Synapse. The first row leaves the fusion one encoder: here the "
    "DilateFormer's maps are then fused with themselves.",
)

CONVENTIONS = ("strict", "transunet")  # the scores that one would want, and those that published tables hold


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


def train(recipe: FiasRecipe, out: Path, **options: Unpack[RunOptions]) -> Path | None:
    """Run a recipe from its data to ``out/report.md``, and return that path (None on all ranks but the first).

    Args:
        recipe: what to do.
        out: the run's folder.
        options: see `RunOptions`.

    Raises:
        OutputFolderError, DataError, MissingExtra, CheckpointError, NumericError, Interrupted: see `train_and_report`.
    """
    return train_and_report(recipe, out, Fias, fit_network, _describe, **options)


def train_repeats(recipe: FiasRecipe, out: Path, repeats: int, **options: Unpack[RunOptions]) -> Path | None:
    """Train with ``repeats`` seeds and report mean and SD over the runs; see `repeat_training`."""
    return repeat_training(
        train, recipe, out, repeats, title=_title(recipe), paper_tables=paper_tables, paper=PAPER, **options
    )


def fit_network(model: Fias, recipe: FiasRecipe, data: PreparedData, out: Path, **options: Any) -> FitResult:
    """Train a network on prepared data; ``options`` are those of `fit`."""
    return fit(
        model,
        data.train_set,
        recipe.training,
        out,
        loss=MutationLoss(recipe.gamma, recipe.subsets, recipe.reduction),
        validate=SliceValidation(data.val_set, data.cohort.class_names, recipe.training.batch_size),
        run_config={
            "architecture": Fias.architecture,
            "data": config_to_json(recipe.data),
            "network": config_to_json(recipe.network),
            "gamma": recipe.gamma,
            "subsets": recipe.subsets,
            "reduction": recipe.reduction,
        },
        config_type=type(recipe),
        **options,
    )


def _describe(best: Fias, recipe: FiasRecipe, data: PreparedData) -> dict[str, Any]:
    """Return what only this network can say in its report."""
    checkpoint = recipe.network.encoder_checkpoint
    weights = "random weights" if checkpoint is None else f"weights of {Path(checkpoint).name}"
    reduction = "summed" if recipe.reduction == "sum" else "averaged"
    return {
        "title": _title(recipe),
        "conventions": CONVENTIONS,
        "facts": {
            "Encoder": f"DilateFormer {_variant_name(recipe.network)}, {weights}",
            "Loss": f"{recipe.gamma:g} Dice + {1 - recipe.gamma:g} cross-entropy of the heads' sums "
            f"({recipe.subsets}), {reduction}",
        },
        "paper_tables": paper_tables(len(data.cohort.class_names) - 1),
        "paper": PAPER,
    }


def paper_tables(targets: int) -> list[PaperTable]:
    """Return the paper's results for a cohort of as many targets, where it has such, and its ablation."""
    return [table for table, wanted in ((SYNAPSE, 8), (ACDC, 3), (ABLATION, targets)) if wanted == targets]


def _title(recipe: FiasRecipe) -> str:
    return f"FIAS ({_variant_name(recipe.network)}) on {Path(recipe.data.root).name}"


def _variant_name(config: FiasConfig) -> str:
    return config.variant if isinstance(config.variant, str) else f"{config.variant.embed_dim} channels"


if __name__ == "__main__":
    import sys

    from trifuse.architectures.cli.main import main

    sys.exit(main(["train", "fias", *sys.argv[1:]]))
