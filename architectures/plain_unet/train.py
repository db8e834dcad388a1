"""Train the plain U-Net on a cohort, predict its test cases, and write the report.

``python -m trifuse.architectures.plain_unet.train`` is ``trifuse train plain_unet``, alone or under torchrun.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

from trifuse.architectures.evaluation.report import PaperTable
from trifuse.architectures.runs.nnunet_recipe import VAL_DICE_EMA, nnunet_data, nnunet_training
from trifuse.architectures.runs.pipeline import PreparedData, RunOptions, train_and_report
from trifuse.architectures.runs.recipes import DataRecipe
from trifuse.architectures.runs.repeats import repeat_training
from trifuse.architectures.storage.pretrained import config_to_json
from trifuse.architectures.training.loop import FitResult, fit
from trifuse.architectures.training.losses import SegmentationLoss
from trifuse.architectures.training.recipe import Recipe

from .model import PlainUNet, PlainUNetConfig

PAPER = "Isensee et al., nnU-Net, Nature Methods 2021, as the baseline of the papers named with the tables"
LEFT_ATRIUM = PaperTable(
    "Paper-reported: LAScarQS 2022, 12 test patients, %",
    ("Model", "DSC", "IoU"),
    (("nnU-Net 2D", "87.7 ± 2.7", "81.7 ± 2.8"),),
    "The baseline of the paper on left-atrium segmentation with a frozen DINOv2 and weighted block fusion.",
)
SCAR = PaperTable(
    "Paper-reported: scar, 21 test cases",
    ("Model", "Modality", "Dice", "Precision", "Sensitivity", "Volume difference"),
    (("baseline", "LGE", "0.6149", "0.7315", "0.7072", "4.436"),),
    "The baseline of the paper on ECG- and AHA-17-guided scar segmentation; the unit of the volume difference is not "
    "stated.",
)


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


def train(recipe: PlainUNetRecipe, out: Path, **options: Unpack[RunOptions]) -> Path | None:
    """Run a recipe from its data to ``out/report.md``, and return that path (None on all ranks but the first).

    Args:
        recipe: what to do.
        out: the run's folder.
        options: see `RunOptions`.

    Raises:
        OutputFolderError, DataError, MissingExtra, CheckpointError, NumericError, Interrupted: see `train_and_report`.
    """
    return train_and_report(recipe, out, PlainUNet, fit_network, _describe, **options)


def train_repeats(recipe: PlainUNetRecipe, out: Path, repeats: int, **options: Unpack[RunOptions]) -> Path | None:
    """Train with ``repeats`` seeds and report mean and SD over the runs; see `repeat_training`."""
    return repeat_training(
        train, recipe, out, repeats, title=_title(recipe), paper_tables=paper_tables, paper=PAPER, **options
    )


def fit_network(model: PlainUNet, recipe: PlainUNetRecipe, data: PreparedData, out: Path, **options: Any) -> FitResult:
    """Train a network on prepared data; ``options`` are those of `fit`."""
    return fit(
        model,
        data.train_set,
        recipe.training,
        out,
        loss=SegmentationLoss(batch_dice=recipe.batch_dice),
        validate=data.validation(recipe.training.batch_size),
        run_config={
            "architecture": PlainUNet.architecture,
            "data": config_to_json(data.recipe),
            "network": config_to_json(recipe.network),
            "batch_dice": recipe.batch_dice,
        },
        config_type=type(recipe),
        monitor_smoothing=VAL_DICE_EMA,
        **options,
    )


def _describe(best: PlainUNet, recipe: PlainUNetRecipe, data: PreparedData) -> dict[str, Any]:
    """Return what only this network can say in its report."""
    pooled = "pooled over the batch" if recipe.batch_dice else "of each sample"
    return {
        "title": _title(recipe),
        "facts": {
            "Stages": f"{len(best.config.features)}, of {', '.join(map(str, best.config.features))} channels",
            "Loss": f"Dice {pooled} and cross-entropy, at all resolutions but the coarsest",
        },
        "paper_tables": paper_tables(len(data.cohort.class_names) - 1),
        "paper": PAPER,
    }


def paper_tables(targets: int) -> list[PaperTable]:
    """Return what papers report of their baseline for a cohort of as many targets."""
    return [table for table, wanted in ((LEFT_ATRIUM, 1), (SCAR, 3)) if wanted == targets]


def _title(recipe: PlainUNetRecipe) -> str:
    return f"Plain U-Net ({recipe.network.base_dim} channels) on {Path(recipe.data.root).name}"


if __name__ == "__main__":
    import sys

    from trifuse.architectures.cli.main import main

    sys.exit(main(["train", "plain_unet", *sys.argv[1:]]))
