"""Train DINO-UNet on a cohort, predict its test cases, and write the report.

``python -m trifuse.architectures.dino_unet.train`` is ``trifuse train dino_unet``, alone or under torchrun.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from torch import Tensor

from trifuse.architectures.evaluation.charts import draw_block_weights
from trifuse.architectures.evaluation.picture import Picture
from trifuse.architectures.evaluation.report import PaperTable
from trifuse.architectures.runs.pipeline import PreparedData, RunOptions, train_and_report
from trifuse.architectures.runs.recipes import DataRecipe
from trifuse.architectures.runs.repeats import repeat_training
from trifuse.architectures.storage.pretrained import WEIGHTS_FILE, config_to_json, read_description, recorded_digest
from trifuse.architectures.training.feature_cache import FeatureCache
from trifuse.architectures.training.loop import FitResult, fit, forward_image
from trifuse.architectures.training.losses import SegmentationLoss
from trifuse.architectures.training.recipe import Recipe
from trifuse.architectures.training.training_state import FrozenBase
from trifuse.architectures.training.validation import SliceValidation

from .model import DinoUNet, DinoUNetConfig

PAPER = "the paper on left-atrium segmentation with a frozen DINOv2 and weighted block fusion"
PAPER_TABLES = (
    PaperTable(
        "Paper-reported Table I: LAScarQS 2022, 12 test patients, %",
        ("Model", "DSC", "IoU"),
        (
            ("nnU-Net 2D", "87.7 ± 2.7", "81.7 ± 2.8"),
            ("base", "91.5 ± 6.6", "82.9 ± 9.5"),
            ("large", "92.1 ± 5.6", "83.8 ± 8.4"),
            ("giant", "92.3 ± 5.9", "84.1 ± 8.8"),
        ),
        "DSC and IoU of this table cannot both be means over the same patients: IoU = DSC / (2 - DSC) is convex.",
    ),
    PaperTable(
        "Paper-reported Table II: which blocks, with and without image integration, DSC, %",
        ("Blocks", "Integration", "base", "large", "giant"),
        (
            ("last 4", "yes", "88.1 ± 8.0", "88.6 ± 6.5", "89.8 ± 4.7"),
            ("last 4", "no", "87.1 ± 6.4", "86.6 ± 6.4", "88.2 ± 4.8"),
            ("7,5,3,1", "yes", "88.3 ± 7.8", "88.9 ± 5.8", "90.3 ± 4.3"),
            ("7,5,3,1", "no", "87.7 ± 6.3", "87.2 ± 6.6", "88.5 ± 5.2"),
        ),
    ),
)


@dataclass(frozen=True)
class DinoUNetRecipe:
    """A run of DINO-UNet; the defaults of ``training`` are the paper's.

    Attributes:
        data: which cases, and how their slices are prepared.
        network: the network; its number of classes follows the cohort.
        training: how it is trained.
        theta_lr_mult: factor on the learning rate of the block logits.
        theta_decay: whether weight decay holds for the block logits too, as in the paper.
        batch_dice: whether the Dice of the loss pools its sums over the batch.
        cache_features: keep the frozen encoder's features on disk instead of computing them in every epoch.

    Raises:
        ValueError: cached features of augmented slices, or a factor that is not positive.
    """

    data: DataRecipe = field(default_factory=DataRecipe)
    network: DinoUNetConfig = field(default_factory=DinoUNetConfig)
    training: Recipe = field(
        default_factory=lambda: Recipe(
            epochs=50, batch_size=32, lr=5e-5, weight_decay=1e-4, betas=(0.9, 0.95), warmup_epochs=5
        )
    )
    theta_lr_mult: float = 1.0
    theta_decay: bool = True
    batch_dice: bool = True
    cache_features: bool = False

    def __post_init__(self) -> None:
        if self.cache_features and (self.data.augment != "none" or self.data.preprocessing.patches is not None):
            raise ValueError("cache_features needs whole slices and augment = 'none': others have no constant features")
        if self.theta_lr_mult <= 0:
            raise ValueError(f"theta_lr_mult must be positive, got {self.theta_lr_mult}")


def train(recipe: DinoUNetRecipe, out: Path, **options: Unpack[RunOptions]) -> Path | None:
    """Run a recipe from its data to ``out/report.md``, and return that path (None on all ranks but the first).

    Args:
        recipe: what to do.
        out: the run's folder.
        options: see `RunOptions`.

    Raises:
        OutputFolderError, DataError, MissingExtra, CheckpointError, NumericError, Interrupted: see `train_and_report`.
    """
    return train_and_report(recipe, out, DinoUNet, fit_network, _describe, sigmoid=True, **options)


def train_repeats(recipe: DinoUNetRecipe, out: Path, repeats: int, **options: Unpack[RunOptions]) -> Path | None:
    """Train with ``repeats`` seeds and report mean and SD over the runs; see `repeat_training`."""
    return repeat_training(
        train, recipe, out, repeats, title=_title(recipe), paper_tables=paper_tables, paper=PAPER, **options
    )


def _describe(best: DinoUNet, recipe: DinoUNetRecipe, data: PreparedData) -> dict[str, Any]:
    """Return what only this network can say in its report."""
    return {
        "title": _title(recipe),
        "per_slice": True,
        "facts": _describe_encoder(best, recipe.network.encoder_checkpoint),
        "draw": lambda log, scored, folder: _draw_blocks(best, log, folder),
        "paper_tables": paper_tables(len(data.cohort.class_names) - 1),
        "paper": PAPER,
    }


def fit_network(model: DinoUNet, recipe: DinoUNetRecipe, data: PreparedData, out: Path, **options: Any) -> FitResult:
    """Train a network on prepared data; ``options`` are those of `fit`."""
    train_set: Any = data.train_set
    val_set: Any = data.val_set
    step = forward_image
    if recipe.cache_features:
        cached = partial(FeatureCache, model, folder=out / "cache", device=recipe.training.device)
        train_set, val_set, step = cached(train_set), cached(val_set), segment_features
    base = _frozen_base(recipe.network.encoder_checkpoint)
    return fit(
        model,
        train_set,
        recipe.training,
        out,
        loss=SegmentationLoss(batch_dice=recipe.batch_dice),
        validate=SliceValidation(val_set, data.cohort.class_names, recipe.training.batch_size, step),
        run_config={
            "architecture": DinoUNet.architecture,
            "data": config_to_json(recipe.data),
            "network": config_to_json(recipe.network),
            "encoder": None if base is None else base.sha256,
            "theta_lr_mult": recipe.theta_lr_mult,
            "theta_decay": recipe.theta_decay,
            "batch_dice": recipe.batch_dice,
        },
        config_type=type(recipe),
        step=step,
        param_groups=lambda network: parameter_groups(network, recipe),
        describe=block_weights,
        base=base,
        **options,
    )


def segment_features(model: Any, batch: dict[str, Any]) -> Tensor:
    """Compute the logits from the encoder's cached features."""
    image = model.prepare(batch["image"])
    return model.forward_features(batch["features"], model.encoder.grid_of(image), image)


