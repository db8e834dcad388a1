"""How DINO-UNet is trained: its recipe, its loss, and what is special about it: a frozen encoder, a group of logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from trifuse.architectures.evaluation.charts import draw_block_weights
from trifuse.architectures.evaluation.picture import Picture
from trifuse.architectures.runs.prepared_data import PreparedData
from trifuse.architectures.runs.recipes import DataRecipe
from trifuse.architectures.runs.run_description import FREE_TO_CHANGE
from trifuse.architectures.storage.epoch_log import read_start
from trifuse.architectures.storage.pretrained import WEIGHTS_FILE, read_description, recorded_digest
from trifuse.architectures.training.feature_cache import FeatureCache
from trifuse.architectures.training.losses import SegmentationLoss, check_weights
from trifuse.architectures.training.recipe import Recipe
from trifuse.architectures.training.step import forward_image
from trifuse.architectures.training.training_state import FrozenBase
from trifuse.architectures.training.validation import SliceValidation
from trifuse.kernels.errors import require

from .backbone_encoder import is_hugging_face
from .block_weights import block_weights, describe_block_weights
from .model import DinoUNet, DinoUNetConfig


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
        lambda_dice: weight of the Dice,
        lambda_ce: and of the cross-entropy.
        cache_features: keep the frozen encoder's features on disk instead of computing them in every epoch.

    Raises:
        ValueError: cached features of augmented slices, a factor that is not positive, or a weight of the loss that is
            negative; or both are zero.
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
    lambda_dice: float = 1.0
    lambda_ce: float = 1.0
    cache_features: bool = field(default=False, metadata=FREE_TO_CHANGE)

    def __post_init__(self) -> None:
        check_weights(lambda_dice=self.lambda_dice, lambda_ce=self.lambda_ce)
        if self.cache_features and (self.data.augment != "none" or self.data.preprocessing.patches is not None):
            raise ValueError("cache_features needs whole slices and augment = 'none': others have no constant features")
        if self.theta_lr_mult <= 0:
            raise ValueError(f"theta_lr_mult must be positive, got {self.theta_lr_mult}")

    @staticmethod
    def upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
        """Spell out what older versions did: they weighed Dice and cross-entropy alike."""
        return {"lambda_dice": 1.0, "lambda_ce": 1.0, **values}


def check(recipe: DinoUNetRecipe) -> None:
    """Look for the package of an encoder of Hugging Face.

    Raises:
        MissingExtra: transformers is not installed, and needed.
    """
    if recipe.network.backbone is not None:
        require("transformers", "hf", "an encoder of Hugging Face")


def fit_options(model: DinoUNet, recipe: DinoUNetRecipe, data: PreparedData, out: Path) -> dict[str, Any]:
    """Return how this network is trained, as arguments of `trifuse.architectures.training.loop.fit`."""
    train_set: Any = data.train_set
    val_set: Any = data.val_set
    forward = forward_image
    if recipe.cache_features:
        cached = partial(FeatureCache, model, folder=out / "cache", device=recipe.training.device)
        train_set, val_set, forward = cached(train_set), cached(val_set), segment_features
    base = _frozen_base(recipe.network.encoder_checkpoint)
    return {
        "train_set": train_set,
        "loss": SegmentationLoss(batch_dice=recipe.batch_dice, w_dice=recipe.lambda_dice, w_ce=recipe.lambda_ce),
        "validate": SliceValidation(val_set, data.cohort.class_names, recipe.training.batch_size, forward),
        "run_config": {"encoder": None if base is None else base.sha256},
        "forward": forward,
        "param_groups": lambda network: parameter_groups(network, recipe),
        "describe": block_weights,
        "base": base,
    }


def chosen_defaults(given: Mapping[str, Any], config: Path | None) -> dict[str, Any]:
    """Return the paper's share of warm-up, a tenth, for a run of another length that no file describes."""
    if "training.epochs" not in given or config is not None:
        return {}
    return {"training.warmup_epochs": min(5.0, given["training.epochs"] / 10)}


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


def _frozen_base(checkpoint: str | None) -> FrozenBase | None:
    """Name the file of the encoder's weights, which then need not lie in every training checkpoint."""
    if checkpoint is None or is_hugging_face(Path(checkpoint)):  # whose names in the file are not those in memory
        return None
    folder = Path(checkpoint)
    return FrozenBase("encoder.", str(folder / WEIGHTS_FILE), recorded_digest(read_description(folder), folder))


def report(best: DinoUNet, recipe: DinoUNetRecipe, data: PreparedData, out: Path) -> dict[str, Any]:
    """Return what only this network has to report, as arguments of `report_run`."""
    return {
        "per_slice": True,
        "facts": {
            **_describe_encoder(best, recipe.network.encoder_checkpoint),
            **describe_block_weights(best, read_start(out)),
        },
        "draw": lambda log, scored, folder: _draw_blocks(best, log, folder),
    }


def _describe_encoder(model: DinoUNet, checkpoint: str | None) -> dict[str, str]:
    weights = "random weights" if checkpoint is None else f"weights of {Path(checkpoint).name}"
    return {"Encoder": f"{_variant_name(model.config)}, {weights}, frozen"}


def _draw_blocks(model: DinoUNet, log: Path, folder: Path) -> list[Picture]:
    if not model.config.learned:
        return []
    return [draw_block_weights(log, folder, selected=model.fusion.selected, start=read_start(log.parent))]


def title(recipe: DinoUNetRecipe) -> str:
    """Return the first line of a report."""
    return f"DINO-UNet ({_variant_name(recipe.network)}) on {Path(recipe.data.root).name}"


def _variant_name(config: DinoUNetConfig) -> str:
    if config.backbone is not None:
        return f"{config.backbone['model_type']}, {config.depth} blocks"
    return config.variant if isinstance(config.variant, str) else f"{config.depth} blocks"
