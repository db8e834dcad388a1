"""What the paper on DINO-UNet says of a run, and what is decided where it is silent."""

from __future__ import annotations

from typing import Any

from trifuse.architectures.runs import shared_decisions as shared
from trifuse.architectures.runs.decisions import NOT_SAID, OURS, Decision
from trifuse.architectures.runs.prepared_data import PreparedData
from trifuse.blocks.weighted_block_fusion import INIT_STD

from .variants import DINOV3_VARIANTS

_DINOV2 = "DINOv2"


def _encoder_weights(recipe: Any, data: PreparedData | None) -> str:
    return "random" if recipe.network.encoder_checkpoint is None else "pretrained"


def _variant(recipe: Any, data: PreparedData | None) -> str:
    variant, backbone = recipe.network.variant, recipe.network.backbone
    if backbone is not None:
        return f"{backbone.get('model_type')}, {recipe.network.depth} blocks"
    return variant if isinstance(variant, str) else f"{variant.depth} blocks, width {variant.embed_dim}"


def _own_encoder(recipe: Any) -> bool:
    return recipe.network.backbone is None


def _has_position_table(recipe: Any) -> bool:
    return _own_encoder(recipe) and recipe.network.variant not in DINOV3_VARIANTS


def _learned(recipe: Any) -> bool:
    return recipe.network.learned


def _fixed_list(recipe: Any) -> bool:
    return isinstance(recipe.network.blocks, tuple)


_TRAINING = shared.silent_but(
    Decision("Optimiser", "Adam, citing AdamW", "training.optimizer", ("adamw", "adam"), OURS),
    Decision("Adam's betas", "0.9, 0.95", "training.betas", ((0.9, 0.95),), applies=shared.takes_adam),
    Decision("Learning rate", "5e-05", "training.lr", (5e-5,)),
    Decision("Weight decay", "0.0001", "training.weight_decay", (1e-4,)),
    Decision("Schedule", "warm-up, then cosine", "training.schedule", ("warmup_cosine",)),
    Decision("Warm-up, epochs", "5", "training.warmup_epochs", (5.0,), applies=shared.warms_up),
    Decision("Epochs", "50", "training.epochs", (50,)),
    Decision("Batch size", "32", "training.batch_size", (32,)),
    Decision("Learning rate of theta, times", "that of all", "theta_lr_mult", (1.0,), applies=_learned),
    Decision("Weight decay of theta", "yes, as of all", "theta_decay", (True,), applies=_learned),
    Decision("Loss", NOT_SAID, shared.LOSS, by="nnU-Net", answer=shared.how_dice_and_ce_add),
    Decision("Dice over the whole batch", NOT_SAID, "batch_dice", by="nnU-Net"),
    Decision("Best epoch by", "validation, no metric", "training.best_epoch_by", by=OURS, answer=shared.best_epoch_by),
    Decision(
        "Best epoch on",
        "validation",
        (),
        ("validation",),
        answer=shared.cases_that_choose,
        applies=shared.chooses_by_score,
    ),
)

_DATA = (
    Decision(
        "Split", "10 % to validate, 20 % to test", shared.SPLIT, (shared.DRAWN_SPLIT,), answer=shared.how_it_is_split
    ),
    Decision("Image side, pixels", "448", "data.preprocessing.image_size", (448,)),
    Decision("Slices are seen", "whole", (), ("whole slices",), answer=shared.how_slices_are_seen),
    *shared.patch_rows(),
    Decision("Slices to train on", NOT_SAID, "data.slices", by=OURS),
    Decision("Augmentation", NOT_SAID, "data.augment", by=OURS),
    shared.strength_row(OURS),
    Decision("Intensities", NOT_SAID, shared.INTENSITY, by=OURS, answer=shared.how_values_are_scaled),
    Decision("Slices are resized by", NOT_SAID, "data.preprocessing.resize", by=OURS),
    Decision("Predictions get back as", NOT_SAID, "data.preprocessing.restore", by=OURS),
    Decision("Channels of an image", NOT_SAID, ("data.preprocessing.channels", "network.in_channels"), by=_DINOV2),
    Decision("Sides no multiples of a patch", NOT_SAID, "network.size_policy", by=OURS),
)

_NETWORK = (
    Decision(
        "Encoder",
        "base, large or giant",
        ("network.variant", "network.backbone"),
        ("base", "large", "giant"),
        answer=_variant,
    ),
    Decision(
        "Encoder: weights",
        "DINOv2, frozen",
        "network.encoder_checkpoint",
        ("pretrained",),
        answer=_encoder_weights,
    ),
    Decision("Encoder: type of weights", NOT_SAID, "network.encoder_dtype", by=OURS),
    Decision("Encoder: register tokens", NOT_SAID, "network.num_registers", by=_DINOV2, applies=_own_encoder),
    Decision("Encoder: positions resized by", NOT_SAID, "network.pos_mode", by=_DINOV2, applies=_has_position_table),
    Decision("Encoder: blocks normalised", NOT_SAID, "network.norm_blocks", by=_DINOV2),
    Decision(
        "Blocks that become skips",
        "those of most weight",
        "network.blocks",
        ("learned",),
        answer=lambda recipe, data: "learned" if recipe.network.learned else recipe.network.blocks,
    ),
    Decision(
        "Theta at the start",
        "small random numbers",
        (),
        by=OURS,
        answer=lambda recipe, data: f"normal, SD {INIT_STD:g}",
        applies=_learned,
    ),
    Decision("How many blocks", "k; fixed sets have 4", "network.top_k", by=OURS),
    Decision("Blocks go to stages by", NOT_SAID, "network.order", by=OURS, applies=_learned),
    Decision("Selection fixed after epoch", NOT_SAID, "network.freeze_selection_epoch", by=OURS, applies=_learned),
    Decision("Blocks are counted from", NOT_SAID, "network.index_base", by=OURS, applies=_fixed_list),
    Decision(
        "Fused map enters at",
        NOT_SAID,
        "network.bottleneck",
        by=OURS,
        answer=lambda recipe, data: recipe.network.effective_bottleneck,
    ),
    Decision(
        "Factor of a skip",
        NOT_SAID,
        "network.skip_scale",
        by=OURS,
        answer=lambda recipe, data: recipe.network.effective_skip_scale,
    ),
    Decision("Image enters every stage", "yes", "network.spatial_integration", (True,)),
    Decision("Image convolved, then resized", NOT_SAID, "network.conv_then_resize", by=OURS),
    Decision("Channels of the stages", NOT_SAID, "network.channels", by=OURS),
    Decision("Channels of the bottleneck", NOT_SAID, "network.bottleneck_dim", by=OURS),
    Decision("Convolutions per stage", NOT_SAID, "network.convs_per_stage", by=OURS),
    Decision("Normalisation of the decoder", NOT_SAID, "network.norm", by=OURS),
    Decision("Resized to the image's size", NOT_SAID, "network.final_resize", by=OURS),
)

DECISIONS = (*_TRAINING, *_DATA, *_NETWORK)
NO_ROW = {
    **shared.NO_ROW,
    "cache_features": "the same features, read in place of computed",
    "network.stream_fusion": "the same sums, in less memory",
    "network.stream_gradient": "the same gradient, in less memory",
}