def parameter_groups(model: Any, recipe: DinoUNetRecipe) -> list[dict[str, Any]]:
    """Put the block logits into a group of their own; the frozen encoder is in none."""
    logits = [parameter for parameter in model.fusion.parameters() if parameter.requires_grad]
    theta = {"name": "theta", "params": logits, "lr_mult": recipe.theta_lr_mult}
    if not recipe.theta_decay:
        theta["weight_decay"] = 0.0
    return [{"name": "decoder", "params": list(model.decoder.parameters())}, *([theta] if logits else [])]


def block_weights(model: Any) -> dict[str, float]:
    """Return the softmax weight of every block, by log column; nothing where the blocks are fixed."""
    if not model.config.learned:
        return {}
    return {f"weight_block_{index}": float(weight) for index, weight in enumerate(model.fusion.weights)}


def _frozen_base(checkpoint: str | None) -> FrozenBase | None:
    """Name the file of the encoder's weights, which then need not lie in every training checkpoint."""
    if checkpoint is None:
        return None
    folder = Path(checkpoint)
    return FrozenBase("encoder.", str(folder / WEIGHTS_FILE), recorded_digest(read_description(folder), folder))


def _describe_encoder(model: DinoUNet, checkpoint: str | None) -> dict[str, str]:
    weights = "random weights" if checkpoint is None else f"weights of {Path(checkpoint).name}"
    return {
        "Encoder": f"{_variant_name(model.config)}, {weights}, frozen",
        "Blocks, coarsest stage first": ", ".join(map(str, model.fusion.selected)),
    }


def _draw_blocks(model: DinoUNet, log: Path, folder: Path) -> list[Picture]:
    return [draw_block_weights(log, folder, selected=model.fusion.selected)] if model.config.learned else []


def paper_tables(targets: int) -> Sequence[PaperTable]:
    """Return the paper's results, which are for one target."""
    return PAPER_TABLES


def _title(recipe: DinoUNetRecipe) -> str:
    return f"DINO-UNet ({_variant_name(recipe.network)}) on {Path(recipe.data.root).name}"


def _variant_name(config: DinoUNetConfig) -> str:
    return config.variant if isinstance(config.variant, str) else f"{config.depth} blocks"


if __name__ == "__main__":
    import sys

    from trifuse.architectures.cli.main import main

    sys.exit(main(["train", "dino_unet", *sys.argv[1:]]))
